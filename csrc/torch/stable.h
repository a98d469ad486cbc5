// The only file that includes torch's headers. They are those of its stable ABI, so that one binary runs on every torch
// from 2.11 on.
#pragma once

// Defined here and not with -D, because torch's own build flags must not see it.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

// The C shim declares its CUDA functions only if this is defined.
#if defined(LLM_EXT_CUDA_VERSION) && !defined(USE_CUDA)
#define USE_CUDA
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#ifdef USE_CUDA
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
