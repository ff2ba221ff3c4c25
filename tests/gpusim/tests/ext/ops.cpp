#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "kernels.h"
using at::Tensor;
static cudaStream_t st() { return c10::cuda::getCurrentCUDAStream(); }
#define F(t) (t).data_ptr<float>()
static Tensor op_vadd(const Tensor& a, const Tensor& b) {
  c10::cuda::CUDAGuard g(a.device());
  Tensor o = at::empty_like(a);
  vadd(F(a), F(b), F(o), a.numel(), st());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return o;
}
static void op_axpy4(const Tensor& x, Tensor& y, double a) {
  axpy4(F(x), F(y), a, x.numel(), st());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
static void op_lerp(at::TensorList d, at::TensorList s, double w) {
  LerpTable t{};
  int nt = 0, nb = 0;
  auto go = [&] {
    if (nb) {
      lerp(t, nb, w, st());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    nt = nb = 0;
  };
  for (size_t i = 0; i < d.size(); ++i) {
    if (nt == LERP_MAX) go();
    t.dst[nt] = F(d[i]);
    t.src[nt] = F(s[i]);
    t.n[nt] = d[i].numel();
    for (int c = 0; c * (int64_t)LERP_CHUNK < d[i].numel(); ++c) {
      t.block_tensor[nb] = nt;
      t.block_chunk[nb] = c;
      if (++nb == LERP_BLOCKS) {
        auto k = t;
        lerp(t, nb, w, st());
        nb = 0;
        int last = nt;
        t = k;
        t.dst[0] = k.dst[last];
        t.src[0] = k.src[last];
        t.n[0] = k.n[last];
        nt = 0;
      }
    }
    ++nt;
  }
  go();
}
static void op_lerp_table(const Tensor& table, double w) {
  lerp_table((const long long*)table.data_ptr<int64_t>(), table.size(0), w, st());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
static std::tuple<Tensor, Tensor> op_welford(const Tensor& x) {
  Tensor m = at::zeros({x.size(1)}, x.options()), v = at::empty({x.size(1)}, x.options());
  welford(F(x), F(m), F(v), x.size(0), x.size(1), x.size(2), st());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {m, v};
}
static Tensor op_norm(const Tensor& x, int64_t blocks) {
  Tensor p = at::empty({blocks}, x.options()), o = at::empty({}, x.options());
  norm(F(x), F(p), F(o), x.numel(), blocks, st());
  return o;
}
static Tensor op_sumsq(const Tensor& x) {
  Tensor o = at::zeros({}, x.options());
  sumsq(F(x), F(o), x.numel(), st());
  return o;
}
static std::tuple<Tensor, Tensor, Tensor> op_halfs(const Tensor& x) {
  Tensor b = at::empty_like(x, x.options().dtype(at::kBFloat16)),
         h = at::empty_like(x, x.options().dtype(at::kHalf)), k = at::empty_like(x);
  halfs(F(x), b.data_ptr(), h.data_ptr(), F(k), x.numel(), st());
  return {b, h, k};
}
static void op_oob(Tensor& x) { oob(F(x), x.numel(), st()); }
static void op_race(Tensor& x) { race(F(x), st()); }
static void op_divergent(Tensor& x) { divergent(F(x), st()); }
static std::tuple<Tensor, Tensor, Tensor> op_math(const Tensor& x) {
  int64_t n = x.numel();
  Tensor o = at::empty({n, 8}, x.options()), d = at::empty({n}, x.options().dtype(at::kDouble)),
         i = at::empty({n, 4}, x.options().dtype(at::kInt));
  mathfn(F(x), F(o), d.data_ptr<double>(), i.data_ptr<int>(), n, st());
  return {o, d, i};
}
static Tensor op_local(const Tensor& x, int64_t k, int64_t n) {
  Tensor o = at::empty({64}, x.options());
  local(F(x), F(o), k, n, st());
  return o;
}
TORCH_LIBRARY(gpusim_test, m) {
  m.def("vadd(Tensor a, Tensor b) -> Tensor");
  m.def("axpy4(Tensor x, Tensor(a!) y, float a) -> ()");
  m.def("lerp(Tensor(a!)[] d, Tensor[] s, float w) -> ()");
  m.def("lerp_table(Tensor t, float w) -> ()");
  m.def("welford(Tensor x) -> (Tensor, Tensor)");
  m.def("norm(Tensor x, int blocks) -> Tensor");
  m.def("sumsq(Tensor x) -> Tensor");
  m.def("halfs(Tensor x) -> (Tensor, Tensor, Tensor)");
  m.def("oob(Tensor(a!) x) -> ()");
  m.def("race(Tensor(a!) x) -> ()");
  m.def("divergent(Tensor(a!) x) -> ()");
  m.def("math(Tensor x) -> (Tensor, Tensor, Tensor)");
  m.def("local(Tensor x, int k, int n) -> Tensor");
}
TORCH_LIBRARY_IMPL(gpusim_test, CUDA, m) {
  m.impl("vadd", op_vadd);
  m.impl("axpy4", op_axpy4);
  m.impl("lerp", op_lerp);
  m.impl("lerp_table", op_lerp_table);
  m.impl("welford", op_welford);
  m.impl("norm", op_norm);
  m.impl("sumsq", op_sumsq);
  m.impl("halfs", op_halfs);
  m.impl("oob", op_oob);
  m.impl("race", op_race);
  m.impl("divergent", op_divergent);
  m.impl("math", op_math);
  m.impl("local", op_local);
}
