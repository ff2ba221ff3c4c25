// Torch's own CUDA operators, executed on the CPU over the same memory.
//
// Every aten operator that has a CUDA kernel gets a boxed kernel in its place: CUDA tensors in the
// arguments become CPU tensors over the same bytes, the CPU kernel runs, and new results are moved
// to new CUDA tensors.  Being dispatcher kernels, they are reached from every thread, from
// autograd, and from C++ code of extensions.  Operators of other namespaces keep their real CUDA
// implementation.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <functional>
#include <set>

extern "C" {
void gpusim_count(const char*, unsigned long long);
void gpusim_count_aten(const char*);
int gpusim_capturing(void*);
void gpusim_record(void*, const char*, std::function<void()>*);
}
using at::Tensor;
using c10::IValue;
typedef torch::jit::Stack Stack;
namespace {

cudaStream_t cur() { return c10::cuda::getCurrentCUDAStream(0).stream(); }
void host_sync() {
  c10::cuda::stream_synchronize(cur());
}  // honours torch.cuda.set_sync_debug_mode

struct Aliases {  // CUDA storage <-> CPU storage of one call
  std::vector<std::pair<c10::Storage, c10::Storage>> m;
  c10::Storage cpu_of(const c10::Storage& s) {
    for (auto& p : m)
      if (p.first.unsafeGetStorageImpl() == s.unsafeGetStorageImpl()) return p.second;
    c10::Storage c(c10::Storage::use_byte_size_t(), s.nbytes(),
                   at::DataPtr(const_cast<void*>(s.data()), c10::Device(c10::kCPU)), nullptr,
                   false);
    m.push_back({s, c});
    return c;
  }
  const c10::Storage* cuda_of(const c10::Storage& c) {
    for (auto& p : m)
      if (p.second.unsafeGetStorageImpl() == c.unsafeGetStorageImpl()) return &p.first;
    return nullptr;
  }
  Tensor alias(const Tensor& t) {
    if (!t.defined() || !t.is_cuda()) return t;
    TORCH_CHECK(t.layout() == c10::kStrided, "gpusim: only strided CUDA tensors are supported");
    Tensor r = at::detail::make_tensor<c10::TensorImpl>(
        cpu_of(t.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
    r.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.unsafeGetTensorImpl()->is_wrapped_number())
      r.unsafeGetTensorImpl()->set_wrapped_number(true);
    return r;
  }
};
Tensor alias1(const Tensor& t) {
  Aliases a;
  return a.alias(t);
}

Tensor to_cuda(const Tensor& t, Aliases& al) {
  if (!t.defined() || !t.device().is_cpu()) return t;
  if (t.has_storage())
    if (auto* s = al.cuda_of(t.storage())) {  // a view of an argument
      Tensor r = at::detail::make_tensor<c10::TensorImpl>(
          c10::Storage(*s), c10::DispatchKeySet(c10::DispatchKey::CUDA), t.dtype());
      r.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
      return r;
    }
  auto opt =
      t.options().device(c10::Device(c10::kCUDA, 0)).pinned_memory(false).requires_grad(false);
  Tensor r = t.is_non_overlapping_and_dense() ? at::empty_strided(t.sizes(), t.strides(), opt)
                                              : at::empty(t.sizes(), opt);
  if (t.numel()) alias1(r).copy_(t);
  return r;
}
at::Generator cpu_generator(const std::optional<at::Generator>& g) {
  auto* c = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      g, at::cuda::detail::getDefaultCUDAGenerator());
  std::lock_guard<std::mutex> lock(c->mutex_);
  uint64_t seed = c->current_seed(), off = c->philox_offset_per_thread();
  c->set_philox_offset_per_thread(off + 4);
  uint64_t x = seed * 0x9E3779B97F4A7C15ull + off * 0xBF58476D1CE4E5B9ull + 1;
  x ^= x >> 31;
  x *= 0x94D049BB133111EBull;
  x ^= x >> 29;
  return at::detail::createCPUGenerator(x);
}
IValue convert(const IValue& v, Aliases& al) {
  if (v.isTensor()) return al.alias(v.toTensor());
  if (v.isTensorList()) {
    c10::List<Tensor> out;
    for (const Tensor& t : v.toTensorVector()) out.push_back(al.alias(t));
    return out;
  }
  if (v.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> out;
    for (const std::optional<Tensor>& t : v.toOptionalTensorList())
      out.push_back(t ? std::optional<Tensor>(al.alias(*t)) : std::nullopt);
    return out;
  }
  if (v.isDevice() && v.toDevice().is_cuda()) return c10::Device(c10::kCPU);
  if (v.isGenerator()) return cpu_generator(v.toGenerator());
  return v;
}
const std::set<std::string> kSyncing = {"aten::nonzero",
                                        "aten::nonzero.out",
                                        "aten::equal",
                                        "aten::masked_select",
                                        "aten::masked_select.out",
                                        "aten::_unique2",
                                        "aten::_unique",
                                        "aten::unique_consecutive",
                                        "aten::unique_dim",
                                        "aten::unique_dim_consecutive",
                                        "aten::repeat_interleave.Tensor",
                                        "aten::bincount"};

std::string op_name(const c10::OperatorHandle& op) {
  auto& n = op.operator_name();
  return n.overload_name.empty() ? n.name : n.name + "." + n.overload_name;
}

struct RestoreCPUGenerator {  // for random ops without a generator argument
  at::Generator g = at::detail::getDefaultCPUGenerator();
  Tensor saved;
  RestoreCPUGenerator() {
    saved = g.get_state();
    g.set_current_seed(cpu_generator(std::nullopt).current_seed());
  }
  ~RestoreCPUGenerator() { g.set_state(saved); }
};
void run_cpu(const c10::OperatorHandle& op, Stack* st, bool reseed) {
  at::AutoDispatchBelowADInplaceOrView guard;
  std::optional<RestoreCPUGenerator> r;
  if (reseed) r.emplace();
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), st);
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const auto& schema = op.schema();
  std::string name = op_name(op);
  gpusim_count_aten(name.c_str());
  TORCH_CHECK_NOT_IMPLEMENTED(op.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU),
                              "gpusim: ", name,
                              " has no CPU implementation, so the simulator cannot run it");
  if (kSyncing.count(name)) host_sync();
  size_t n = schema.arguments().size(), base = stack->size() - n;
  auto al = std::make_shared<Aliases>();
  std::vector<IValue> orig(stack->begin() + base, stack->end());
  Stack call;
  call.reserve(n);
  bool has_gen = false, writes = false;
  std::vector<std::pair<size_t, Tensor>> temps;  // out= arguments to be resized
  std::vector<Tensor> written;
  for (size_t i = 0; i < n; ++i) {
    auto& a = schema.arguments()[i];
    const IValue& v = orig[i];
    bool w = a.alias_info() && a.alias_info()->isWrite();
    writes |= w;
    if (a.type()->str().find("Generator") != std::string::npos) {
      has_gen = true;
      call.push_back(cpu_generator(v.isGenerator() ? std::optional<at::Generator>(v.toGenerator())
                                                   : std::nullopt));
      continue;
    }
    if (w && a.is_out() && v.isTensor() && v.toTensor().is_cuda() && v.toTensor().numel() == 0) {
      Tensor t = at::empty({0}, v.toTensor().options().device(c10::kCPU));
      temps.push_back({i, t});
      call.push_back(t);
      continue;
    }
    if (v.isNone() && a.name() == "device") {
      call.push_back(c10::Device(c10::kCPU));
      continue;
    }
    call.push_back(convert(v, *al));
    if (w || name.find("batch_norm") != std::string::npos) {
      if (call.back().isTensor() && call.back().toTensor().defined())
        written.push_back(call.back().toTensor());
      else if (w && call.back().isTensorList())
        for (const Tensor& t : call.back().toTensorVector()) written.push_back(t);
    }
  }
  stack->resize(base);
  bool reseed = !has_gen && op.hasTag(at::Tag::nondeterministic_seeded);
  bool capturing = gpusim_capturing(cur());
  bool fresh = false;  // results that are not arguments
  for (auto& r : schema.returns())
    if (!(r.alias_info() && r.alias_info()->isWrite())) fresh = true;
  Stack keep;
  if (capturing) keep = call;
  std::vector<Tensor> saved;
  Stack res;
  if (!capturing || fresh || !temps.empty()) {
    if (capturing)
      for (auto& t : written) saved.push_back(t.clone());
    run_cpu(op, &call, reseed);
    res = std::move(call);
    if (capturing)
      for (size_t i = 0; i < written.size(); ++i) written[i].copy_(saved[i]);
  }
  for (auto& t : temps) {
    Tensor o = orig[t.first].toTensor();
    o.resize_(t.second.sizes());
    if (t.second.numel()) alias1(o).copy_(t.second);
  }
  std::vector<Tensor> outs;  // CPU aliases of the fresh results, in order, for replay
  auto finish = [&](const Tensor& t) {
    Tensor c = to_cuda(t, *al);
    if (capturing) outs.push_back(c.defined() && c.is_cuda() ? alias1(c) : Tensor());
    return c;
  };
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    auto* ai = schema.returns()[i].alias_info();
    if (ai && ai->isWrite()) {
      bool found = false;
      for (size_t j = 0; j < n && !found; ++j) {
        auto* aj = schema.arguments()[j].alias_info();
        if (aj && aj->isWrite() && aj->beforeSets() == ai->beforeSets()) {
          stack->push_back(orig[j]);
          found = true;
        }
      }
      TORCH_CHECK(found, "gpusim: cannot match a result of ", name);
      continue;
    }
    const IValue& v = res[i];
    if (v.isTensor())
      stack->push_back(finish(v.toTensor()));
    else if (v.isTensorList()) {
      c10::List<Tensor> l;
      for (const Tensor& t : v.toTensorVector()) l.push_back(finish(t));
      stack->push_back(l);
    } else
      stack->push_back(v);
  }
  if (capturing) {
    auto args = std::make_shared<Stack>(keep);
    std::function<void()> f = [op, args, outs, reseed, al] {
      Stack s = *args;
      run_cpu(op, &s, reseed);
      size_t k = 0;
      at::AutoDispatchBelowADInplaceOrView guard;
      auto put = [&](const Tensor& t) {
        if (k < outs.size()) {
          if (outs[k].defined() && t.defined() && t.numel() && t.data_ptr() != outs[k].data_ptr())
            const_cast<Tensor&>(outs[k]).copy_(t);
          ++k;
        }
      };
      for (size_t i = 0; i < op.schema().returns().size(); ++i) {
        auto* ai = op.schema().returns()[i].alias_info();
        if (ai && ai->isWrite()) continue;
        if (s[i].isTensor())
          put(s[i].toTensor());
        else if (s[i].isTensorList())
          for (const Tensor& t : s[i].toTensorVector()) put(t);
      }
    };
    gpusim_record(cur(), name.c_str(), &f);
  }
}

