// The only file of this project that includes torch headers.
//
// Everything is built against the libtorch stable ABI (TORCH_STABLE_ONLY and
// TORCH_TARGET_VERSION come from the command line), so one binary serves every
// torch from the target version on. Including <ATen/ATen.h> does not compile.
#pragma once

// libtorch's C shim declares its CUDA functions for who asks for them by this name.
#if defined(__CUDACC__) && !defined(USE_CUDA)
#define USE_CUDA
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#if !defined(TORCH_STABLE_ONLY) || !defined(TORCH_TARGET_VERSION)
#error "build with -DTORCH_STABLE_ONLY -DTORCH_TARGET_VERSION=..., see setup.py"
#endif

namespace swa_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// Arithmetic type of a pair: fp64 as soon as one side is fp64, else fp32. One conversion at load,
// one rounding at store.
template <typename Average, typename Source>
using opmath_t =
    std::conditional_t<std::is_same_v<Average, double> || std::is_same_v<Source, double>, double,
                       float>;

// Calls f(T{}) with the C++ type of `type`, of an argument of `op`. The schema's Python front
// checks dtypes and names the tensor; the message here is the backstop for callers of the raw op.
template <typename F>
void dispatch_floating(const char* op, ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(false, op,
                      ": expected float32, float64, bfloat16 or float16, found dtype code ",
                      static_cast<int>(type));
  }
}

#ifdef __CUDACC__
// torch's current stream on a CUDA device, on which everything of ours is launched.
//
// The C++ front of the stable ABI gives the handle since torch 2.13 only, the C shim always did.
// The shim's function lies in libtorch_cuda, which a torch without CUDA does not have: setup.py
// says how it is found at load time.
inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  const AOTITorchError status = aoti_torch_get_current_cuda_stream(device_index, &stream);
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS,
                  "torch gives no current stream for cuda:", device_index);
  return static_cast<cudaStream_t>(stream);
}
#endif

}  // namespace swa_fast
