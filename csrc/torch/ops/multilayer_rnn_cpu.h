// Several layers in one call, for inference. Where the steps of a layer are too small to be shared, each thread runs
// layers, or directions, of its own; else the layers run one after the other, each with the whole team.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "params/attention.h"
#include "params/linear.h"
#include "params/pooling.h"
#include "params/rnn.h"
#include "torch/tensor_args.h"
#include "torch/ops/rnn_launch_cpu.h"
#include "torch/ops/rnn.h"
#include "torch/stable.h"

namespace llm_ext {

// Steps of a layer after which the next one may go on: 17 to 64 are equal on Zen 3.
constexpr int64_t kWaveSteps = 32;

struct StackArguments {
  const char* op;
  Mode mode;
  const Tensor& x;  // or with tables ids of their rows
  const OptionalTensor& h0;
  const OptionalTensor& c0;
  const std::vector<Tensor>& weights;
  bool bias;
  bool bidirectional;
  const std::vector<Tensor>& tables;  // what the first layer makes of each x, of each direction; or none
  const OptionalTensor& batch_sizes;
};

// The layers of one call. A row is one direction of one layer, as in the state.
template <typename S>
class Stack {
 public:
  explicit Stack(const StackArguments& a)
      : op_(a.op), mode_(a.mode), directions_(a.bidirectional ? 2 : 1), each_(a.bias ? 4 : 2) {
    STD_TORCH_CHECK(mode_ == Mode::kLstm ? a.h0.has_value() == a.c0.has_value() : !a.c0.has_value(), op_,
                    ": c0 must be given with the h0 of an LSTM, and only then");
    rows_ = static_cast<int>(a.weights.size()) / each_;
    STD_TORCH_CHECK(rows_ > 0 && a.weights.size() % (each_ * directions_) == 0, op_, ": weights must be ", each_,
                    " tensors for each of the ", directions_, " directions of each layer, got ", a.weights.size());
    const Tensor& first = a.weights[1];
    STD_TORCH_CHECK(first.dim() == 2, op_, ": w_hh must be [G H, H], got ", shape_text(first));
    hidden_ = first.size(1);
    read_x(a);
    h0_.emplace(a.h0, op_, "h0", std::initializer_list<int64_t>{rows_, batch_, hidden_});
    c0_.emplace(a.c0, op_, "c0", std::initializer_list<int64_t>{rows_, batch_, hidden_});
    y_ = packed_ ? empty({total_, directions_ * hidden_}, kScalarType<S>)
                 : empty({steps_, batch_, directions_ * hidden_}, kScalarType<S>);
    h_n_ = empty({rows_, batch_, hidden_}, kScalarType<S>);
    c_n_ = empty({mode_ == Mode::kLstm ? rows_ : 0, batch_, hidden_}, kScalarType<S>);
    for (int row = 0; row < rows_; ++row) add_row(a, row);
  }

  std::tuple<Tensor, Tensor, Tensor> run() {
    if (steps_ == 0) {
      for (const RecurrenceForwardParams<S>& p : params_) {
        pass_state(batch_ * hidden_, p.h0, p.h_n);
        pass_state(batch_ * hidden_, p.c0, p.c_n);
      }
    } else {
      const int threads = team_size(max_threads());
      // Pieces of a layer would round states of 16 bits where they meet.
      const int apart = directions_ == 2 ? 2 : (sizeof(S) == 2 || packed_ || steps_ < 2 * kWaveSteps ? 1 : rows_);
      if (kernel().one_thread_per_recurrence(params_[0].sizes, apart, threads)) {
        directions_ == 2 ? run_directions() : run_wavefront(std::min(threads, rows_));
      } else {
        const int useful = this->threads();
        prepare(useful);
        run_team(useful, [&](const ThreadTeam& team) { run_rows(team); });
        finish();
      }
    }
    return results();
  }

  // The same in three parts, for whoever runs it with a team that has more to do: what comes before, of a team of so
  // many threads at most; a team's part, after which it has met; what comes after. At least one step.
  int threads() const {
    int most = 1;
    for (const RecurrenceForwardParams<S>& p : params_) most = std::max(most, kernel().threads(p.sizes, max_threads()));
    return team_size(most);
  }
  void prepare(int threads) {
    find_weights(threads);
    workspace_ = workspace_of<S>(most_workspace(steps_, threads));
  }
  void run_rows(const ThreadTeam& team) {
    pack(team);
    for (int row = 0; row < rows_; ++row) {
      RecurrenceForwardParams<S> p = params_[row];
      p.workspace = place_in_workspace(0);
      kernel().forward(p, team);
      team.sync();
      if (directions_ == 1 || row % 2 == 0) continue;
      merge_directions(row / 2, team.slice(total_));
      team.sync();
    }
  }
  void finish() {
    for (const PackedFor<S>& w : weights_) w.remember();
  }
  std::tuple<Tensor, Tensor, Tensor> results() const { return {y_, h_n_, c_n_}; }

