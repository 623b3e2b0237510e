/* The driver API (libcuda) as Triton's launcher calls it, on the GPUs of gpu.c. Each function refuses the same calls as
   the function of the real driver, as far as the launcher can make such calls. */
#include "gpu.h"
#include <stdlib.h>
#include <string.h>

/* A context is the number of its device plus one. */
static CUcontext context_of(int device) { return (CUcontext)(uintptr_t)(device + 1); }

static CUresult known(CUdevice device) {
  if (device >= 0 && device < stub_gpu()->devices) return CUDA_SUCCESS;
  return stub_refuse(CUDA_ERROR_INVALID_DEVICE, "device %d of %d", device, stub_gpu()->devices);
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  *count = stub_gpu()->devices;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int index) {
  *device = index;
  return known(index);
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = context_of(stub_current_device());
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  stub_set_device((int)(uintptr_t)context - 1);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
  *device = stub_current_device();
  return *device < 0 ? stub_refuse(CUDA_ERROR_INVALID_CONTEXT, "no device is current") : CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = context_of(device);
  return known(device);
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  const StubGpu *gpu = stub_gpu();
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = gpu->arch / 10; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = gpu->arch % 10; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = gpu->block_shared; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = gpu->shared; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = gpu->registers; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = gpu->multiprocessors; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1000; /* clocks and bus widths, which nothing depends on */
  }
  return known(device);
}

CUresult cuModuleLoadData(CUmodule *module, const void *cubin) {
  if (stub_any_capturing())
    return stub_refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "a kernel is loaded while a stream is captured");
  *module = (CUmodule)cubin;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  static StubKernel at_run_time = {.name = "a kernel that PyTorch compiled", .max_threads = 1024};
  if (memcmp(module, "\177ELF", 4)) return *function = (CUfunction)&at_run_time, CUDA_SUCCESS;
  *function = (CUfunction)stub_read_cubin(module, name);
  return *function ? CUDA_SUCCESS : stub_refuse(CUDA_ERROR_NOT_FOUND, "the machine code has no kernel %s", name);
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  const StubKernel *kernel = (const StubKernel *)function;
  switch (attribute) {
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = kernel->max_threads; break;
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = kernel->static_shared; break;
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = kernel->registers; break;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = kernel->local_bytes; break;
  default: *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  StubKernel *kernel = (StubKernel *)function;
  /* With this attribute, newer cards allow more shared memory, but no card of the hardware table does. */
  if ((int)attribute == 17) return CUDA_ERROR_INVALID_VALUE;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  int most = stub_gpu()->block_shared - kernel->static_shared;
  if (value < 0 || value > most)
    return stub_refuse(CUDA_ERROR_INVALID_VALUE, "%s: %d bytes of shared memory, %d allowed on sm_%d", kernel->name,
                       value, most, stub_gpu()->arch);
  kernel->dynamic_limit = value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = stub_message();
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  *clusters = stub_gpu()->multiprocessors / 2;
  return CUDA_SUCCESS;
}

/* The launcher reports this refusal as a pointer to a CPU tensor. */
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  memcpy(data, &pointer, sizeof pointer);
  if (stub_owner(pointer) >= 0) return CUDA_SUCCESS;
  return stub_refuse(CUDA_ERROR_INVALID_VALUE, "a pointer is no address of a GPU");
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = stub_stream(stream)->capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

/* Calls that wait for the GPU, or that allocate its memory outside of a pool, end a capture. */
static CUresult outside_capture(const char *call) {
  if (!stub_any_capturing()) return CUDA_SUCCESS;
  return stub_refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "%s while a stream is captured", call);
}

CUresult cuCtxSynchronize(void) { return outside_capture("cuCtxSynchronize"); }
CUresult cuStreamSynchronize(CUstream stream) { return outside_capture("cuStreamSynchronize"); }

CUresult cuMemAlloc(CUdeviceptr *pointer, size_t bytes) {
  CUresult result = outside_capture("cuMemAlloc");
  if (result) return result;
  *pointer = (CUdeviceptr)(uintptr_t)calloc(1, bytes ? bytes : 1);
  stub_own(*pointer, bytes, stub_current_device());
  return *pointer ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemFree(CUdeviceptr pointer) {
  stub_disown(pointer);
  free((void *)(uintptr_t)pointer);
  return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t bytes) {
  stub_count_copy(1);
  return outside_capture("cuMemcpyHtoD");
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  return stub_check_launch(config, (StubKernel *)function, parameters);
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *base,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  static const uint16_t BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4}; /* by CUtensorMapDataType */
  StubMap made = {.magic = MAP_MAGIC, .base = (uintptr_t)base, .rank = (uint8_t)rank, .swizzle = (uint8_t)swizzle};
  made.element_bytes = (unsigned)type < 13 ? BYTES[type] : 0;
  for (unsigned i = 0; i < rank && i < 5; i++) {
    if (!dims[i] || dims[i] > 1ull << 32)
      return stub_refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: dimension %u is %llu, allowed are 1 to 2^32", i,
                         (unsigned long long)dims[i]);
    made.last[i] = (uint32_t)(dims[i] - 1);
    made.box[i] = box[i] > 0xffff ? 0xffff : (uint16_t)box[i];
    if (i + 1 < rank) made.strides[i] = strides[i];
  }
  CUresult result = stub_check_map(&made, (unsigned)interleave, (uintptr_t)map, element_strides);
  if (result) return result;
  stub_count_map();
  memset(map, 0, sizeof *map);
  memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}
