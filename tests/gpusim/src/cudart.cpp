// The CUDA runtime API on the simulated device.  Everything executes at once, in call order.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>

#include "gpusim.h"

using namespace gs;
typedef std::lock_guard<std::recursive_mutex> Lock;

static thread_local int t_last = 0;
static thread_local int t_capture_mode = 0;
static cudaError_t ret(int e) {
  if (e && e != cudaErrorNotReady) t_last = e;
  return (cudaError_t)e;
}
static double now_ms() {
  return std::chrono::duration<double, std::milli>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// ================================================================ streams, capture
namespace gs {
static Stream g_default;
static std::set<Stream*>& streams() {
  static auto* s = new std::set<Stream*>;
  return *s;
}
static unsigned long long next_capture = 1;
Stream* stream_of(void* h) {
  if (!h || h == (void*)1 || h == (void*)2) return &g_default;
  return (Stream*)h;
}
bool enqueue(void* h, const char* kind, std::function<void()> fn) {
  Stream* s = stream_of(h);
  if (s->capturing) {
    s->graph->nodes.push_back({kind, std::move(fn)});
    return true;
  }
  fn();
  return false;
}
static bool any_capturing() {
  for (auto* s : streams())
    if (s->capturing) return true;
  return false;
}
static void invalidate(Stream* s) {
  for (auto* x : streams())
    if (x->capturing && (x == s || x->graph == s->graph)) x->invalid = true;
}
// graph-owned memory: freed while captured, but replays still use it
static std::map<void*, Graph*>& graph_mem() {
  static auto* m = new std::map<void*, Graph*>;
  return *m;
}
static std::set<void*>& graph_freed() {
  static auto* m = new std::set<void*>;
  return *m;
}
static Graph* capturing_graph() {
  for (auto* s : streams())
    if (s->capturing) return s->graph;
  return nullptr;
}
static void graph_unref(Graph* g) {
  if (--g->refs > 0) return;
  for (auto it = graph_mem().begin(); it != graph_mem().end();) {
    if (it->second == g) {
      void* p = it->first;
      it = graph_mem().erase(it);
      if (graph_freed().erase(p)) mem_free(p);
    } else
      ++it;
  }
  delete g;
}
int sync_check(void* h) {
  Stream* s = stream_of(h);
  if (s->capturing) {
    invalidate(s);
    return cudaErrorStreamCaptureUnsupported;
  }
  return take_sticky();
}
static int device_sync() {
  for (auto* s : streams())
    if (s->capturing) {
      invalidate(s);
      return cudaErrorStreamCaptureUnsupported;
    }
  return take_sticky();
}
}  // namespace gs

extern "C" {
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* p, unsigned flags, int prio) {
  Lock g(g_mu);
  init();
  auto* s = new Stream;
  s->flags = flags;
  s->prio = prio;
  streams().insert(s);
  *p = (cudaStream_t)s;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* p, unsigned flags) {
  return cudaStreamCreateWithPriority(p, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* p) { return cudaStreamCreateWithPriority(p, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t h) {
  Lock g(g_mu);
  Stream* s = stream_of(h);
  if (s == &g_default) return ret(cudaErrorInvalidResourceHandle);
  streams().erase(s);
  delete s;
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t h, int* p) {
  *p = stream_of(h)->prio;
  return cudaSuccess;
}
cudaError_t cudaStreamGetFlags(cudaStream_t h, unsigned* f) {
  *f = stream_of(h)->flags;
  return cudaSuccess;
}
cudaError_t cudaStreamGetDevice(cudaStream_t, int* d) {
  *d = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t h, unsigned long long* i) {
  *i = (unsigned long long)(uintptr_t)h;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t h) {
  Lock g(g_mu);
  g_count["host_syncs"]++;
  g_count["cudaStreamSynchronize"]++;
  return ret(sync_check(h));
}
cudaError_t cudaStreamQuery(cudaStream_t h) {
  Lock g(g_mu);
  Stream* s = stream_of(h);
  if (s->capturing) {
    invalidate(s);
    return ret(cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  Lock g(g_mu);
  init();
  g_count["host_syncs"]++;
  g_count["cudaDeviceSynchronize"]++;
  return ret(device_sync());
}
cudaError_t cudaStreamIsCapturing(cudaStream_t h, cudaStreamCaptureStatus* st) {
  Lock g(g_mu);
  Stream* s = stream_of(h);
  if (s == &g_default && any_capturing() && false) return ret(cudaErrorStreamCaptureImplicit);
  *st = s->capturing
            ? (s->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive)
            : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t h, cudaStreamCaptureStatus* st,
                                     unsigned long long* id, cudaGraph_t* gr,
                                     const cudaGraphNode_t** deps, const cudaGraphEdgeData** ed,
                                     size_t* n) {
  Lock g(g_mu);
  Stream* s = stream_of(h);
  *st = s->capturing
            ? (s->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive)
            : cudaStreamCaptureStatusNone;
  if (id) *id = s->id;
  if (gr) *gr = (cudaGraph_t)s->graph;
  if (deps) *deps = nullptr;
  if (ed) *ed = nullptr;
  if (n) *n = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t, cudaGraphNode_t*,
                                                const cudaGraphEdgeData*, size_t, unsigned) {
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* m) {
  int o = t_capture_mode;
  t_capture_mode = *m;
  *m = (cudaStreamCaptureMode)o;
  return cudaSuccess;
}
static cudaError_t begin_capture(cudaStream_t h, Graph* gr, cudaStreamCaptureMode mode) {
  Stream* s = stream_of(h);
  if (s == &g_default) return ret(cudaErrorStreamCaptureUnsupported);
  if (s->capturing) return ret(cudaErrorIllegalState);
  s->capturing = true;
  s->invalid = false;
  s->graph = gr;
  s->id = next_capture++;
  s->origin = s;
  s->mode = mode;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t h, cudaStreamCaptureMode mode) {
  Lock g(g_mu);
  auto* gr = new Graph;
  cudaError_t e = begin_capture(h, gr, mode);
  if (e) delete gr;
  return e;
}
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t h, cudaGraph_t gr, const cudaGraphNode_t*,
                                          const cudaGraphEdgeData*, size_t,
                                          cudaStreamCaptureMode mode) {
  Lock g(g_mu);
  ((Graph*)gr)->refs++;
  return begin_capture(h, (Graph*)gr, mode);
}
cudaError_t cudaStreamEndCapture(cudaStream_t h, cudaGraph_t* out) {
  Lock g(g_mu);
  Stream* s = stream_of(h);
  *out = nullptr;
  if (!s->capturing) return ret(cudaErrorIllegalState);
  if (s->origin != s) return ret(cudaErrorStreamCaptureUnmatched);
  Graph* gr = s->graph;
  bool bad = s->invalid;
  for (auto* x : streams())
    if (x->capturing && x->graph == gr) {
      x->capturing = x->invalid = false;
      x->graph = nullptr;
      x->origin = nullptr;
    }
  if (bad) {
    graph_unref(gr);
    return ret(cudaErrorStreamCaptureInvalidated);
  }
  *out = (cudaGraph_t)gr;
  return cudaSuccess;
}
cudaError_t cudaGraphCreate(cudaGraph_t* o, unsigned) {
  *o = (cudaGraph_t) new Graph;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t h) {
  Lock g(g_mu);
  graph_unref((Graph*)h);
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t h, cudaGraphNode_t* nodes, size_t* n) {
  Lock g(g_mu);
  auto* gr = (Graph*)h;
  size_t have = gr->nodes.size();
  if (nodes)
    for (size_t i = 0; i < *n && i < have; ++i) nodes[i] = (cudaGraphNode_t)&gr->nodes[i];
  *n = have;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t h, unsigned long long) {
  Lock g(g_mu);
  auto* gr = (Graph*)h;
  gr->refs++;
  *e = (cudaGraphExec_t)gr;
  g_count["graph_instantiations"]++;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t h, unsigned long long f) {
  return cudaGraphInstantiateWithFlags(e, h, f);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) {
  Lock g(g_mu);
  graph_unref((Graph*)e);
  return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t h) {
  Lock g(g_mu);
  auto* gr = (Graph*)e;
  g_count["graph_launches"]++;
  g_count["graph_nodes_run"] += gr->nodes.size();
  gr->refs++;
  enqueue(h, "graph", [gr] {
    for (auto& n : gr->nodes) n.second();
  });
  if (!stream_of(h)->capturing) graph_unref(gr);
  return cudaSuccess;
}
cudaError_t cudaUserObjectCreate(cudaUserObject_t* o, void*, cudaHostFn_t, unsigned, unsigned) {
  *o = (cudaUserObject_t)malloc(8);
  return cudaSuccess;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }
cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) {
  return cudaSuccess;
}

// ================================================================ events
struct Ev {
  double t = 0;
  unsigned flags = 0;
  bool recorded = false;
  Graph* cap = nullptr;
  Stream* origin = nullptr;
  unsigned long long id = 0;
};
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned f) {
  auto* x = new Ev;
  x->flags = f;
  *e = (cudaEvent_t)x;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  delete (Ev*)e;
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t h, unsigned) {
  Lock g(g_mu);
  auto* x = (Ev*)e;
  Stream* s = stream_of(h);
  g_count["event_records"]++;
  x->recorded = true;
  x->t = now_ms();
  if (s->capturing) {
    x->cap = s->graph;
    x->origin = s->origin;
    x->id = s->id;
  } else
    x->cap = nullptr;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t h) {
  return cudaEventRecordWithFlags(e, h, 0);
}
static bool ev_capturing(Ev* x) {
  if (!x->cap) return false;
  for (auto* s : streams())
    if (s->capturing && s->graph == x->cap && s->id == x->id) return true;
  return false;
}
cudaError_t cudaEventQuery(cudaEvent_t e) {
  Lock g(g_mu);
  auto* x = (Ev*)e;
  if (ev_capturing(x)) return ret(cudaErrorCapturedEvent);
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  Lock g(g_mu);
  auto* x = (Ev*)e;
  g_count["host_syncs"]++;
  g_count["cudaEventSynchronize"]++;
  if (ev_capturing(x)) {
    invalidate(x->origin);
    return ret(cudaErrorCapturedEvent);
  }
  return ret(take_sticky());
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  auto *x = (Ev*)a, *y = (Ev*)b;
  if (!x->recorded || !y->recorded || ((x->flags | y->flags) & cudaEventDisableTiming))
    return ret(cudaErrorInvalidResourceHandle);
  *ms = (float)(y->t - x->t);
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t h, cudaEvent_t e, unsigned) {
  Lock g(g_mu);
  auto* x = (Ev*)e;
  Stream* s = stream_of(h);
  if (ev_capturing(x)) {
    if (s->capturing && s->graph != x->cap) return ret(cudaErrorStreamCaptureMerge);
    if (s == &g_default) return ret(cudaErrorStreamCaptureImplicit);
    if (!s->capturing) {
      s->capturing = true;
      s->invalid = false;
      s->graph = x->cap;
      s->origin = x->origin;
      s->id = x->id;
    }
  } else if (s->capturing && x->recorded && !x->cap) {
    invalidate(s);
    return ret(cudaErrorStreamCaptureIsolation);
  }
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t h, cudaStreamCallback_t f, void* d, unsigned) {
  Lock g(g_mu);
  enqueue(h, "host", [=] { f(h, cudaSuccess, d); });
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t h, cudaHostFn_t f, void* d) {
  Lock g(g_mu);
  enqueue(h, "host", [=] { f(d); });
  return cudaSuccess;
}

// ================================================================ errors
static const struct {
  int e;
  const char *n, *s;
} kErr[] = {
    {0, "cudaSuccess", "no error"},
    {1, "cudaErrorInvalidValue", "invalid argument"},
    {2, "cudaErrorMemoryAllocation", "out of memory"},
    {3, "cudaErrorInitializationError", "initialization error"},
    {4, "cudaErrorCudartUnloading", "driver shutting down"},
    {9, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {21, "cudaErrorInvalidMemcpyDirection", "invalid copy direction for memcpy"},
    {98, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {100, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {101, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {209, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {400, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {401, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
    {13, "cudaErrorInvalidSymbol", "invalid device symbol"},
    {218, "cudaErrorInvalidPtx", "a PTX JIT compilation failed"},
    {720, "cudaErrorCooperativeLaunchTooLarge", "too many blocks in cooperative launch"},
    {500, "cudaErrorSymbolNotFound", "named symbol not found"},
    {600, "cudaErrorNotReady", "device not ready"},
    {700, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {701, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
    {702, "cudaErrorLaunchTimeout", "the launch timed out and was terminated"},
    {704, "cudaErrorPeerAccessAlreadyEnabled", "peer access is already enabled"},
    {710, "cudaErrorAssert", "device-side assert triggered"},
    {712, "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {716, "cudaErrorMisalignedAddress", "misaligned address"},
    {719, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {801, "cudaErrorNotSupported", "operation not supported"},
    {900, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {901, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {902, "cudaErrorStreamCaptureMerge",
     "operation would result in a merge of separate capture sequences"},
    {903, "cudaErrorStreamCaptureUnmatched",
     "capture was not ended in the same stream as it began"},
    {904, "cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"},
    {905, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
    {906, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {907, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"},
    {908, "cudaErrorStreamCaptureWrongThread",
     "attempt to terminate a thread-local capture sequence from another thread"},
    {999, "cudaErrorUnknown", "unknown error"}};
const char* cudaGetErrorName(cudaError_t e) {
  for (auto& k : kErr)
    if (k.e == e) return k.n;
  return "cudaErrorUnknown";
}
const char* cudaGetErrorString(cudaError_t e) {
  for (auto& k : kErr)
    if (k.e == e) return k.s;
  return "unknown error";
}
cudaError_t cudaGetLastError() {
  int e = t_last;
  t_last = 0;
  return (cudaError_t)e;
}
cudaError_t cudaPeekAtLastError() { return (cudaError_t)t_last; }

// ================================================================ device
cudaError_t cudaGetDeviceCount(int* n) {
  init();
  *n = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* d) {
  *d = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int d) {
  init();
  return ret(d == 0 ? 0 : cudaErrorInvalidDevice);
}
cudaError_t cudaInitDevice(int d, unsigned, unsigned) { return cudaSetDevice(d); }
cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
cudaError_t cudaGetDeviceFlags(unsigned* f) {
  *f = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceReset() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* lo, int* hi) {
  if (lo) *lo = 0;
  if (hi) *hi = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* r, int, int) {
  *r = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* b, int n, int) {
  snprintf(b, n, "0000:01:00.0");
  return cudaSuccess;
}
cudaError_t cudaDeviceGetLimit(size_t* v, cudaLimit l) {
  *v = l == cudaLimitStackSize ? 1024 : l == cudaLimitPrintfFifoSize ? 1 << 20 : 8 << 20;
  return cudaSuccess;
}
cudaError_t cudaDeviceSetLimit(cudaLimit, size_t) { return cudaSuccess; }
cudaError_t cudaDeviceSetCacheConfig(cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
  *t = kTotalMem;
  *f = kTotalMem - mem_in_use();
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  static const std::map<int, int> t = {
      {1, 1024},        {2, 1024},     {3, 1024},     {4, 64},        {5, 2147483647},
      {6, 65535},       {7, 65535},    {8, 49152},    {9, 65536},     {10, 32},
      {11, 2147483647}, {12, 65536},   {13, 1980000}, {14, 512},      {15, 1},
      {16, 132},        {19, 1},       {21, 131072},  {31, 1},        {32, 1},
      {33, 1},          {36, 2619000}, {37, 5120},    {38, 52428800}, {39, 2048},
      {40, 3},          {41, 1},       {51, 32},      {75, 9},        {76, 0},
      {78, 1},          {79, 1},       {80, 1},       {81, 233472},   {82, 65536},
      {83, 1},          {87, 2},       {89, 1},       {90, 1},        {91, 1},
      {95, 1},          {97, 232448},  {99, 1},       {106, 32},      {108, 32768000},
      {109, 134213632}, {111, 1024},   {113, 1},      {115, 1},       {120, 1},
      {121, 1}};
  auto i = t.find(a);
  *v = i == t.end() ? 0 : i->second;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  if (d != 0) return ret(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H100 (gpusim)");
  memcpy(p->uuid.bytes, "gpusim-simulated", 16);
  p->totalGlobalMem = kTotalMem;
  p->sharedMemPerBlock = 49152;
  p->regsPerBlock = 65536;
  p->warpSize = 32;
  p->memPitch = 2147483647;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = 9;
  p->minor = 0;
  p->textureAlignment = 512;
  p->texturePitchAlignment = 32;
  p->multiProcessorCount = 132;
  p->canMapHostMemory = 1;
  p->concurrentKernels = 1;
  p->ECCEnabled = 1;
  p->pciBusID = 1;
  p->asyncEngineCount = 3;
  p->unifiedAddressing = 1;
  p->memoryBusWidth = 5120;
  p->l2CacheSize = 52428800;
  p->persistingL2CacheMaxSize = 32768000;
  p->maxThreadsPerMultiProcessor = 2048;
  p->streamPrioritiesSupported = 1;
  p->globalL1CacheSupported = p->localL1CacheSupported = 1;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerMultiprocessor = 65536;
  p->managedMemory = 1;
  p->concurrentManagedAccess = 1;
  p->computePreemptionSupported = 1;
  p->canUseHostPointerForRegisteredMem = 1;
  p->cooperativeLaunch = 1;
  p->sharedMemPerBlockOptin = 232448;
  p->maxBlocksPerMultiProcessor = 32;
  p->accessPolicyMaxWindowSize = 134213632;
  p->reservedSharedMemPerBlock = 1024;
  p->hostRegisterSupported = 1;
  p->memoryPoolsSupported = 1;
  p->clusterLaunch = 1;
  p->unifiedFunctionPointers = 1;
  p->hostNumaId = -1;
  p->deviceNumaId = -1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* p, int) {
  *p = (cudaMemPool_t)8;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetMemPool(cudaMemPool_t* p, int) {
  *p = (cudaMemPool_t)8;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* v) {
  *(uint64_t*)v = 0;
  return cudaSuccess;
}
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) {
  return cudaSuccess;
}
cudaError_t cudaDeviceGetGraphMemAttribute(int, cudaGraphMemAttributeType, void* v) {
  *(uint64_t*)v = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGraphMemTrim(int) { return cudaSuccess; }
cudaError_t cudaCtxResetPersistingL2Cache() { return cudaSuccess; }

// ================================================================ memory
static cudaError_t alloc(void** p, size_t n, AllocKind k, unsigned flags, const char* counter) {
  Lock g(g_mu);
  init();
  if (n == 0) {
    *p = nullptr;
    return cudaSuccess;
  }
  if (Graph* gr = capturing_graph()) {
    *p = mem_alloc(n, k, flags);
    if (*p && k == A_DEVICE) graph_mem()[*p] = gr;
  } else
    *p = mem_alloc(n, k, flags);
  g_count[counter]++;
  g_count[std::string(counter) + "_bytes"] += n;
  return ret(*p ? 0 : cudaErrorMemoryAllocation);
}
static cudaError_t dealloc(void* p, const char* what) {
  Lock g(g_mu);
  if (!p) return cudaSuccess;
  if (graph_mem().count(p)) {
    if (!graph_freed().insert(p).second) {
      fault(std::string(what) + ": double free", 1);
      return ret(1);
    }
    g_count["cudaFree"]++;
    return cudaSuccess;
  }
  if (!mem_free(p)) {
    fault(std::string(what) + " of a pointer that is not a live allocation (double free?)",
          cudaErrorInvalidValue);
    return ret(cudaErrorInvalidValue);
  }
  g_count["cudaFree"]++;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** p, size_t n) { return alloc(p, n, A_DEVICE, 0, "cudaMalloc"); }
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) {
  return alloc(p, n, A_DEVICE, 0, "cudaMalloc");
}
cudaError_t cudaMallocFromPoolAsync(void** p, size_t n, cudaMemPool_t, cudaStream_t) {
  return alloc(p, n, A_DEVICE, 0, "cudaMalloc");
}
cudaError_t cudaMallocManaged(void** p, size_t n, unsigned f) {
  return alloc(p, n, A_MANAGED, f, "cudaMallocManaged");
}
cudaError_t cudaFree(void* p) { return dealloc(p, "cudaFree"); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return dealloc(p, "cudaFreeAsync"); }
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned f) {
  return alloc(p, n, A_HOST, f, "cudaHostAlloc");
}
cudaError_t cudaMallocHost(void** p, size_t n) { return alloc(p, n, A_HOST, 0, "cudaHostAlloc"); }
cudaError_t cudaFreeHost(void* p) { return dealloc(p, "cudaFreeHost"); }
cudaError_t cudaHostRegister(void* p, size_t n, unsigned f) {
  mem_register(p, n, A_HOST, f);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) {
  mem_unregister(p);
  return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** d, void* h, unsigned) {
  *d = h;
  return cudaSuccess;
}
cudaError_t cudaHostGetFlags(unsigned* f, void* p) {
  Alloc* a = mem_find((uintptr_t)p);
  if (!a) return ret(1);
  *f = a->flags;
  return cudaSuccess;
}
cudaError_t cudaMemPrefetchAsync(const void*, size_t, cudaMemLocation, unsigned, cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaMemAdvise(const void*, size_t, cudaMemoryAdvise, cudaMemLocation) {
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  Lock g(g_mu);
  memset(a, 0, sizeof *a);
  Alloc* x = mem_find((uintptr_t)p);
  a->device = x ? 0 : -1;
  if (!x || x->freed) {
    a->type = cudaMemoryTypeUnregistered;
    a->hostPointer = (void*)p;
    a->device = -1;
    return cudaSuccess;
  }
  a->type = x->kind == A_HOST      ? cudaMemoryTypeHost
            : x->kind == A_MANAGED ? cudaMemoryTypeManaged
                                   : cudaMemoryTypeDevice;
  a->devicePointer = (void*)p;
  if (x->kind == A_HOST || x->kind == A_MANAGED) a->hostPointer = (void*)p;
  return cudaSuccess;
}
static bool is_dev(const void* p) {
  Alloc* a = mem_find((uintptr_t)p);
  return a && (a->kind == A_DEVICE || a->kind == A_MODULE || a->kind == A_MANAGED);
}
static bool is_pinned(const void* p) {
  Alloc* a = mem_find((uintptr_t)p);
  return a && a->kind == A_HOST;
}
static int copy(void* d, const void* s, size_t n, cudaMemcpyKind k, cudaStream_t h, bool async) {
  Lock g(g_mu);
  if (!n) return 0;
  bool dd = is_dev(d), sd = is_dev(s);
  if ((k == cudaMemcpyHostToDevice && !dd) || (k == cudaMemcpyDeviceToHost && !sd) ||
      (k == cudaMemcpyDeviceToDevice && !(dd && sd)) || (k == cudaMemcpyHostToHost && (dd || sd))) {
    // pinned memory is device accessible
    if (!((dd || is_pinned(d) || k == cudaMemcpyDeviceToHost || k == cudaMemcpyHostToHost) &&
          (sd || is_pinned(s) || k == cudaMemcpyHostToDevice || k == cudaMemcpyHostToHost)) ||
        k == cudaMemcpyHostToHost) {
      fault("memcpy with the wrong direction or a pointer that is not device memory (kind " +
                std::to_string((int)k) + ")",
            1);
      return cudaErrorInvalidValue;
    }
  }
  const char* name = dd && sd ? "DtoD" : dd ? "HtoD" : sd ? "DtoH" : "HtoH";
  mem_check_range(d, n, "memcpy destination");
  mem_check_range(s, n, "memcpy source");
  g_count["memcpy"]++;
  g_count[std::string("memcpy_") + name]++;
  g_count[std::string("memcpy_") + name + "_bytes"] += n;
  Stream* st = stream_of(h);
  if (!async) {
    if (any_capturing()) {
      for (auto* x : streams())
        if (x->capturing) invalidate(x);
      return cudaErrorStreamCaptureImplicit;
    }
    if (!(dd && sd)) {
      g_count["host_syncs"]++;
      g_count["blocking_memcpy"]++;
      int e = take_sticky();
      if (e) return e;
    }
    memmove(d, s, n);
    return 0;
  }
  if (dd != sd && !is_pinned(dd ? s : d)) {
    g_count["pageable_async_memcpy"]++;
    if (st->capturing) {
      invalidate(st);
      return cudaErrorStreamCaptureUnsupported;
    }
  }
  enqueue(h, "memcpy", [=] { memmove(d, s, n); });
  return 0;
}
cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind k) {
  return ret(copy(d, s, n, k, nullptr, false));
}
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind k, cudaStream_t h) {
  return ret(copy(d, s, n, k, h, true));
}
cudaError_t cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, cudaStream_t h) {
  return ret(copy(d, s, n, cudaMemcpyDefault, h, true));
}
cudaError_t cudaMemcpyPeer(void* d, int, const void* s, int, size_t n) {
  return ret(copy(d, s, n, cudaMemcpyDefault, nullptr, false));
}
cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t hgt,
                              cudaMemcpyKind k, cudaStream_t st) {
  for (size_t i = 0; i < hgt; ++i) {
    int e = copy((char*)d + i * dp, (const char*)s + i * sp, w, k, st, true);
    if (e) return ret(e);
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpy2D(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t hgt,
                         cudaMemcpyKind k) {
  for (size_t i = 0; i < hgt; ++i) {
    int e = copy((char*)d + i * dp, (const char*)s + i * sp, w, k, nullptr, false);
    if (e) return ret(e);
  }
  return cudaSuccess;
}
static int fill(void* d, int v, size_t n, cudaStream_t h, bool async) {
  Lock g(g_mu);
  if (!n) return 0;
  if (!is_dev(d) && !is_pinned(d)) {
    fault("memset of memory that is not on the device", 1);
    return cudaErrorInvalidValue;
  }
  mem_check_range(d, n, "memset");
  g_count["memset"]++;
  g_count["memset_bytes"] += n;
  if (!async && any_capturing()) {
    for (auto* x : streams())
      if (x->capturing) invalidate(x);
    return cudaErrorStreamCaptureImplicit;
  }
  enqueue(async ? h : nullptr, "memset", [=] { memset(d, v, n); });
  return 0;
}
cudaError_t cudaMemset(void* d, int v, size_t n) { return ret(fill(d, v, n, nullptr, false)); }
cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t h) {
  return ret(fill(d, v, n, h, true));
}
cudaError_t cudaMemset2DAsync(void* d, size_t p, int v, size_t w, size_t hgt, cudaStream_t h) {
  for (size_t i = 0; i < hgt; ++i) {
    int e = fill((char*)d + i * p, v, w, h, true);
    if (e) return ret(e);
  }
  return cudaSuccess;
}
}  // extern "C"

// ================================================================ kernels registered by host code
struct FatBin {
  const void* wrapper;
  std::string path;
};
struct HostFn {
  FatBin* bin;
  std::string name;
  Kernel* k = nullptr;
  bool foreign = false;
  int max_dyn = 49152;
};
struct HostVar {
  FatBin* bin;
  std::string name;
  size_t size;
};
static std::unordered_map<const void*, HostFn*>& host_fns() {
  static auto* m = new std::unordered_map<const void*, HostFn*>;
  return *m;
}
static std::unordered_map<const void*, HostVar>& host_vars() {
  static auto* m = new std::unordered_map<const void*, HostVar>;
  return *m;
}
static std::unordered_map<std::string, std::vector<Module*>>& so_modules() {
  static auto* m = new std::unordered_map<std::string, std::vector<Module*>>;
  return *m;
}

static const std::string& path_of(FatBin* b) {
  if (b->path.empty()) {
    Dl_info i;
    if (dladdr(b->wrapper, &i) && i.dli_fname)
      b->path = i.dli_fname;
    else
      b->path = "?";
  }
  return b->path;
}
static bool is_foreign_path(const std::string& p) {
  return p.find("/torch/lib/") != std::string::npos || p.find("/nvidia/") != std::string::npos ||
         p.find("/torchvision/") != std::string::npos;
}
static std::string cache_dir() {
  const char* c = getenv("GPUSIM_CACHE");
  std::string d =
      c && *c ? c : std::string(getenv("HOME") ? getenv("HOME") : "/tmp") + "/.cache/gpusim";
  mkdir(d.c_str(), 0777);
  mkdir((d + "/ptx").c_str(), 0777);
  return d;
}
static std::string slurp(const std::string& p) {
  std::ifstream f(p, std::ios::binary);
  std::stringstream s;
  s << f.rdbuf();
  return s.str();
}
static std::vector<Module*>& modules_of(const std::string& so) {
  auto it = so_modules().find(so);
  if (it != so_modules().end()) return it->second;
  auto& out = so_modules()[so];
  std::string bytes = slurp(so);
  uint64_t h = 1469598103934665603ull;
  for (unsigned char c : bytes) h = (h ^ c) * 1099511628211ull;
  char hx[32];
  snprintf(hx, sizeof hx, "%016llx", (unsigned long long)h);
  std::string cached = cache_dir() + "/ptx/" + hx + ".ptx";
  struct stat st;
  if (stat(cached.c_str(), &st)) {
    const char* tool = getenv("GPUSIM_CUOBJDUMP");
    std::string tmp = cached + "." + std::to_string(getpid());
    std::string cmd = std::string("env -u LD_PRELOAD -u LD_LIBRARY_PATH '") +
                      (tool && *tool ? tool : "cuobjdump") + "' --dump-ptx '" + so + "' > '" + tmp +
                      "'";
    if (system(cmd.c_str()) != 0) {
      unlink(tmp.c_str());
      die("cannot run: " + cmd + "\n    set GPUSIM_CUOBJDUMP to a working cuobjdump");
    }
    rename(tmp.c_str(), cached.c_str());
  }
  std::string dump = slurp(cached);
  for (size_t p = dump.find("Fatbin ptx code:"); p != std::string::npos;) {
    size_t n = dump.find("\nFatbin ", p + 10);
    std::string part = dump.substr(p, n == std::string::npos ? n : n - p);
    size_t v = part.find(".version");
    if (v != std::string::npos) out.push_back(module_from_ptx(part.substr(v), so));
    p = n == std::string::npos ? n : dump.find("Fatbin ptx code:", n);
  }
  return out;
}
static Kernel* resolve(HostFn* f, std::string* why) {
  if (f->k) return f->k;
  const std::string& so = path_of(f->bin);
  if (is_foreign_path(so)) {
    f->foreign = true;
    return nullptr;
  }
  soft_die =
      true;  // a kernel that cannot be interpreted is a launch error, not the end of the process
  try {
    for (auto* m : modules_of(so))
      if (module_has(m, f->name)) {
        f->k = module_kernel(m, f->name);
        soft_die = false;
        return f->k;
      }
  } catch (std::exception& e) {
    soft_die = false;
    *why = e.what();
    return nullptr;
  }
  soft_die = false;
  *why =
      "kernel " + demangle(f->name) + " of " + so +
      " has no PTX embedded.\n    Build the extension with PTX: TORCH_CUDA_ARCH_LIST=\"9.0+PTX\" "
      "(or NVCC_APPEND_FLAGS=\"-gencode=arch=compute_90,code=compute_90\")";
  return nullptr;
}
namespace gs {
void* rt_kernel_from_host(const void* fn) {
  auto it = host_fns().find(fn);
  if (it == host_fns().end()) return nullptr;
  std::string why;
  return resolve(it->second, &why);
}
// argument vector (or packed buffer) -> packed buffer -> run or record
int launch(Kernel* k, Dim grid, Dim block, uint32_t smem, void* stream, void** args, void** extra,
           bool coop) {
  Lock g(g_mu);
  init();
  if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z || block.n() > 1024 ||
      block.z > 64 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) {
    fprintf(stderr,
            "gpusim: invalid launch configuration for %s: grid (%u,%u,%u) block (%u,%u,%u)\n",
            demangle(kernel_name(k)).c_str(), grid.x, grid.y, grid.z, block.x, block.y, block.z);
    return cudaErrorInvalidConfiguration;
  }
  KernelInfo ki = kernel_info(k);
  if (block.n() > ki.max_threads) {
    fprintf(stderr, "gpusim: %s launched with %llu threads, its launch bound is %u\n",
            demangle(kernel_name(k)).c_str(), (unsigned long long)block.n(), ki.max_threads);
    return cudaErrorLaunchOutOfResources;
  }
  if (smem + ki.static_smem > 232448) return cudaErrorInvalidValue;
  if (coop && grid.n() > 132ull * std::max<uint64_t>(1, 2048 / ((block.n() + 31) / 32 * 32)))
    return 720;  // cooperative launch too large
  auto buf = std::make_shared<std::vector<uint8_t>>(kernel_param_bytes(k) + 16);
  auto& ps = kernel_params(k);
  if (args) {
    for (size_t i = 0; i < ps.size(); ++i) memcpy(buf->data() + ps[i].offset, args[i], ps[i].size);
  } else if (extra) {
    void* p = nullptr;
    size_t n = 0;
    for (void** e = extra; *e; e += 2) {
      if (*e == (void*)1)
        p = e[1];
      else if (*e == (void*)2)
        n = *(size_t*)e[1];
    }
    if (p) memcpy(buf->data(), p, std::min<size_t>(n, kernel_param_bytes(k)));
  } else if (!ps.empty())
    return cudaErrorInvalidValue;
  enqueue(stream, "kernel", [=] { kernel_run(k, grid, block, smem, buf->data(), coop); });
  return 0;
}
}  // namespace gs
static Dim dim(dim3 d) { return Dim{d.x, d.y, d.z}; }
static int launch_host(const void* fn, dim3 grid, dim3 block, void** args, size_t smem,
                       cudaStream_t st, bool coop) {
  Lock g(g_mu);
  auto it = host_fns().find(fn);
  if (it == host_fns().end()) {
    fault("launch of a function that was never registered", 98);
    return cudaErrorInvalidDeviceFunction;
  }
  HostFn* f = it->second;
  std::string why;
  Kernel* k = resolve(f, &why);
  if (f->foreign) {
    g_foreign[demangle(f->name)]++;
    g_count["foreign_launches"]++;
    if (f->name.find("spin_kernel") != std::string::npos)
      return 0;  // torch.cuda._sleep: there is no time to pass
    const char* e = getenv("GPUSIM_FOREIGN");
    if (e && !strcmp(e, "skip")) return 0;
    fault("launch of a library kernel that the simulator does not execute: " + demangle(f->name) +
              "\n    of " + path_of(f->bin),
          98);
    return cudaErrorInvalidDeviceFunction;
  }
  if (!k) {
    fault(why, 209);
    return cudaErrorNoKernelImageForDevice;
  }
  if ((int64_t)smem > f->max_dyn) {
    fprintf(stderr,
            "gpusim: %s needs %zu bytes of dynamic shared memory; the limit set by "
            "cudaFuncSetAttribute is %d\n",
            demangle(f->name).c_str(), smem, f->max_dyn);
    return cudaErrorInvalidValue;
  }
  return launch(k, dim(grid), dim(block), (uint32_t)smem, st, args, nullptr, coop);
}

extern "C" {
void** __cudaRegisterFatBinary(void* w) {
  Lock g(g_mu);
  auto* b = new FatBin;
  b->wrapper = w;
  return (void**)b;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** h, const char* host, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  Lock g(g_mu);
  auto* f = new HostFn;
  f->bin = (FatBin*)h;
  f->name = name;
  host_fns()[host] = f;
}
void __cudaRegisterVar(void** h, char* host, char*, const char* name, int, size_t size, int, int) {
  Lock g(g_mu);
  host_vars()[host] = {(FatBin*)h, name, size};
}
void __cudaRegisterManagedVar(void**, void**, char*, const char* name, int, size_t, int, int) {
  fprintf(stderr, "gpusim: managed variable %s is not supported\n", name);
}
void __cudaRegisterHostVar(void**, const char*, char*, size_t) {}
struct CallCfg {
  dim3 g, b;
  size_t s;
  void* st;
};
static thread_local std::vector<CallCfg>* t_cfg;
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, struct CUstream_st* st) {
  if (!t_cfg) t_cfg = new std::vector<CallCfg>;
  t_cfg->push_back({g, b, s, st});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* s, void* st) {
  if (!t_cfg || t_cfg->empty()) return cudaErrorUnknown;
  auto c = t_cfg->back();
  t_cfg->pop_back();
  *g = c.g;
  *b = c.b;
  *s = c.s;
  *(void**)st = c.st;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* fn) {
  *k = (cudaKernel_t)fn;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void** a, size_t s,
                               cudaStream_t st) {
  return ret(launch_host((const void*)k, g, b, a, s, st, false));
}
cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t k, dim3 g, dim3 b, void** a, size_t s,
                                    cudaStream_t st) {
  return __cudaLaunchKernel(k, g, b, a, s, st);
}
cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void** a, size_t s, cudaStream_t st) {
  return ret(launch_host(f, g, b, a, s, st, false));
}
cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 g, dim3 b, void** a, size_t s,
                                        cudaStream_t st) {
  return ret(launch_host(f, g, b, a, s, st, true));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** a) {
  bool coop = false;
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    auto& t = c->attrs[i];
    if (t.id == cudaLaunchAttributeCooperative) coop = t.val.cooperative;
    if (t.id == cudaLaunchAttributeClusterDimension &&
        t.val.clusterDim.x * t.val.clusterDim.y * t.val.clusterDim.z > 1)
      die("thread block clusters are not supported");
  }
  return ret(launch_host(f, c->gridDim, c->blockDim, a, c->dynamicSmemBytes, c->stream, coop));
}
cudaError_t cudaGetFuncBySymbol(cudaFunction_t* f, const void* s) {
  *f = (cudaFunction_t)s;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* fn) {
  Lock g(g_mu);
  memset(a, 0, sizeof *a);
  auto it = host_fns().find(fn);
  if (it == host_fns().end()) return ret(cudaErrorInvalidDeviceFunction);
  std::string why;
  Kernel* k = resolve(it->second, &why);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->ptxVersion = a->binaryVersion = 90;
  a->maxDynamicSharedSizeBytes = it->second->max_dyn;
  if (k) {
    auto i = kernel_info(k);
    a->sharedSizeBytes = i.static_smem;
    a->localSizeBytes = i.local_bytes;
    a->numRegs = std::min<int>(i.regs, 65536 / std::max(32u, i.max_threads));
    a->maxThreadsPerBlock = i.max_threads;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* fn, cudaFuncAttribute at, int v) {
  Lock g(g_mu);
  auto it = host_fns().find(fn);
  if (it == host_fns().end()) return ret(cudaErrorInvalidDeviceFunction);
  if (at == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (v > 232448) return ret(1);
    it->second->max_dyn = v;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t k, cudaFuncAttribute at, int v, int) {
  return cudaFuncSetAttribute((const void*)k, at, v);
}
static int occupancy(const void*, int block, size_t smem) {
  int warps = (block + 31) / 32;
  if (!warps) return 0;
  int n = std::min(32, 64 / warps);
  if (smem) n = std::min<int>(n, (int)(233472 / (smem + 1024)));
  return std::max(n, 0);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* f, int b,
                                                                   size_t s, unsigned) {
  Lock g(g_mu);
  auto it = host_fns().find(f);
  std::string why;
  size_t st = 0;
  if (it != host_fns().end())
    if (Kernel* k = resolve(it->second, &why)) st = kernel_info(k).static_smem;
  *n = occupancy(f, b, s + st);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* f, int b, size_t s) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, b, s, 0);
}
cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(size_t* n, const void*, int blocks, int) {
  *n = 233472 / std::max(1, blocks) - 1024;
  return cudaSuccess;
}
static void* symbol_address(const void* s, size_t* n) {
  auto it = host_vars().find(s);
  if (it == host_vars().end()) return nullptr;
  const std::string& so = path_of(it->second.bin);
  if (is_foreign_path(so)) {
    static std::map<const void*, void*> foreign;
    auto& p = foreign[s];
    if (!p) p = mem_alloc(it->second.size, A_MODULE);
    if (n) *n = it->second.size;
    return p;
  }
  for (auto* m : modules_of(so))
    if (void* p = module_global(m, it->second.name, n)) return p;
  return nullptr;
}
cudaError_t cudaGetSymbolAddress(void** p, const void* s) {
  Lock g(g_mu);
  *p = symbol_address(s, nullptr);
  return ret(*p ? 0 : 13);
}
cudaError_t cudaGetSymbolSize(size_t* n, const void* s) {
  Lock g(g_mu);
  return ret(symbol_address(s, n) ? 0 : 13);
}
cudaError_t cudaMemcpyToSymbol(const void* s, const void* h, size_t n, size_t off, cudaMemcpyKind) {
  Lock g(g_mu);
  char* p = (char*)symbol_address(s, nullptr);
  if (!p) return ret(13);
  return ret(copy(p + off, h, n, cudaMemcpyDefault, nullptr, false));
}
cudaError_t cudaMemcpyToSymbolAsync(const void* s, const void* h, size_t n, size_t off,
                                    cudaMemcpyKind, cudaStream_t st) {
  Lock g(g_mu);
  char* p = (char*)symbol_address(s, nullptr);
  if (!p) return ret(13);
  return ret(copy(p + off, h, n, cudaMemcpyDefault, st, true));
}
cudaError_t cudaMemcpyFromSymbol(void* h, const void* s, size_t n, size_t off, cudaMemcpyKind) {
  Lock g(g_mu);
  char* p = (char*)symbol_address(s, nullptr);
  if (!p) return ret(13);
  return ret(copy(h, p + off, n, cudaMemcpyDefault, nullptr, false));
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* sym, void** fn, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* st) {
  void* self = dlopen("libcuda.so.1", RTLD_LAZY);
  void* p = nullptr;
  for (const char* suf : {"_v2", ""})
    if (!p) p = dlsym(self ? self : RTLD_DEFAULT, (std::string(sym) + suf).c_str());
  *fn = p;
  if (st) *st = p ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPoint(const char* s, void** f, unsigned long long fl,
                                    cudaDriverEntryPointQueryResult* st) {
  return cudaGetDriverEntryPointByVersion(s, f, 13000, fl, st);
}
// decode every kernel of a shared object (or of a .ptx file): "ok NAME" or "FAIL NAME: why", one
// per line
const char* gpusim_check(const char* path) {
  Lock g(g_mu);
  init();
  static std::string out;
  out.clear();
  soft_die = true;
  try {
    std::string p = path;
    std::vector<Module*> ms = p.size() > 4 && p.substr(p.size() - 4) == ".ptx"
                                  ? std::vector<Module*>{module_from_ptx(slurp(p), p)}
                                  : modules_of(p);
    for (auto* m : ms)
      for (auto& n : module_entries(m)) {
        try {
          module_kernel(m, n);
          out += "ok   " + demangle(n) + "\n";
        } catch (std::exception& e) {
          out += "FAIL " + demangle(n) + ": " + e.what() + "\n";
        }
      }
  } catch (std::exception& e) {
    out += std::string("FAIL ") + e.what() + "\n";
  }
  soft_die = false;
  return out.c_str();
}
// used by the aten layer
int gpusim_capturing(void* stream) {
  Lock g(g_mu);
  return stream_of(stream)->capturing;
}
void gpusim_record(void* stream, const char* kind, std::function<void()>* fn) {
  Lock g(g_mu);
  enqueue(stream, kind, *fn);
}
}
