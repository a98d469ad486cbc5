// All kernel bodies of one level, in the namespace of that level. Included once a level, by level_*.cpp.
// clang-format off: each body uses those before it
#include "cpu/vec.inl"
#include "cpu/vec_math.inl"
#include "cpu/gemm.inl"
#include "cpu/gradients.inl"
#include "cpu/linear.inl"
#include "cpu/digest.inl"
#include "cpu/cells.inl"
#include "cpu/recurrence.inl"
#include "cpu/attention_pool.inl"
#include "cpu/additive_attention.inl"
#include "cpu/table.inl"
// clang-format on
