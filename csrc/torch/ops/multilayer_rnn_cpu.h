// CPU only: all layers of an RNN in one call, for inference. Used by multilayer_rnn_forward and attention_step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "params/rnn.h"
#include "torch/alloc/empty.h"
#include "torch/alloc/workspace.h"
#include "torch/dtypes.h"
#include "torch/ops/rnn.h"
#include "torch/ops/rnn_cpu.h"
#include "torch/stable.h"
#include "torch/tensor.h"
#include "torch/tensor_args.h"
#include "torch/threads/run_team.h"
#include "torch/weight_cache/packed_rnn_weights.h"

namespace llm_ext {

// Steps of a layer after which the next layer may follow. 17 to 64 are equally fast (Zen 3,
// docs/lab/multilayer-rnn.md).
constexpr int64_t kWavefrontSteps = 32;

struct MultilayerRnnArguments {
  const char* op;
  Mode mode;
  const Tensor& x;  // ids if there are input projections
  const OptionalTensor& h0;
  const OptionalTensor& c0;
  const std::vector<Tensor>& weights;  // w_ih, w_hh[, b_ih, b_hh] of each recurrence
  bool bias;
  bool bidirectional;
  const std::vector<Tensor>& input_projections;  // [V, G H] for each direction of the first layer, or empty
  const OptionalTensor& batch_sizes;
};

// The R = layers * directions recurrences of one call: recurrence r is direction r % directions of layer r /
// directions.
//
// If a step is too small to be divided among threads, each thread runs whole recurrences: both directions of a layer at
// once, or the layers as a wavefront. Otherwise the recurrences run one after the other, each on the whole team.
template <typename S>
class MultilayerRnn {
 public:
  explicit MultilayerRnn(const MultilayerRnnArguments& a)
      : op_(a.op),
        mode_(a.mode),
        directions_(a.bidirectional ? 2 : 1),
        weights_each_(a.bias ? 4 : 2),
        batch_sizes_(a.batch_sizes),
        x_(a.x) {
    STD_TORCH_CHECK(mode_ == Mode::kLstm ? a.h0.has_value() == a.c0.has_value() : !a.c0.has_value(), op_,
                    ": c0 must be given with the h0 of an LSTM, and only then");
    recurrences_ = static_cast<int>(a.weights.size()) / weights_each_;
    STD_TORCH_CHECK(recurrences_ > 0 && a.weights.size() % (weights_each_ * directions_) == 0, op_,
                    ": weights must be ", weights_each_, " tensors for each of the ", directions_,
                    " directions of each layer, got ", a.weights.size());
    const Tensor& first_w_hh = a.weights[1];
    STD_TORCH_CHECK(first_w_hh.dim() == 2, op_, ": w_hh must be [G H, H], got ", shape_text(first_w_hh));
    hidden_ = first_w_hh.size(1);
    check_x(a);
    h0_.emplace(a.h0, op_, "h0", std::initializer_list<int64_t>{recurrences_, batch_, hidden_});
    c0_.emplace(a.c0, op_, "c0", std::initializer_list<int64_t>{recurrences_, batch_, hidden_});
    if (!a.input_projections.empty()) check_input_projections(a);
    for (int r = 0; r < recurrences_; ++r) check_weights(a, r);
    if (!a.input_projections.empty()) check_ids(a.input_projections[0].size(0));
  }

  // After all checks of the call, and before the functions below: inputs may be large views of little memory.
  void allocate() {
    x_ = dense(x_);
    y_ = packed_ ? empty({rows_, directions_ * hidden_}, kScalarType<S>)
                 : empty({steps_, batch_, directions_ * hidden_}, kScalarType<S>);
    h_n_ = empty({recurrences_, batch_, hidden_}, kScalarType<S>);
    c_n_ = empty({mode_ == Mode::kLstm ? recurrences_ : 0, batch_, hidden_}, kScalarType<S>);
    for (int r = 0; r < recurrences_; ++r) add_recurrence(r);
    // A result without elements needs no kernel, and may have any number of steps; an attention_step has one.
    if (any_elements(y_) || steps_ == 1) {
      offsets_ = packed_ ? packed_row_offsets(*batch_sizes_) : padded_row_offsets(steps_, batch_);
    }
    for (RecurrenceForwardParams<S>& p : params_) p.sizes.row_offsets = offsets_.data();
  }

