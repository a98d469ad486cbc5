// All kernel bodies of one level, in the namespace of that level. Included by levels.cpp only.
#include "cpu/vec.inl"
#include "cpu/vec_math.inl"
#include "cpu/gemm.inl"
#include "cpu/cells.inl"
#include "cpu/recurrence.inl"
#include "cpu/attention_pool.inl"
#include "cpu/table.inl"