  int64_t hidden() const { return hidden_; }

 private:
  static const RecurrenceKernels<S>& kernel() { return kernels().recurrence<S>(); }

  int layers() const { return rows_ / directions_; }

  // The steps, and what the first layer reads of them.
  void read_x(const StackArguments& a) {
    const bool by_table = !a.tables.empty();
    packed_ = a.batch_sizes.has_value();
    const int64_t dims = (packed_ ? 1 : 2) + (by_table ? 0 : 1);
    STD_TORCH_CHECK(a.x.dim() == dims, op_, ": x must be [T, B, I], or [N, I] with batch_sizes, or such ids, got ",
                    shape_text(a.x));
    if (packed_) {
      offsets_ = offsets_of(op_, a.x.size(0), *a.batch_sizes);
      STD_TORCH_CHECK(offsets_.size() > 1 || (a.h0.has_value() && a.h0->dim() == 3), op_,
                      ": h0 must be [L, B, H] with batch_sizes of no steps");
      batch_ = offsets_.size() > 1 ? offsets_[1] : a.h0->size(1);
    } else {
      batch_ = a.x.size(1);
      for (int64_t t = 0; t <= a.x.size(0); ++t) offsets_.push_back(t * batch_);
    }
    steps_ = static_cast<int64_t>(offsets_.size()) - 1;
    total_ = offsets_.back();
    STD_TORCH_CHECK(a.x.is_cpu(), op_, ": x must be on cpu");
    STD_TORCH_CHECK(a.x.scalar_type() == (by_table ? ScalarType::Long : kScalarType<S>), op_,
                    by_table ? ": x must be int64 with tables" : ": x must have the dtype of the others");
    x_ = dense(a.x);
    if (!by_table) return;
    const int64_t gates = gates_of(mode_) * hidden_, known = a.tables[0].dim() == 2 ? a.tables[0].size(0) : 0;
    STD_TORCH_CHECK(static_cast<int>(a.tables.size()) == directions_, op_, ": tables must be one for each direction");
    for (const Tensor& table : a.tables)
      tables_.emplace_back(table, op_, "table", std::initializer_list<int64_t>{known, gates});
    const int64_t* ids = data<int64_t>(x_);
    for (int64_t n = 0; n < total_; ++n) {
      STD_TORCH_CHECK(ids[n] >= 0 && ids[n] < known, op_, ": ids must be from 0 to ", known - 1, ", got ", ids[n]);
    }
  }

  void add_row(const StackArguments& a, int row) {
    const int layer = row / directions_;
    const bool by_table = layer == 0 && !tables_.empty();
    const int64_t input = by_table ? 0 : (layer == 0 ? a.x.size(a.x.dim() - 1) : directions_ * hidden_);
    const int64_t gates = gates_of(mode_) * hidden_;
    const auto weight = [&](int i, const char* name, std::initializer_list<int64_t> sizes) {
      inputs_.emplace_back(a.weights[row * each_ + i], op_, name, sizes);
      return inputs_.back().get();
    };
    RecurrenceForwardParams<S> p = {};
    p.sizes = {mode_, steps_, batch_, input, hidden_, hidden_, offsets_.data(), row % directions_ == 1};
    if (!by_table) p.w_ih = weight(0, "w_ih", {gates, input});
    p.w_hh = weight(1, "w_hh", {gates, hidden_});
    if (each_ == 4) {
      if (!by_table) p.b_ih = weight(2, "b_ih", {gates});
      p.b_hh = weight(3, "b_hh", {gates});
    }
    const int64_t at = row * batch_ * hidden_;
    if (h0_->get() != nullptr) p.h0 = h0_->get() + at;
    if (c0_->get() != nullptr) p.c0 = c0_->get() + at;
    p.h_n = mutable_data<S>(h_n_) + at;
    if (mode_ == Mode::kLstm) p.c_n = mutable_data<S>(c_n_) + at;
    // What a layer reads is what the one before has written; that of two directions has yet to be put side by side.
    if (by_table) {
      p.input_projections = tables_[row].get(), p.input_ids = data<int64_t>(x_);
    } else {
      p.x = layer == 0 ? data<S>(x_) : layer_output(layer - 1);
    }
    p.y = directions_ == 1 ? layer_output(layer) : direction_output(row % 2);
    params_.push_back(p);
  }

  S* place(std::optional<Tensor>& tensor, int64_t width) {
    if (!tensor.has_value()) tensor = empty({total_, width}, kScalarType<S>);
    return mutable_data<S>(*tensor);
  }
  // The output of every layer has a place of its own: in a wavefront all are being written at once.
  S* layer_output(int layer) {
    if (layer == layers() - 1) return mutable_data<S>(y_);
    outputs_.resize(layers());
    return place(outputs_[layer], directions_ * hidden_);
  }
  S* direction_output(int direction) { return place(halves_[direction], hidden_); }