  std::tuple<Tensor, Tensor, Tensor> run() {
    allocate();
    if (!any_elements(y_)) {
      for (const RecurrenceForwardParams<S>& p : params_) {
        copy_state(batch_ * hidden_, p.h0, p.h_n);
        copy_state(batch_ * hidden_, p.c0, p.c_n);
      }
      return results();
    }
    const int threads = team_size(max_threads());
    // A wavefront divides the sequence, and a state of 16 bits would be rounded at each division.
    const bool divisible = sizeof(S) > 2 && !packed_ && steps_ >= 2 * kWavefrontSteps;
    const int concurrent = directions_ == 2 ? 2 : (divisible ? recurrences_ : 1);
    if (!kernel().one_thread_per_recurrence(params_[0].sizes, concurrent, threads)) {
      const int useful = this->threads();
      prepare(useful);
      run_team(useful, [&](const ThreadTeam& team) { run_in_turn(team); });
      finish();
    } else if (directions_ == 2) {
      run_both_directions();
    } else {
      run_wavefront(std::min(threads, recurrences_));
    }
    return results();
  }

  // The stages of a run by a team that has other work, too. The sequence must have at least one step: allocate();
  // choose a team of at least threads(); prepare(size of the team); run_in_turn(team) on all its threads, which ends
  // with a barrier; finish(). results() may be called at any time after allocate().
  int threads() const {
    int most = 1;
    for (const RecurrenceForwardParams<S>& p : params_) most = std::max(most, kernel().threads(p.sizes, max_threads()));
    return team_size(most);
  }
  void prepare(int threads) {
    find_packed_weights(threads);
    workspace_.emplace(max_workspace(steps_, threads));
  }
  void run_in_turn(const ThreadTeam& team) {
    pack_weights(team);
    for (int r = 0; r < recurrences_; ++r) {
      RecurrenceForwardParams<S> p = params_[r];
      p.workspace = workspace_->get();
      kernel().forward(p, team);
      team.sync();
      if (directions_ == 1 || r % 2 == 0) continue;
      interleave_directions(r / 2, team.slice(rows_));
      team.sync();
    }
  }
  void finish() {
    for (const PackedRnnWeights<S>& w : packed_weights_) w.insert_into_cache();
  }
  std::tuple<Tensor, Tensor, Tensor> results() const { return {y_, h_n_, c_n_}; }

  int64_t hidden() const { return hidden_; }

 private:
  static const RecurrenceKernels<S>& kernel() { return kernels().recurrence<S>(); }

  int layers() const { return recurrences_ / directions_; }

  // ---- arguments

  void check_x(const MultilayerRnnArguments& a) {
    const bool ids_given = !a.input_projections.empty();
    packed_ = a.batch_sizes.has_value();
    const int64_t dim = (packed_ ? 1 : 2) + (ids_given ? 0 : 1);
    STD_TORCH_CHECK(a.x.dim() == dim, op_, ": x must be [T, B, I], or [N, I] with batch_sizes, or such ids, got ",
                    shape_text(a.x));
    if (packed_) {
      batch_ = check_batch_sizes(op_, a.x.size(0), *a.batch_sizes);
      const bool no_steps = a.batch_sizes->size(0) == 0;
      STD_TORCH_CHECK(!no_steps || (a.h0.has_value() && a.h0->dim() == 3), op_,
                      ": h0 must be [L, B, H] with batch_sizes of no steps");
      if (no_steps) batch_ = a.h0->size(1);
    } else {
      batch_ = a.x.size(1);
    }
    check_volume(a.x, op_, "x");
    STD_TORCH_CHECK(a.x.is_cpu(), op_, ": x must be on cpu");
    STD_TORCH_CHECK(a.x.scalar_type() == (ids_given ? ScalarType::Long : kScalarType<S>), op_,
                    ids_given ? ": x must be int64 with input_projections" : ": x must have the dtype of the others");
    steps_ = packed_ ? a.batch_sizes->size(0) : a.x.size(0);
    rows_ = packed_ ? a.x.size(0) : steps_ * batch_;
  }