// ---------------------------------------------------------------- special cases
void raw_copy(void* d, const void* s, size_t n, cudaMemcpyKind k, bool sync) {
  if (n) C10_CUDA_CHECK(cudaMemcpyAsync(d, s, n, k, cur()));
  if (sync) host_sync();
}
void on_device(const char* name,
               std::function<void()> f) {  // a device op of torch's that is not a plain fallback
  if (gpusim_capturing(cur()))
    gpusim_record(cur(), name, &f);
  else
    f();
}
Tensor& copy_(Tensor& self, const Tensor& src, bool non_blocking) {
  if (self.is_same(src)) return self;
  TORCH_CHECK(self.defined() && src.defined());
  if (self.sizes() != src.sizes()) {
    Tensor e = src.expand(self.sizes());
    return copy_(self, e, non_blocking);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  if (self.numel() == 0) return self;
  auto dense = [&](const Tensor& a, const Tensor& b) {
    return a.dtype() == b.dtype() && a.is_non_overlapping_and_dense() && a.strides() == b.strides();
  };
  auto plain = [](const Tensor& t) { return !t.is_conj() && !t.is_neg(); };
  bool direct = dense(self, src) && plain(self) && plain(src);
  if (self.is_cuda() && src.is_cuda()) {
    if (direct) {
      raw_copy(self.mutable_data_ptr(), src.const_data_ptr(), self.nbytes(),
               cudaMemcpyDeviceToDevice, false);
      return self;
    }
    gpusim_count_aten("aten::copy_");
    Tensor d = alias1(self), s = alias1(src);
    on_device("copy_", [d, s]() mutable {
      at::AutoDispatchBelowADInplaceOrView g;
      d.copy_(s);
    });
    return self;
  }
  if (self.is_cuda()) {  // host to device
    TORCH_CHECK(src.device().is_cpu(), "gpusim: copy from ", src.device());
    TORCH_CHECK(
        !gpusim_capturing(cur()) || src.is_pinned(),
        "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor "
        "is pinned. Please use tensor.pin_memory() or allocate the tensor with pin_memory=True.");
    if (direct) {
      raw_copy(self.mutable_data_ptr(), src.const_data_ptr(), self.nbytes(), cudaMemcpyHostToDevice,
               !non_blocking);
      return self;
    }
    Tensor s = src.to(self.scalar_type()).contiguous();
    Tensor t = self.is_contiguous() ? self : at::empty(self.sizes(), self.options());
    raw_copy(t.mutable_data_ptr(), s.const_data_ptr(), t.nbytes(), cudaMemcpyHostToDevice, true);
    if (!t.is_same(self)) {
      gpusim_count_aten("aten::copy_");
      alias1(self).copy_(alias1(t));
    }
    return self;
  }
  TORCH_CHECK(self.device().is_cpu(), "gpusim: copy to ", self.device());
  TORCH_CHECK(
      !gpusim_capturing(cur()) || self.is_pinned(),
      "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is "
      "pinned. Please use tensor.pin_memory() or allocate the tensor with pin_memory=True.");
  if (direct) {
    raw_copy(self.mutable_data_ptr(), src.const_data_ptr(), self.nbytes(), cudaMemcpyDeviceToHost,
             !non_blocking);
    return self;
  }
  Tensor s = alias1(src).contiguous();
  Tensor t = src;
  if (!src.is_contiguous()) {
    gpusim_count_aten("aten::copy_");
    t = at::empty(src.sizes(), src.options());
    alias1(t).copy_(s);
  }
  Tensor h = at::empty(src.sizes(), src.options().device(c10::kCPU));
  raw_copy(h.mutable_data_ptr(), t.const_data_ptr(), h.nbytes(), cudaMemcpyDeviceToHost, true);
  self.copy_(h);
  return self;
}
at::Scalar local_scalar(const Tensor& self) {
  gpusim_count_aten("aten::_local_scalar_dense");
  Tensor h = at::empty({}, self.options().device(c10::kCPU).pinned_memory(false));
  cudaStreamCaptureStatus st;
  C10_CUDA_CHECK(cudaStreamIsCapturing(cur(), &st));
  if (st != cudaStreamCaptureStatusNone) host_sync();  // raises
  raw_copy(h.mutable_data_ptr(), self.const_data_ptr(), self.element_size(), cudaMemcpyDeviceToHost,
           true);
  return h.item();
}
std::tuple<Tensor, Tensor, Tensor, Tensor> cudnn_bn(const Tensor& x, const Tensor& w,
                                                    const std::optional<Tensor>& b,
                                                    const std::optional<Tensor>& rm,
                                                    const std::optional<Tensor>& rv, bool train,
                                                    double mom, double eps) {
  auto r = at::native_batch_norm(x, w, b, rm, rv, train, mom, eps);
  return {std::get<0>(r), std::get<1>(r), std::get<2>(r),
          at::empty({0}, x.options().dtype(at::kByte))};
}
std::tuple<Tensor, Tensor, Tensor> cudnn_bn_backward(
    const Tensor& x, const Tensor& g, const Tensor& w, const std::optional<Tensor>& rm,
    const std::optional<Tensor>& rv, const std::optional<Tensor>& sm,
    const std::optional<Tensor>& sv, double eps, const Tensor&) {
  return at::native_batch_norm_backward(g, x, w, rm, rv, sm, sv, true, eps, {true, true, true});
}

struct Quiet : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};
}  // namespace

