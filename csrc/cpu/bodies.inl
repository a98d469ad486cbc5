// All kernel bodies of one level, in the namespace of that level. Included by levels.cpp only.
#include "cpu/attention_pool.inl"
#include "cpu/cells.inl"
#include "cpu/gemm.inl"
#include "cpu/recurrence.inl"
#include "cpu/table.inl"
#include "cpu/vec.inl"
#include "cpu/vec_math.inl"
