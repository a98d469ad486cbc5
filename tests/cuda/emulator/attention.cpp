// Runs an attention op of a request, once per seed: forward, and backward with the given gradients. Results must have
// the same bits in every order of the threads.
#include "cuda/attention/launchers.h"
#include "cuda/device.cuh"
#include "cuda/pooling/launchers.h"
#include "device.h"
#include "outputs.h"

namespace {

using namespace llm_ext;
using namespace llm_ext::cuda;
using emulator::expect;
using emulator::Outputs;
using emulator::Records;

template <typename T>
class Workspace {
 public:
  explicit Workspace(int64_t elements) {
    if (elements > 0) data_ = emulator::device_memory(static_cast<size_t>(elements) * sizeof(T));
  }
  ~Workspace() {
    if (data_ != nullptr) emulator::free_device_memory(data_);
  }
  T* data() const { return static_cast<T*>(data_); }

 private:
  void* data_ = nullptr;
};

template <typename S>
PoolInput<S> pool_input(const Records& request) {
  PoolInput<S> in = {};
  in.batch = request.number("batch");
  in.steps = request.number("steps");
  in.dim = request.number("dim");
  in.e = request.data<const S>("e");
  const bool time_major = request.number("time_major") != 0;
  in.e_batch_stride = time_major ? in.dim : in.steps * in.dim;
  in.e_step_stride = time_major ? in.batch * in.dim : in.dim;
  in.u = request.data<const S>("u");
  in.scores = request.data<const S>("scores");
  in.lengths = request.data<const int64_t>("lengths");
  in.mask = request.data<const bool>("mask");
  return in;
}

template <typename S>
PoolPlan pool_plan(const Records& request, bool forward) {
  if (!request.has("packs")) {
    DeviceFacts facts;
    query_device(0, &facts);
    const auto make = forward                     ? make_pool_plan
                      : request.number("op") == 1 ? make_prefix_gradient_plan
                                                  : make_pool_gradient_plan;
    return make(request.number("batch"), request.number("steps"), request.number("dim"), sizeof(S), facts);
  }
  PoolPlan plan;  // a given plan instead of make_pool_plan()'s
  plan.packs = static_cast<int>(request.number("packs"));
  plan.group_threads = static_cast<int>(request.number("group_threads"));
  plan.chunk = request.number("chunk");
  plan.chunks = (request.number("steps") + plan.chunk - 1) / plan.chunk;
  if (plan.chunks == 0) plan.chunks = 1;
  if (!forward && request.number("slot") > 0) {
    plan.slot = request.number("slot");
    plan.chunk = request.number("steps");
    plan.chunks = 1;
  }
  return plan;
}

template <typename S>
void pool(const Records& request, Outputs& out) {
  using T = Compute<S>;
  const PoolInput<S> in = pool_input<S>(request);
  const PoolPlan forward_plan = pool_plan<S>(request, true), plan = pool_plan<S>(request, false);
  S* c = out.add<S>("c", in.batch * in.dim);
  T* lse = out.add<T>("lse", in.batch);
  auto* l = reinterpret_cast<LogSum<T>*>(out.add<T>("l", 2 * in.batch));
  {
    const Workspace<T> workspace(pool_forward_workspace(in.batch, in.steps, in.dim, forward_plan));
    expect(pool_forward<S>({in, c, lse, l, workspace.data()}, forward_plan, nullptr), "pool_forward");
  }
  PoolBackwardParams<S> p = {};
  p.in = in;
  p.c = c;
  p.l = l;
  p.grad_c = request.data<const S>("grad_c");
  p.grad_lse = request.data<const T>("grad_lse");
  if (request.number("need", 1) != 0) p.de = out.add<S>("de", in.batch * in.steps * in.dim);
  if (in.u != nullptr) p.du = out.add<S>("du", in.dim);
  if (in.scores != nullptr) p.dscores = out.add<S>("dscores", in.batch * in.steps);
  const Workspace<T> workspace(pool_backward_workspace(in.batch, in.steps, in.dim, plan));
  p.workspace = workspace.data();
  expect(pool_backward<S>(p, plan, nullptr), "pool_backward");
}

template <typename S>
void prefix_pool(const Records& request, Outputs& out) {
  using T = Compute<S>;
  PoolInput<S> in = pool_input<S>(request);
  const PoolPlan forward_plan = pool_plan<S>(request, true), plan = pool_plan<S>(request, false);
  const T* c0 = request.data<const T>("c0");
  S* c = out.add<S>("c", in.batch * in.steps * in.dim);
  T* share = out.add<T>("share", in.batch * in.steps);
  auto* l_n = reinterpret_cast<LogSum<T>*>(out.add<T>("l_n", 2 * in.batch));
  T* c_n = out.add<T>("c_n", in.batch * in.dim);
  {
    const Workspace<T> workspace(prefix_pool_forward_workspace(in.batch, in.steps, in.dim, forward_plan));
    const auto* l0 = reinterpret_cast<const LogSum<T>*>(request.data<const T>("l0"));
    expect(prefix_pool_forward<S>({in, l0, c0, c, share, l_n, c_n, workspace.data()}, forward_plan, nullptr),
           "prefix_pool_forward");
  }
  const bool scored = in.scores != nullptr;
  in.scores = nullptr;
  in.lengths = nullptr;
  in.mask = nullptr;
  PrefixPoolBackwardParams<S> p = {};
  p.in = in;
  p.c0 = c0;
  p.c = c;
  p.share = share;
  p.grad_c = request.data<const S>("grad_c");
  p.grad_l_n = request.data<const T>("grad_l_n");
  p.grad_c_n = request.data<const T>("grad_c_n");
  if (request.number("need", 1) != 0) p.de = out.add<S>("de", in.batch * in.steps * in.dim);
  if (in.u != nullptr) p.du = out.add<S>("du", in.dim);
  if (scored) p.dscores = out.add<S>("dscores", in.batch * in.steps);
  if (c0 != nullptr) {
    p.dl0 = out.add<T>("dl0", in.batch);
    p.dc0 = out.add<T>("dc0", in.batch * in.dim);
  }
  const Workspace<T> workspace(prefix_pool_backward_workspace(in.batch, in.steps, in.dim, plan));
  p.workspace = workspace.data();
  expect(prefix_pool_backward<S>(p, plan, nullptr), "prefix_pool_backward");
}

template <typename S>
void additive_attention(const Records& request, Outputs& out) {
  using T = Compute<S>;
  AdditiveAttentionInput<S> in = {};
  in.batch = request.number("batch");
  in.queries = request.number("queries");
  in.keys = request.number("keys");
  in.attn_dim = request.number("attn_dim");
  in.value_dim = request.number("value_dim");
  in.query = request.data<const S>("query");
  in.key = request.data<const S>("key");
  in.v = request.data<const S>("v");
  in.values = request.data<const S>("values");
  in.key_lengths = request.data<const int64_t>("key_lengths");
  in.mask = request.data<const bool>("mask");
  const bool by_query = request.number("by_query") != 0;
  in.mask_batch_stride = by_query ? in.queries * in.keys : in.keys;
  in.mask_query_stride = by_query ? in.keys : 0;
  const int64_t slab = request.number("slab", additive_slab(in.queries, in.keys, in.attn_dim));

  AdditiveAttentionForwardParams<S> forward = {};
  forward.in = in;
  forward.context = out.add<S>("context", in.batch * in.queries * in.value_dim);
  forward.weights = out.add<S>("weights", in.batch * in.queries * in.keys);
  {
    const Workspace<T> workspace(AdditiveWorkspace<S>(in, slab, false, nullptr).elements);
    forward.workspace = workspace.data();
    expect(additive_attention_forward<S>(forward, slab, nullptr), "additive_attention_forward");
  }
  AdditiveAttentionBackwardParams<S> backward = {};
  backward.in = in;
  backward.grad_context = request.data<const S>("grad_context");
  backward.grad_weights = request.data<const S>("grad_weights");
  const auto add = [&](const char* name, int64_t count) {
    return request.number(std::string("need_") + name, 1) != 0 ? out.add<S>(name, count) : nullptr;
  };
  backward.dquery = add("dquery", in.batch * in.queries * in.attn_dim);
  backward.dkey = add("dkey", in.batch * in.keys * in.attn_dim);
  backward.dv = add("dv", in.attn_dim);
  backward.dvalues = add("dvalues", in.batch * in.keys * in.value_dim);
  const Workspace<T> workspace(AdditiveWorkspace<S>(in, slab, true, nullptr).elements);
  backward.workspace = workspace.data();
  expect(additive_attention_backward<S>(backward, slab, nullptr), "additive_attention_backward");
}

template <typename S>
void run_all(const Records& request, emulator::Answer& answer) {
  emulator::in_every_order(request, answer, {}, [&](Outputs& outputs, int64_t, int64_t) {
    switch (request.number("op")) {
      case 0:
        return pool<S>(request, outputs);
      case 1:
        return prefix_pool<S>(request, outputs);
      default:
        return additive_attention<S>(request, outputs);
    }
  });
}

// The plans of pooling: B, T, D, bytes of an element, multiprocessors, shared memory of a block; and the slabs
// of additive attention: Tq, Tk, A.
void plans(const Records& request, emulator::Answer& answer) {
  const int64_t* problem = request.data<const int64_t>("pools");
  for (size_t i = 0; i < request.bytes("pools") / (6 * sizeof(int64_t)); ++i, problem += 6) {
    DeviceFacts facts;
    facts.sm_count = static_cast<int>(problem[4]);
    facts.shared_bytes = problem[5];
    const int64_t bytes = problem[3];
    const std::pair<const char*, decltype(&make_pool_plan)> kinds[] = {
        {"pool", make_pool_plan}, {"pool_gradient", make_pool_gradient_plan}, {"gradient", make_prefix_gradient_plan}};
    for (const auto& [name, make] : kinds) {
      const PoolPlan plan = make(problem[0], problem[1], problem[2], bytes, facts);
      const SlotsLayout layout = slots_layout(plan, problem[2], static_cast<int>(bytes), bytes == 8 ? 8 : 4);
      const int64_t shared = plan.slot > 0 ? layout.sums + kPoolThreads / plan.group_threads * layout.group : 0;
      const int64_t numbers[] = {plan.packs, plan.group_threads, plan.chunk, plan.chunks, plan.slot, shared};
      answer.add(name + std::to_string(i), numbers, sizeof numbers);
    }
  }
  problem = request.data<const int64_t>("slabs");
  for (size_t i = 0; i < request.bytes("slabs") / (3 * sizeof(int64_t)); ++i, problem += 3) {
    answer.number("slab" + std::to_string(i), additive_slab(problem[0], problem[1], problem[2]));
  }
}

}  // namespace

int main(int, char** arguments) {
  const Records request(arguments[1]);
  emulator::Answer answer(arguments[2]);
  if (request.has("pools")) {
    plans(request, answer);
    return 0;
  }
  emulator::device.sm_count = static_cast<int>(request.number("sm_count", 132));
  emulator::device.shared_bytes = request.number("shared_bytes", 227 * 1024);
  switch (request.number("type")) {
    case 0:
      run_all<float>(request, answer);
      break;
    case 1:
      run_all<double>(request, answer);
      break;
    case 2:
      run_all<BFloat16>(request, answer);
      break;
    default:
      run_all<Float16>(request, answer);
      break;
  }
}
