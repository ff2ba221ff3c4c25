// The part of the CUDA driver API that torch and Triton use.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dirent.h>
#include <dlfcn.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "gpusim.h"
using namespace gs;
typedef std::lock_guard<std::recursive_mutex> Lock;
static CUresult R(cudaError_t e) {
  return (CUresult)e;
}  // the two enumerations agree on the codes used here
static char ctx_obj;
struct DrvFunc {
  Kernel* k;
  int max_dyn = 49152;
};
struct DrvMod {
  Module* m;
  std::map<std::string, DrvFunc*> fns;
};

static std::string slurp(const std::string& p) {
  std::ifstream f(p, std::ios::binary);
  std::stringstream s;
  s << f.rdbuf();
  return s.str();
}
// the PTX next to a cubin in Triton's cache
static size_t elf_size(const unsigned char* p) {
  uint64_t shoff;
  uint16_t shentsize, shnum;
  uint64_t phoff;
  uint16_t phentsize, phnum;
  memcpy(&shoff, p + 40, 8);
  memcpy(&phoff, p + 32, 8);
  memcpy(&phentsize, p + 54, 2);
  memcpy(&phnum, p + 56, 2);
  memcpy(&shentsize, p + 58, 2);
  memcpy(&shnum, p + 60, 2);
  uint64_t n =
      std::max<uint64_t>(shoff + (uint64_t)shentsize * shnum, phoff + (uint64_t)phentsize * phnum);
  for (int i = 0; i < shnum; ++i) {
    const unsigned char* s = p + shoff + (uint64_t)i * shentsize;
    uint32_t type;
    uint64_t off, sz;
    memcpy(&type, s + 4, 4);
    memcpy(&off, s + 24, 8);
    memcpy(&sz, s + 32, 8);
    if (type != 8) n = std::max(n, off + sz);
  }
  return n;
}
static std::map<std::string, std::string>& registered() {
  static auto* m = new std::map<std::string, std::string>;
  return *m;
}
static std::string ptx_of_cubin(const void* image) {
  size_t n = elf_size((const unsigned char*)image);
  std::string bytes((const char*)image, n);
  auto it = registered().find(bytes);
  if (it != registered().end()) return it->second;
  const char* c = getenv("TRITON_CACHE_DIR");
  const char* h = getenv("TRITON_HOME");
  if (!h) h = getenv("HOME");
  std::string dir = c && *c ? c : std::string(h ? h : "") + "/.triton/cache";
  if (DIR* d = opendir(dir.c_str())) {
    while (dirent* e = readdir(d)) {
      if (e->d_name[0] == '.') continue;
      std::string sub = dir + "/" + e->d_name;
      if (DIR* d2 = opendir(sub.c_str())) {
        while (dirent* f = readdir(d2)) {
          std::string name = f->d_name;
          if (name.size() < 7 || name.substr(name.size() - 6) != ".cubin") continue;
          std::string p = sub + "/" + name;
          struct stat st;
          if (stat(p.c_str(), &st) || (size_t)st.st_size < n || (size_t)st.st_size > n + 64)
            continue;
          std::string b = slurp(p);
          if (b.compare(0, n, bytes) == 0) {
            std::string t = slurp(p.substr(0, p.size() - 6) + ".ptx");
            if (!t.empty()) {
              closedir(d2);
              closedir(d);
              return t;
            }
          }
        }
        closedir(d2);
      }
    }
    closedir(d);
  }
  return "";
}
extern "C" {
void gpusim_register_ptx(const void* cubin, size_t n, const char* ptx) {
  Lock g(g_mu);
  registered()[std::string((const char*)cubin, n)] = ptx;
}

CUresult cuInit(unsigned) {
  init();
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* v) {
  *v = 13000;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* n) {
  *n = 1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* d, int i) {
  *d = 0;
  return i ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* b, int n, CUdevice) {
  snprintf(b, n, "NVIDIA H100 (gpusim)");
  return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem(size_t* n, CUdevice) {
  *n = kTotalMem;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid(CUuuid* u, CUdevice) {
  memcpy(u->bytes, "gpusim-simulated", 16);
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice d) {
  return R(cudaDeviceGetAttribute(v, (cudaDeviceAttr)a, d));
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) {
  *c = (CUcontext)&ctx_obj;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* f, int* a) {
  *f = 0;
  *a = 1;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxSetFlags(CUdevice, unsigned) { return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* c) {
  *c = (CUcontext)&ctx_obj;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext* c) {
  if (c) *c = (CUcontext)&ctx_obj;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* d) {
  *d = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetFlags(unsigned* f) {
  *f = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetApiVersion(CUcontext, unsigned* v) {
  *v = 13000;
  return CUDA_SUCCESS;
}
CUresult cuCtxSynchronize() { return R(cudaDeviceSynchronize()); }
CUresult cuCtxGetLimit(size_t* v, CUlimit) {
  *v = 1 << 20;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuCtxGetStreamPriorityRange(int* a, int* b) {
  return R(cudaDeviceGetStreamPriorityRange(a, b));
}
CUresult cuGetErrorString(CUresult e, const char** s) {
  *s = cudaGetErrorString((cudaError_t)e);
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult e, const char** s) {
  *s = cudaGetErrorName((cudaError_t)e);
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* out, const void* image) {
  Lock g(g_mu);
  init();
  const unsigned char* p = (const unsigned char*)image;
  std::string ptx, origin = "module";
  if (p[0] == 0x7f && p[1] == 'E') {
    ptx = ptx_of_cubin(image);
    origin = "Triton kernel";
    if (ptx.empty()) {
      fault(
          "a cubin was loaded whose PTX is not known (looked in Triton's cache folder, "
          "TRITON_CACHE_DIR)",
          CUDA_ERROR_INVALID_IMAGE);
      return CUDA_ERROR_INVALID_IMAGE;
    }
  } else {
    const char* t = (const char*)image;
    if (!strstr(t, ".version")) die("module image of an unknown format (neither a cubin nor PTX)");
    ptx = t;
  }
  auto* m = new DrvMod;
  soft_die = true;
  try {
    m->m = module_from_ptx(ptx, origin);
  } catch (std::exception& e) {
    soft_die = false;
    fault(e.what(), CUDA_ERROR_INVALID_PTX);
    return CUDA_ERROR_INVALID_PTX;
  }
  soft_die = false;
  *out = (CUmodule)m;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule* out, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(out, image);
}
CUresult cuModuleLoad(CUmodule* out, const char* path) {
  Lock g(g_mu);
  std::string p = path, bytes = slurp(p);
  if (bytes.empty()) return CUDA_ERROR_FILE_NOT_FOUND;
  if (p.size() > 6 && p.substr(p.size() - 6) == ".cubin") {
    std::string t = slurp(p.substr(0, p.size() - 6) + ".ptx");
    if (!t.empty() && bytes[0] == 0x7f)
      registered()[bytes.substr(0, elf_size((const unsigned char*)bytes.data()))] = t;
  }
  return cuModuleLoadData(out, bytes.c_str());
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* f, CUmodule m, const char* name) {
  Lock g(g_mu);
  auto* d = (DrvMod*)m;
  auto& x = d->fns[name];
  if (!x) {
    Kernel* k = nullptr;
    soft_die = true;
    try {
      k = module_kernel(d->m, name);
    } catch (std::exception& e) {
      soft_die = false;
      d->fns.erase(name);
      fault(e.what(), CUDA_ERROR_INVALID_PTX);
      return CUDA_ERROR_INVALID_PTX;
    }
    soft_die = false;
    if (!k) {
      d->fns.erase(name);
      return CUDA_ERROR_NOT_FOUND;
    }
    x = new DrvFunc{k};
  }
  *f = (CUfunction)x;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetGlobal(CUdeviceptr* p, size_t* n, CUmodule m, const char* name) {
  size_t s = 0;
  void* q = module_global(((DrvMod*)m)->m, name, &s);
  if (!q) return CUDA_ERROR_NOT_FOUND;
  if (p) *p = (CUdeviceptr)q;
  if (n) *n = s;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction f) {
  auto i = kernel_info(((DrvFunc*)f)->k);
  switch (a) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *v = i.max_threads;
      break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      *v = i.static_smem;
      break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
      *v = i.local_bytes;
      break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      *v = std::min<int>(i.regs, 65536 / std::max(32u, i.max_threads));
      break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
      *v = 90;
      break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      *v = ((DrvFunc*)f)->max_dyn;
      break;
    default:
      *v = 0;
  }
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
  if (a == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) ((DrvFunc*)f)->max_dyn = v;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
static CUresult go(CUfunction f, Dim g, Dim b, unsigned smem, CUstream s, void** args, void** extra,
                   bool coop) {
  auto* d = (DrvFunc*)f;
  if ((int)smem > d->max_dyn) return CUDA_ERROR_INVALID_VALUE;
  return (CUresult)launch(d->k, g, b, smem, s, args, extra, coop);
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                        unsigned by, unsigned bz, unsigned smem, CUstream s, void** a, void** e) {
  return go(f, Dim{gx, gy, gz}, Dim{bx, by, bz}, smem, s, a, e, false);
}
CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                   unsigned by, unsigned bz, unsigned smem, CUstream s, void** a) {
  return go(f, Dim{gx, gy, gz}, Dim{bx, by, bz}, smem, s, a, nullptr, true);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** a, void** e) {
  bool coop = false;
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    auto& t = c->attrs[i];
    if (t.id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) coop = t.value.cooperative;
    if (t.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION &&
        t.value.clusterDim.x * t.value.clusterDim.y * t.value.clusterDim.z > 1)
      die("thread block clusters are not supported");
  }
  return go(f, Dim{c->gridDimX, c->gridDimY, c->gridDimZ},
            Dim{c->blockDimX, c->blockDimY, c->blockDimZ}, c->sharedMemBytes, c->hStream, a, e,
            coop);
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int b, size_t s) {
  return R(cudaOccupancyMaxActiveBlocksPerMultiprocessor(n, nullptr, b, s));
}
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) {
  *n = 132;
  return CUDA_SUCCESS;
}

CUresult cuMemAlloc(CUdeviceptr* p, size_t n) { return R(cudaMalloc((void**)p, n)); }
CUresult cuMemFree(CUdeviceptr p) { return R(cudaFree((void*)p)); }
CUresult cuMemGetInfo(size_t* a, size_t* b) { return R(cudaMemGetInfo(a, b)); }
CUresult cuMemcpyHtoD(CUdeviceptr d, const void* s, size_t n) {
  return R(cudaMemcpy((void*)d, s, n, cudaMemcpyHostToDevice));
}
CUresult cuMemcpyDtoH(void* d, CUdeviceptr s, size_t n) {
  return R(cudaMemcpy(d, (void*)s, n, cudaMemcpyDeviceToHost));
}
CUresult cuMemcpyDtoD(CUdeviceptr d, CUdeviceptr s, size_t n) {
  return R(cudaMemcpy((void*)d, (void*)s, n, cudaMemcpyDeviceToDevice));
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr d, const void* s, size_t n, CUstream h) {
  return R(cudaMemcpyAsync((void*)d, s, n, cudaMemcpyHostToDevice, h));
}
CUresult cuMemcpyDtoHAsync(void* d, CUdeviceptr s, size_t n, CUstream h) {
  return R(cudaMemcpyAsync(d, (void*)s, n, cudaMemcpyDeviceToHost, h));
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream h) {
  return R(cudaMemcpyAsync((void*)d, (void*)s, n, cudaMemcpyDeviceToDevice, h));
}
CUresult cuMemcpyAsync(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream h) {
  return R(cudaMemcpyAsync((void*)d, (void*)s, n, cudaMemcpyDefault, h));
}
CUresult cuMemsetD8(CUdeviceptr d, unsigned char v, size_t n) {
  return R(cudaMemset((void*)d, v, n));
}
CUresult cuMemsetD8Async(CUdeviceptr d, unsigned char v, size_t n, CUstream h) {
  return R(cudaMemsetAsync((void*)d, v, n, h));
}
CUresult cuMemsetD32Async(CUdeviceptr d, unsigned v, size_t n, CUstream h) {
  Lock g(g_mu);
  mem_check_range((void*)d, n * 4, "memset");
  g_count["memset"]++;
  g_count["memset_bytes"] += n * 4;
  enqueue(h, "memset", [=] {
    for (size_t i = 0; i < n; ++i) ((unsigned*)d)[i] = v;
  });
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* v, CUpointer_attribute a, CUdeviceptr p) {
  Lock g(g_mu);
  Alloc* x = mem_find(p);
  if (!x || x->freed) return CUDA_ERROR_INVALID_VALUE;
  switch (a) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      *(void**)v = &ctx_obj;
      break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *(unsigned*)v = x->kind == A_HOST ? 1 : 2;
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      *(CUdeviceptr*)v = p;
      break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      *(bool*)v = x->kind == A_MANAGED;
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *(int*)v = 0;
      break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      *(CUdeviceptr*)v = x->lo;
      break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      *(size_t*)v = x->hi - x->lo;
      break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
      *(unsigned long long*)v = x->id;
      break;
    case CU_POINTER_ATTRIBUTE_MAPPED:
      *(bool*)v = true;
      break;
    default:
      fprintf(stderr, "gpusim: pointer attribute %d is not implemented\n", (int)a);
      return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute* a, void** v, CUdeviceptr p) {
  for (unsigned i = 0; i < n; ++i)
    if (cuPointerGetAttribute(v[i], a[i], p) != CUDA_SUCCESS) {
      if (a[i] == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
        *(unsigned*)v[i] = 0;
      else if (a[i] == CU_POINTER_ATTRIBUTE_DEVICE_POINTER || a[i] == CU_POINTER_ATTRIBUTE_CONTEXT)
        *(void**)v[i] = nullptr;
    }
  return CUDA_SUCCESS;
}
CUresult cuMemGetAddressRange(CUdeviceptr* b, size_t* n, CUdeviceptr p) {
  Alloc* x = mem_find(p);
  if (!x) return CUDA_ERROR_NOT_FOUND;
  if (b) *b = x->lo;
  if (n) *n = x->hi - x->lo;
  return CUDA_SUCCESS;
}
CUresult cuStreamCreate(CUstream* s, unsigned f) { return R(cudaStreamCreateWithFlags(s, f)); }
CUresult cuStreamCreateWithPriority(CUstream* s, unsigned f, int p) {
  return R(cudaStreamCreateWithPriority(s, f, p));
}
CUresult cuStreamDestroy(CUstream s) { return R(cudaStreamDestroy(s)); }
CUresult cuStreamSynchronize(CUstream s) { return R(cudaStreamSynchronize(s)); }
CUresult cuStreamQuery(CUstream s) { return R(cudaStreamQuery(s)); }
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus* st) {
  return R(cudaStreamIsCapturing(s, (cudaStreamCaptureStatus*)st));
}
CUresult cuStreamWaitEvent(CUstream s, CUevent e, unsigned f) {
  return R(cudaStreamWaitEvent(s, e, f));
}
CUresult cuStreamGetCtx(CUstream, CUcontext* c) {
  *c = (CUcontext)&ctx_obj;
  return CUDA_SUCCESS;
}
CUresult cuEventCreate(CUevent* e, unsigned f) { return R(cudaEventCreateWithFlags(e, f)); }
CUresult cuEventDestroy(CUevent e) { return R(cudaEventDestroy(e)); }
CUresult cuEventRecord(CUevent e, CUstream s) { return R(cudaEventRecord(e, s)); }
CUresult cuEventSynchronize(CUevent e) { return R(cudaEventSynchronize(e)); }
CUresult cuEventQuery(CUevent e) { return R(cudaEventQuery(e)); }
CUresult cuEventElapsedTime(float* ms, CUevent a, CUevent b) {
  return R(cudaEventElapsedTime(ms, a, b));
}
CUresult cuLogsRegisterCallback(CUlogsCallback, void*, CUlogsCallbackHandle* h) {
  if (h) *h = nullptr;
  return CUDA_SUCCESS;
}
CUresult cuLogsUnregisterCallback(CUlogsCallbackHandle) { return CUDA_SUCCESS; }
CUresult cuGetProcAddress(const char* sym, void** fn, int, cuuint64_t,
                          CUdriverProcAddressQueryResult* st) {
  cudaDriverEntryPointQueryResult q;
  if (!strcmp(sym, "cuGetProcAddress")) sym = "cuGetProcAddress_v2";
  cudaGetDriverEntryPointByVersion(sym, fn, 13000, 0, &q);
  if (st) *st = *fn ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *fn ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult cuGetExportTable(const void** t, const CUuuid*) {
  *t = nullptr;
  return CUDA_ERROR_NOT_SUPPORTED;
}
}
