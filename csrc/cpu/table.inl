// The table of this level's kernels. A constant: to choose between the levels must not run code of any of them.
namespace llm_ext {
namespace LLM_EXT_LEVEL {

template <typename T>
static constexpr KernelsOf<T> kKernelsOf = {
    .recurrence_forward_workspace = recurrence_forward_workspace<T>,
    .recurrence_backward_workspace = recurrence_backward_workspace<T>,
    .recurrence_threads = recurrence_threads<T>,
    .recurrence_forward = recurrence_forward<T>,
    .recurrence_backward = recurrence_backward<T>,
    .pool_threads = pool_threads<T>,
    .pool_workspace = pool_workspace<T>,
    .pool_forward = pool_forward<T>,
    .pool_backward = pool_backward<T>,
    .prefix_pool_workspace = prefix_pool_workspace<T>,
    .prefix_pool_forward = prefix_pool_forward<T>,
    .prefix_pool_backward = prefix_pool_backward<T>,
};

static constexpr Kernels kKernels = {LLM_EXT_LEVEL_NAME, kKernelsOf<float>, kKernelsOf<double>};

}  // namespace LLM_EXT_LEVEL
}  // namespace llm_ext
