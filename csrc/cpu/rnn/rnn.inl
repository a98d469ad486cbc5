// The entry of the recurrences in the kernel table.
#pragma once

#include "cpu/isa/isa.h"
#include "cpu/rnn/backward.inl"
#include "cpu/rnn/cells.inl"
#include "cpu/rnn/forward.inl"
#include "cpu/rnn/forward_unpacked.inl"
#include "cpu/rnn/partition.inl"
#include "cpu/rnn/workspace.inl"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

template <typename S>
static void recurrence_forward(const RecurrenceForwardParams<S>& p, const ThreadTeam& team) {
  with_cell(p.sizes.mode, [&](auto cell) {
    if (runs_unpacked(p.sizes)) {
      forward_unpacked<S, decltype(cell)>(p, team);
    } else {
      forward_packed<S, decltype(cell)>(p, team);
    }
  });
}

template <typename S>
static void recurrence_backward(const RecurrenceBackwardParams<S>& p, const ThreadTeam& team) {
  with_cell(p.sizes.mode, [&](auto cell) { BackwardPass<S, decltype(cell)>(p, team).run(); });
}

template <typename S>
static constexpr RecurrenceKernels<S> kRecurrenceKernels = {
    .packed_size = packed_weights_size<S>,
    .forward_workspace = recurrence_forward_workspace<S>,
    .backward_workspace = recurrence_backward_workspace<S>,
    .threads = recurrence_threads,
    .one_thread_per_recurrence = one_thread_per_recurrence<S>,
    .pack = pack_weights<S>,
    .forward = recurrence_forward<S>,
    .backward = recurrence_backward<S>,
};

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
