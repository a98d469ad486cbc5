// The contracts of additive attention's launchers on NVIDIA GPUs. Plain C++: no CUDA header is needed.
//
// Launchers take the params of params/attention.h and queue all work of an op on a stream without waiting. Lengths and
// masks are read by kernels alone; lengths out of range are clamped. Launchers return a cudaError_t (0: queued) and
// clear CUDA's last error. Pointers are to memory of the current device; tensors and workspace are aligned to 16 bytes.
// The same input, slab and device give the same bits. All exist for S = float, double, BFloat16, Float16.
#pragma once

#include <cstdint>

#include "params/attention.h"

namespace llm_ext {
namespace cuda {

// Rows of queries or keys per block: 8 or 32, whichever wastes less; 1 for one query, which has kernels of its own.
constexpr int kMaxAdditiveRows = 32;
int additive_rows(int64_t count);

// Queries per batch row whose scores are in the workspace at once: all, or a multiple of 32 for which scores take no
// more memory than queries and keys.
int64_t additive_slab(int64_t queries, int64_t keys, int64_t attn_dim);

// The sections of a call's workspace. If begin is nullptr, only `elements` is meaningful.
template <typename S>
struct AdditiveWorkspace {
  Compute<S>* scores;      // [B, slab, Tk]
  Compute<S>* gradients;   // [B, slab, Tk] backward
  Compute<S>* dv;          // [B, tiles of queries, A] backward
  Compute<S>* key_sums;    // [B, Tk, A] backward, with several slabs
  Compute<S>* value_sums;  // [B, Tk, Dv] backward, with several slabs
  bool* seen;              // [B, Tk] with a mask per query
  int64_t elements;        // of Compute<S>, in total

  AdditiveWorkspace(const AdditiveAttentionInput<S>& in, int64_t slab, bool backward, Compute<S>* begin) : elements(0) {
    const auto append = [&](int64_t count) {
      Compute<S>* section = begin == nullptr ? nullptr : begin + elements;
      elements += count;
      return section;
    };
    const int64_t rows = additive_rows(in.queries);
    const bool several = backward && slab < in.queries;
    scores = append(in.batch * slab * in.keys);
    gradients = append(backward ? in.batch * slab * in.keys : 0);
    dv = append(backward ? in.batch * ((in.queries + rows - 1) / rows) * in.attn_dim : 0);
    key_sums = append(several ? in.batch * in.keys * in.attn_dim : 0);
    value_sums = append(several ? in.batch * in.keys * in.value_dim : 0);
    const bool by_query = in.mask != nullptr && in.mask_query_stride != 0;
    const int64_t each = static_cast<int64_t>(sizeof(Compute<S>));
    seen = reinterpret_cast<bool*>(append(by_query ? (in.batch * in.keys + each - 1) / each : 0));
  }
};

// The workspace is that of the same slab and pass. Any size may be 0.
template <typename S>
int additive_attention_forward(const AdditiveAttentionForwardParams<S>& params, int64_t slab, void* stream);
template <typename S>
int additive_attention_backward(const AdditiveAttentionBackwardParams<S>& params, int64_t slab, void* stream);

}  // namespace cuda
}  // namespace llm_ext