  void check_input_projections(const MultilayerRnnArguments& a) {
    const Tensor& first = a.input_projections[0];
    const int64_t gates = gates_of(mode_) * hidden_, vocabulary = first.dim() == 2 ? first.size(0) : 0;
    STD_TORCH_CHECK(static_cast<int>(a.input_projections.size()) == directions_, op_,
                    ": input_projections must be one tensor for each direction");
    for (const Tensor& t : a.input_projections)
      input_projections_.emplace_back(t, op_, "input_projections", std::initializer_list<int64_t>{vocabulary, gates});
  }

  void check_ids(int64_t vocabulary) const {
    const int64_t* ids = data<int64_t>(x_);
    const int64_t last = x_.dim() - 1, step_stride = x_.stride(0), row_stride = x_.stride(last);
    const int64_t rows = distinct(x_, last), steps = packed_ ? 1 : distinct(x_, 0);
    for (int64_t t = 0; t < (rows > 0 ? steps : 0); ++t) {
      for (int64_t b = 0; b < rows; ++b) {
        const int64_t id = ids[t * step_stride + b * row_stride];
        STD_TORCH_CHECK(id >= 0 && id < vocabulary, op_, ": ids must be from 0 to ", vocabulary - 1, ", got ", id);
      }
    }
  }

  // Whether the input projections replace the input weights of recurrence r.
  bool reads_ids(int r) const { return r < directions_ && !input_projections_.empty(); }
  int64_t input_size(int r) const {
    if (reads_ids(r)) return 0;
    return r < directions_ ? x_.size(x_.dim() - 1) : directions_ * hidden_;
  }

  void check_weights(const MultilayerRnnArguments& a, int r) {
    const int64_t gates = gates_of(mode_) * hidden_;
    const auto check = [&](int i, const char* name, bool read, std::initializer_list<int64_t> sizes) {
      weights_.emplace_back(read ? OptionalTensor(a.weights[r * weights_each_ + i]) : kNone, op_, name, sizes);
    };
    check(0, "w_ih", !reads_ids(r), {gates, input_size(r)});
    check(1, "w_hh", true, {gates, hidden_});
    if (weights_each_ == 2) return;
    check(2, "b_ih", !reads_ids(r), {gates});
    check(3, "b_hh", true, {gates});
  }

  void add_recurrence(int r) {
    const int layer = r / directions_;
    const Input<S>* weights = &weights_[r * weights_each_];
    RecurrenceForwardParams<S> p = {};
    p.sizes = {mode_, steps_, batch_, input_size(r), hidden_, hidden_, nullptr, r % directions_ == 1};
    p.w_ih = weights[0].get();
    p.w_hh = weights[1].get();
    if (weights_each_ == 4) {
      p.b_ih = weights[2].get();
      p.b_hh = weights[3].get();
    }
    const int64_t state_offset = r * batch_ * hidden_;
    if (h0_->get() != nullptr) p.h0 = h0_->get() + state_offset;
    if (c0_->get() != nullptr) p.c0 = c0_->get() + state_offset;
    p.h_n = mutable_data<S>(h_n_) + state_offset;
    if (mode_ == Mode::kLstm) p.c_n = mutable_data<S>(c_n_) + state_offset;
    if (reads_ids(r)) {
      p.input_projections = input_projections_[r].get(), p.input_ids = data<int64_t>(x_);
    } else {
      p.x = layer == 0 ? data<S>(x_) : layer_output(layer - 1);
    }
    p.y = directions_ == 1 ? layer_output(layer) : direction_output(r % 2);
    params_.push_back(p);
  }

  // ---- outputs

  S* allocated_rows(std::optional<Tensor>& tensor, int64_t width) {
    if (!tensor.has_value()) tensor = empty({rows_, width}, kScalarType<S>);
    return mutable_data<S>(*tensor);
  }
  // Every layer has its own output, because the layers of a wavefront write at the same time.
  S* layer_output(int layer) {
    if (layer == layers() - 1) return mutable_data<S>(y_);
    layer_outputs_.resize(layers());
    return allocated_rows(layer_outputs_[layer], directions_ * hidden_);
  }
  S* direction_output(int direction) { return allocated_rows(direction_outputs_[direction], hidden_); }

