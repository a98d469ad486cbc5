// The table of this level's kernels.
namespace llm_ext {
namespace LLM_EXT_LEVEL {

template <typename T>
static KernelsOf<T> make_kernels_of() {
  KernelsOf<T> k;
  k.rnn_forward_workspace = rnn_forward_workspace<T>;
  k.rnn_backward_workspace = rnn_backward_workspace<T>;
  k.rnn_threads = rnn_threads<T>;
  k.rnn_forward = rnn_forward<T>;
  k.rnn_backward = rnn_backward<T>;
  k.pool_threads = pool_threads<T>;
  k.pool_workspace = pool_workspace<T>;
  k.pool_forward = pool_forward<T>;
  k.pool_backward = pool_backward<T>;
  k.prefix_pool_workspace = prefix_pool_workspace<T>;
  k.prefix_pool_forward = prefix_pool_forward<T>;
  k.prefix_pool_backward = prefix_pool_backward<T>;
  return k;
}

static Kernels make_kernels(const char* level) { return {level, make_kernels_of<float>(), make_kernels_of<double>()}; }

}  // namespace LLM_EXT_LEVEL
}  // namespace llm_ext