  void merge_directions(int layer, Range rows) {
    S* target = layer_output(layer);
    for (int64_t n = rows.begin; n < rows.end; ++n) {
      for (int d = 0; d < 2; ++d) {
        std::memcpy(target + (2 * n + d) * hidden_, data<S>(*halves_[d]) + n * hidden_, hidden_ * sizeof(S));
      }
    }
  }

  // One thread for each direction.
  void run_directions() {
    find_weights(2);
    const int64_t space = most_workspace(steps_, 1);
    workspace_ = workspace_of<S>(2 * space);
    run_team(2, [&](const ThreadTeam& team) {
      pack(team);
      Barrier alone;
      for (int layer = 0; layer < layers(); ++layer) {
        for (int d = team.rank; d < 2; d += team.size) {
          RecurrenceForwardParams<S> p = params_[2 * layer + d];
          p.workspace = place_in_workspace(team.rank * space);
          kernel().forward(p, ThreadTeam{0, 1, &alone});
        }
        team.sync();
        merge_directions(layer, team.slice(total_));
        team.sync();
      }
    });
    finish();
  }

  // Layers are dealt out in turn. Each goes by pieces of some steps, and waits only for the same piece of the one
  // below.
  void run_wavefront(int threads) {
    find_weights(threads);
    const int64_t space = most_workspace(kWaveSteps, 1);
    workspace_ = workspace_of<S>(threads * space);
    std::deque<Progress> done(rows_);
    run_team(threads, [&](const ThreadTeam& team) {
      pack(team);
      Barrier alone;
      const int64_t pieces = (steps_ + kWaveSteps - 1) / kWaveSteps;
      const int64_t rounds = pieces + (rows_ - 1) / team.size;
      for (int64_t round = 0; round < rounds; ++round) {
        for (int row = team.rank; row < rows_; row += team.size) {
          // A layer is so many rounds behind the first one of its thread that nobody waits for what is yet to be begun.
          const int64_t piece = round - row / team.size;
          if (piece < 0 || piece >= pieces) continue;
          if (row > 0) done[row - 1].await(piece + 1);
          RecurrenceForwardParams<S> p = piece_of(row, piece * kWaveSteps);
          p.workspace = place_in_workspace(team.rank * space);
          kernel().forward(p, ThreadTeam{0, 1, &alone});
          done[row].reach(piece + 1);
        }
      }
    });
    finish();
  }

  // Some steps of a row, from `begin` on, which go on from where the ones before have left the state.
  RecurrenceForwardParams<S> piece_of(int row, int64_t begin) const {
    RecurrenceForwardParams<S> p = params_[row];
    p.sizes.steps = std::min(kWaveSteps, steps_ - begin);
    if (p.input_projections == nullptr) {
      p.x += begin * batch_ * p.sizes.input;
    } else {
      p.input_ids += begin * batch_;
    }
    p.y += begin * batch_ * hidden_;
    if (begin > 0) {
      p.h0 = p.y - batch_ * hidden_;
      p.c0 = p.c_n;
    }
    return p;
  }

  void find_weights(int threads) {
    for (RecurrenceForwardParams<S>& p : params_) weights_.emplace_back(p, threads);
  }
  void pack(const ThreadTeam& team) const {
    for (const PackedFor<S>& w : weights_) w.pack(team);
  }

  // Of a team of so many threads that runs at most so many steps of any row at a time.
  int64_t most_workspace(int64_t steps, int threads) const {
    int64_t most = 0;
    for (const RecurrenceForwardParams<S>& p : params_) {
      for (int64_t n : {std::min(steps, steps_), steps_ % steps}) {
        RecurrenceSizes s = p.sizes;
        s.steps = n;
        if (n > 0) most = std::max(most, kernel().forward_workspace(s, threads));
      }
    }
    return most;
  }
  Compute<S>* place_in_workspace(int64_t offset) const {
    return workspace_ ? mutable_data<Compute<S>>(*workspace_) + offset : nullptr;
  }

  const char* op_;
  const Mode mode_;
  const int directions_;
  const int each_;  // tensors of a row
  int rows_;
  bool packed_;
  int64_t steps_, batch_, hidden_, total_;  // total_: rows of all steps
  std::vector<int64_t> offsets_;
  Tensor x_, y_, h_n_, c_n_;
  std::optional<Input<S>> h0_, c0_;
  std::deque<Input<S>> tables_;
  std::deque<Input<S>> inputs_;
  std::vector<std::optional<Tensor>> outputs_;  // of the layers but the last
  std::optional<Tensor> halves_[2];             // of the directions of a layer
  std::vector<RecurrenceForwardParams<S>> params_;
  std::deque<PackedFor<S>> weights_;  // of each row
  OptionalTensor workspace_;
};

}  // namespace llm_ext
