// All kernel bodies of one level, in the namespace of that level. Included once a level, by level_*.cpp.
// clang-format off: each body uses those before it
#include "cpu/simd/vec.inl"
#include "cpu/simd/vec_math.inl"
#include "cpu/gemm/gemm.inl"
#include "cpu/gemm/weight_gradients.inl"
#include "cpu/linear/linear.inl"
#include "cpu/hash.inl"
#include "cpu/rnn/cells.inl"
#include "cpu/rnn/recurrence.inl"
#include "cpu/pooling/attention_pool.inl"
#include "cpu/attention/additive_attention.inl"
#include "cpu/isa/kernel_table.inl"
// clang-format on
