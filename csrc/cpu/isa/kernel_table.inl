// The table of this level's kernels.
namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

static constexpr Kernels kKernels = {
    LLM_EXT_ISA_NAME,
    hash,
    {kRecurrenceKernels<float>, kRecurrenceKernels<double>, kRecurrenceKernels<BFloat16>, kRecurrenceKernels<Float16>},
    {kLinearKernels<float>, kLinearKernels<double>},
    {kPoolKernels<float>, kPoolKernels<double>, kPoolKernels<BFloat16>, kPoolKernels<Float16>},
    {kAdditiveAttentionKernels<float>, kAdditiveAttentionKernels<double>, kAdditiveAttentionKernels<BFloat16>,
     kAdditiveAttentionKernels<Float16>}};

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
