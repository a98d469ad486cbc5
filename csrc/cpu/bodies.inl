// All kernel bodies of one level, in the namespace of that level. Included by levels.cpp only, once a level.
// clang-format off: each body uses those before it
#include "cpu/vec.inl"
#include "cpu/vec_math.inl"
#include "cpu/gemm.inl"
#include "cpu/cells.inl"
#include "cpu/recurrence.inl"
#include "cpu/attention_pool.inl"
#include "cpu/table.inl"
// clang-format on