// names: aten operators that have a CUDA kernel ("add.Tensor")
extern "C" int gpusim_install(const char** names, int n) {
  Quiet q;
  c10::WarningUtils::WarningHandlerGuard guard(&q);
  auto* lib =
      new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  static const std::set<std::string> keep = {"empty.memory_format",
                                             "empty_strided",
                                             "resize_",
                                             "record_stream",
                                             "_pin_memory",
                                             "is_pinned",
                                             "is_set_to",
                                             "_cudnn_init_dropout_state",
                                             "copy_",
                                             "_local_scalar_dense",
                                             "cudnn_batch_norm",
                                             "cudnn_batch_norm_backward",
                                             "_fused_sdp_choice",
                                             "cudnn_is_acceptable",
                                             "convolution",
                                             "_efficientzerotensor"};
  int done = 0;
  for (int i = 0; i < n; ++i) {
    std::string s = names[i];
    if (keep.count(s) || s.rfind("set_", 0) == 0) continue;
    auto dot = s.find('.');
    auto h = c10::Dispatcher::singleton().findSchema(
        {"aten::" + s.substr(0, dot), dot == std::string::npos ? "" : s.substr(dot + 1)});
    if (!h) continue;
    bool view = false;
    for (auto& r : h->schema().returns())
      if (r.alias_info() && !r.alias_info()->isWrite()) view = true;
    if (view) continue;
    lib->impl(s.c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
    ++done;
  }
  lib->impl("convolution", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  lib->impl("copy_", &copy_);
  lib->impl("_local_scalar_dense", &local_scalar);
  lib->impl("cudnn_batch_norm", &cudnn_bn);
  lib->impl("cudnn_batch_norm_backward", &cudnn_bn_backward);
  return done;
}
