// The table of this level's kernels. A constant: to choose between the levels must not run code of any of them.
namespace llm_ext {
namespace LLM_EXT_LEVEL {

template <typename S>
static constexpr RecurrenceKernels<S> kRecurrenceKernels = {
    .packed_size = packed_weights_size<S>,
    .forward_workspace = recurrence_forward_workspace<S>,
    .backward_workspace = recurrence_backward_workspace<S>,
    .threads = recurrence_threads,
    .pack = pack_weights<S>,
    .forward = recurrence_forward<S>,
    .backward = recurrence_backward<S>,
};

template <typename T>
static constexpr PoolKernels<T> kPoolKernels = {
    .threads = pool_threads<T>,
    .workspace = pool_workspace<T>,
    .forward = pool_forward<T>,
    .backward = pool_backward<T>,
    .prefix_workspace = prefix_pool_workspace<T>,
    .prefix_forward = prefix_pool_forward<T>,
    .prefix_backward = prefix_pool_backward<T>,
};

static constexpr Kernels kKernels = {
    LLM_EXT_LEVEL_NAME,
    digest,
    {kRecurrenceKernels<float>, kRecurrenceKernels<double>, kRecurrenceKernels<BFloat16>, kRecurrenceKernels<Float16>},
    {kPoolKernels<float>, kPoolKernels<double>}};

}  // namespace LLM_EXT_LEVEL
}  // namespace llm_ext
