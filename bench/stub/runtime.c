/* The runtime API (libcudart) as PyTorch calls it, on the GPUs of gpu.c. PyTorch then believes that it has a GPU: its
   allocator, streams, events, graphs and guards are the real ones. No kernel runs, so memory of a GPU always reads as
   zero: it is never written, and no page of it exists. A time between two events is the host's. */
#define _GNU_SOURCE
#include "gpu.h"
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define MEMORY_BYTES 80000000000ull

typedef struct {
  double ms;
  StubStream *stream;
} Event;

typedef struct {
  size_t nodes;
} Graph;

static _Thread_local cudaError_t last_error;
static _Thread_local enum cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
static uint64_t used[MAX_DEVICES];
static unsigned long long captures;

void stub_begin_capture(void *stream);
void stub_end_capture(void *stream);

static cudaError_t fail(cudaError_t error) { return last_error = error; }

static int device(void) {
  if (stub_current_device() < 0) stub_set_device(0);
  return stub_current_device();
}

/* Refuses a call that would end a capture, unless this thread has chosen the relaxed mode of captures. */
static cudaError_t outside_capture(const char *call) {
  if (!stub_any_capturing() || mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  stub_refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "%s while a stream is captured", call);
  return fail(cudaErrorStreamCaptureUnsupported);
}

/* --- devices --- */

cudaError_t cudaGetDeviceCount(int *count) { return *count = stub_gpu()->devices, cudaSuccess; }
cudaError_t cudaGetDevice(int *current) { return *current = device(), cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return outside_capture("cudaDeviceSynchronize"); }

cudaError_t cudaSetDevice(int chosen) {
  if (chosen < 0 || chosen >= stub_gpu()->devices) return fail(cudaErrorInvalidDevice);
  stub_set_device(chosen);
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int index) {
  const StubGpu *gpu = stub_gpu();
  const char *name = getenv("CLIPFAST_STUB_NAME");
  memset(properties, 0, sizeof *properties);
  snprintf(properties->name, sizeof properties->name, "%s", name ? name : "stub driver");
  properties->uuid.bytes[0] = (char)(index + 1);
  properties->totalGlobalMem = MEMORY_BYTES;
  properties->major = gpu->arch / 10;
  properties->minor = gpu->arch % 10;
  properties->multiProcessorCount = gpu->multiprocessors;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 0x7fffffff;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = (size_t)gpu->block_shared;
  properties->sharedMemPerMultiprocessor = (size_t)gpu->shared;
  properties->regsPerBlock = properties->regsPerMultiprocessor = gpu->registers;
  properties->l2CacheSize = 50 << 20;
  properties->textureAlignment = properties->texturePitchAlignment = 512;
  properties->concurrentKernels = properties->unifiedAddressing = properties->canMapHostMemory = 1;
  properties->pciBusID = index + 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int index) {
  return (cudaError_t)cuDeviceGetAttribute(value, (CUdevice_attribute)attribute, index);
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int index) {
  snprintf(text, (size_t)length, "0000:%02x:00.0", index + 1);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { return *can = 0, cudaSuccess; }

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *status) {
  extern CUresult stub_unsupported(void);
  *function = dlsym(RTLD_DEFAULT, symbol);
  if (!*function) *function = (void *)stub_unsupported;
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

CUresult stub_unsupported(void) { return stub_refuse(CUDA_ERROR_NOT_SUPPORTED, "a call of the driver that the stub lacks"); }

CUresult cuDevicePrimaryCtxGetState(CUdevice index, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

/* --- errors --- */

const char *cudaGetErrorString(cudaError_t error) { return error ? stub_message() : "no error"; }
const char *cudaGetErrorName(cudaError_t error) { return error ? "refused by the stub driver" : "cudaSuccess"; }
cudaError_t cudaPeekAtLastError(void) { return last_error; }

cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

/* --- memory --- */

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
  cudaError_t error = outside_capture("cudaMalloc");
  if (error) return error;
  size_t rounded = (bytes + 4095) / 4096 * 4096;
  if (used[device()] + rounded > MEMORY_BYTES) return fail(cudaErrorMemoryAllocation);
  *pointer = mmap(NULL, rounded ? rounded : 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*pointer == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  used[device()] += rounded;
  stub_own((uintptr_t)*pointer, rounded, device());
  return cudaSuccess;
}

cudaError_t cudaFree(void *pointer) {
  if (!pointer) return cudaSuccess;
  cudaError_t error = outside_capture("cudaFree");
  if (error) return error;
  int owner = stub_owner((uintptr_t)pointer);
  uint64_t bytes = stub_disown((uintptr_t)pointer);
  if (owner >= 0) used[owner] -= bytes;
  munmap(pointer, bytes);
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t stream) { return cudaMalloc(pointer, bytes); }
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return cudaFree(pointer); }

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  *total = MEMORY_BYTES;
  *available = MEMORY_BYTES - used[device()];
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
  return *pointer = calloc(1, bytes ? bytes : 1), cudaSuccess;
}