  // Copies the outputs of both directions into the layer's output [N, 2 H].
  void interleave_directions(int layer, Range rows) {
    S* target = layer_output(layer);
    for (int64_t n = rows.begin; n < rows.end; ++n) {
      for (int d = 0; d < 2; ++d) {
        std::memcpy(target + (2 * n + d) * hidden_, data<S>(*direction_outputs_[d]) + n * hidden_, hidden_ * sizeof(S));
      }
    }
  }

  // ---- one thread per recurrence

  void run_both_directions() {
    find_packed_weights(2);
    const int64_t elements = max_workspace(steps_, 1);
    workspace_.emplace(2 * elements);
    run_team(2, [&](const ThreadTeam& team) {
      pack_weights(team);
      Barrier unused;
      for (int layer = 0; layer < layers(); ++layer) {
        for (int d = team.rank; d < 2; d += team.size) {
          RecurrenceForwardParams<S> p = params_[2 * layer + d];
          p.workspace = workspace_->get() + team.rank * elements;
          kernel().forward(p, ThreadTeam{0, 1, &unused});
        }
        team.sync();
        interleave_directions(layer, team.slice(rows_));
        team.sync();
      }
    });
    finish();
  }

  // Thread i runs layers i, i + size, i + 2 size, ..., in chunks of kWavefrontSteps steps. A chunk waits only for the
  // same chunk of the layer below.
  void run_wavefront(int threads) {
    find_packed_weights(threads);
    const int64_t elements = max_workspace(kWavefrontSteps, 1);
    workspace_.emplace(threads * elements);
    std::deque<Progress> finished_chunks(recurrences_);
    run_team(threads, [&](const ThreadTeam& team) {
      pack_weights(team);
      Barrier unused;
      const int64_t chunks = (steps_ + kWavefrontSteps - 1) / kWavefrontSteps;
      const int64_t rounds = chunks + (recurrences_ - 1) / team.size;
      for (int64_t round = 0; round < rounds; ++round) {
        for (int r = team.rank; r < recurrences_; r += team.size) {
          // A thread's second layer starts one round after its first, and so on: no chunk waits for one of a later
          // round.
          const int64_t chunk = round - r / team.size;
          if (chunk < 0 || chunk >= chunks) continue;
          if (r > 0) finished_chunks[r - 1].await(chunk + 1);
          RecurrenceForwardParams<S> p = chunk_params(r, chunk * kWavefrontSteps);
          p.workspace = workspace_->get() + team.rank * elements;
          kernel().forward(p, ThreadTeam{0, 1, &unused});
          finished_chunks[r].reach(chunk + 1);
        }
      }
    });
    finish();
  }

  // At most kWavefrontSteps steps of recurrence r, from `begin` on. They continue from the state before `begin`.
  RecurrenceForwardParams<S> chunk_params(int r, int64_t begin) const {
    RecurrenceForwardParams<S> p = params_[r];
    p.sizes.steps = std::min(kWavefrontSteps, steps_ - begin);
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

  // ---- weights and workspace

  void find_packed_weights(int threads) {
    for (RecurrenceForwardParams<S>& p : params_) packed_weights_.emplace_back(p, threads);
  }
  void pack_weights(const ThreadTeam& team) const {
    for (const PackedRnnWeights<S>& w : packed_weights_) w.pack(team);
  }

  // Elements for any recurrence in chunks of `steps` steps.
  int64_t max_workspace(int64_t steps, int threads) const {
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

  const char* op_;
  const Mode mode_;
  const int directions_;
  const int weights_each_;  // tensors in `weights` of each recurrence
  const OptionalTensor& batch_sizes_;
  int recurrences_;  // R
  bool packed_;
  int64_t steps_, batch_, hidden_;
  int64_t rows_;  // N
  std::vector<int64_t> offsets_;
  Tensor x_, y_, h_n_, c_n_;
  std::optional<Input<S>> h0_, c0_;
  std::deque<Input<S>> input_projections_;
  std::vector<Input<S>> weights_;                     // weights_each_ for each recurrence, in the order of `weights`
  std::vector<std::optional<Tensor>> layer_outputs_;  // of all layers but the last
  std::optional<Tensor> direction_outputs_[2];        // of one layer at a time
  std::vector<RecurrenceForwardParams<S>> params_;    // of each recurrence
  std::deque<PackedRnnWeights<S>> packed_weights_;    // of each recurrence
  std::optional<Workspace<Compute<S>>> workspace_;
};

}  // namespace llm_ext