cudaError_t cudaFreeHost(void *pointer) { return free(pointer), cudaSuccess; }
cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned flags) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void *pointer) { return cudaSuccess; }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
  int owner = stub_owner((uintptr_t)pointer);
  memset(attributes, 0, sizeof *attributes);
  attributes->type = owner < 0 ? cudaMemoryTypeUnregistered : cudaMemoryTypeDevice;
  attributes->device = owner < 0 ? device() : owner;
  attributes->devicePointer = owner < 0 ? NULL : (void *)pointer;
  return cudaSuccess;
}

static int is_host(const void *pointer) { return stub_owner((uintptr_t)pointer) < 0; }

static cudaError_t copy(void *to, const void *from, size_t bytes) {
  if (is_host(to) && is_host(from)) memcpy(to, from, bytes);
  /* Memory of a GPU reads as zero. But a copy of a single byte tells PyTorch whether all values are equal or finite, and
     zeros are, so it reads as 1. */
  else if (is_host(to)) memset(to, bytes == 1, bytes);
  if (is_host(to) != is_host(from)) stub_count_copy(is_host(from));
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  cudaError_t error = outside_capture("cudaMemcpy");
  return error ? error : copy(to, from, bytes);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, from, bytes);
}

cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t bytes, cudaStream_t stream) {
  return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t row = 0; row < height; row++) copy((char *)to + row * pitch, (const char *)from + row * from_pitch, width);
  return cudaSuccess;
}

cudaError_t cudaMemset(void *pointer, int value, size_t bytes) { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *pointer, int value, size_t bytes, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes, size_t offset,
                               enum cudaMemcpyKind kind) {
  return cudaSuccess;
}

/* --- streams, events, graphs --- */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  return *stream = stub_new_stream(device()), cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return outside_capture("cudaStreamQuery"); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return cudaSuccess; }

/* Waiting for a stream that is captured is an error in every mode, and spoils the capture. */
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  StubStream *waited = stub_stream(stream);
  if (!waited->capturing) return outside_capture("cudaStreamSynchronize");
  waited->capturing = 2;
  stub_refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "cudaStreamSynchronize of a stream that is captured");
  return fail(cudaErrorStreamCaptureUnsupported);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  return *event = calloc(1, sizeof(Event)), cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return outside_capture("cudaEventQuery"); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return outside_capture("cudaEventSynchronize"); }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  ((Event *)event)->ms = 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
  ((Event *)event)->stream = stub_stream(stream);
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) {
  double between = ((Event *)end)->ms - ((Event *)begin)->ms;
  *ms = between > 1e-3 ? (float)between : 1e-3f;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *exchanged) {
  enum cudaStreamCaptureMode before = mode;
  mode = *exchanged;
  *exchanged = before;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode chosen) {
  if ((uintptr_t)stream <= 2 || stub_stream(stream)->capturing) {
    stub_refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "the default stream cannot be captured, and no stream twice");
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  captures++;
  stub_begin_capture(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  int state = stub_stream(stream)->capturing;
  *status = state == 2   ? cudaStreamCaptureStatusInvalidated
            : state == 1 ? cudaStreamCaptureStatusActive
                         : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
  if (id) *id = captures;
  if (graph) *graph = NULL;
  if (nodes) *nodes = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  int spoilt = stub_stream(stream)->capturing == 2;
  stub_end_capture(stream);
  *graph = NULL;
  if (spoilt) return fail(cudaErrorStreamCaptureInvalidated);
  Graph *made = calloc(1, sizeof *made);
  made->nodes = 1;
  *graph = (cudaGraph_t)made;
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  return *count = ((Graph *)graph)->nodes, cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
  return *made = (cudaGraphExec_t)graph, cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return cudaSuccess; }
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  return function(data), cudaSuccess;
}
