/* Functions in place of PyTorch's own kernels and of cuBLAS's matrix products; they do nothing. */
#include "gpu.h"
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local struct {
  dim3 grid, block;
  size_t shared;
  void *stream;
} configuration;

void **__cudaRegisterFatBinary(void *binary) {
  static void *handle;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
char __cudaInitModule(void **handle) { return 1; }

void __cudaRegisterFunction(void **handle, const char *host, char *on_device, const char *name, int limit, void *tid,
                            void *bid, void *block, void *grid, int *warps) {}

void __cudaRegisterVar(void **handle, char *host, char *on_device, const char *name, int ext, size_t size, int constant,
                       int global) {}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  return *kernel = (cudaKernel_t)function, cudaSuccess;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configuration.grid = grid;
  configuration.block = block;
  configuration.shared = shared;
  configuration.stream = stream;
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *(void **)stream = configuration.stream;
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **parameters, size_t shared,
                               cudaStream_t stream) {
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **parameters, size_t shared,
                             cudaStream_t stream) {
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **parameters) {
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = stub_gpu()->arch;
  attributes->maxDynamicSharedSizeBytes = stub_gpu()->block_shared;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                                   size_t shared, unsigned flags) {
  return *blocks = threads > 0 ? 2048 / threads : 1, cudaSuccess;
}

/* --- cuBLAS: its own headers are not needed, since every function returns a status of 0 for success --- */

#define MAKES(name)                                                                                                    \
  int name(void **made) { return *made = calloc(1, 256), 0; }
#define DOES_NOTHING(name)                                                                                             \
  int name() { return 0; }
#define GIVES_ZERO(name)                                                                                               \
  int name(void *handle, int *value) { return *value = 0, 0; }

MAKES(cublasCreate_v2) MAKES(cublasLtCreate) MAKES(cublasLtMatmulDescCreate) MAKES(cublasLtMatmulPreferenceCreate)
MAKES(cublasLtMatrixLayoutCreate)
GIVES_ZERO(cublasGetMathMode) GIVES_ZERO(cublasGetPointerMode_v2)
DOES_NOTHING(cublasDestroy_v2) DOES_NOTHING(cublasSetMathMode) DOES_NOTHING(cublasSetPointerMode_v2)
DOES_NOTHING(cublasSetStream_v2) DOES_NOTHING(cublasSetWorkspace_v2)
DOES_NOTHING(cublasDdot_v2) DOES_NOTHING(cublasDotEx) DOES_NOTHING(cublasSdot_v2)
DOES_NOTHING(cublasDgemmStridedBatched) DOES_NOTHING(cublasDgemm_v2) DOES_NOTHING(cublasDgemv_v2)
DOES_NOTHING(cublasSgemmStridedBatched) DOES_NOTHING(cublasSgemm_v2) DOES_NOTHING(cublasSgemv_v2)
DOES_NOTHING(cublasSgemmEx) DOES_NOTHING(cublasGemmEx) DOES_NOTHING(cublasGemmStridedBatchedEx)
DOES_NOTHING(cublasLtMatmul) DOES_NOTHING(cublasLtMatmulDescDestroy) DOES_NOTHING(cublasLtMatmulDescSetAttribute)
DOES_NOTHING(cublasLtMatmulPreferenceDestroy) DOES_NOTHING(cublasLtMatmulPreferenceSetAttribute)
DOES_NOTHING(cublasLtMatrixLayoutDestroy) DOES_NOTHING(cublasLtMatrixLayoutSetAttribute)

size_t cublasLtGetVersion(void) { return 130100; }

/* One algorithm is always found, and its content is never read. */
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int requested, void *results, int *found) {
  memset(results, 0, 96);
  return *found = 1, 0;
}

/* --- kernels that PyTorch compiles when they are first called (nvrtc.c) --- */

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **parameters,
                        void **extra) {
  return CUDA_SUCCESS;
}

CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                   CUstream stream, void **parameters) {
  return CUDA_SUCCESS;
}

/* TorchInductor keeps the machine code of its kernels in files. */
CUresult cuModuleLoad(CUmodule *module, const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file) return stub_refuse(CUDA_ERROR_FILE_NOT_FOUND, "there is no file %s", path);
  fseek(file, 0, SEEK_END);
  long size = ftell(file);
  rewind(file);
  void *code = malloc((size_t)size);
  int is_read = fread(code, 1, (size_t)size, file) == (size_t)size;
  fclose(file);
  return is_read ? cuModuleLoadData(module, code) : stub_refuse(CUDA_ERROR_INVALID_IMAGE, "%s cannot be read", path);
}

CUresult cuModuleLoadDataEx(CUmodule *module, const void *code, unsigned count, CUjit_option *options, void **values) {
  return cuModuleLoadData(module, code);
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared) {
  return *blocks = 1, CUDA_SUCCESS;
}

/* cuDNN calls more functions of the driver than the stub has. PyTorch asks these two functions whether it may use cuDNN
   (at::Context::userEnabledCuDNN and userEnabledCuDNNSDP). Since they return 0, convolutions are matrix products. */
int _ZNK2at7Context16userEnabledCuDNNEv(void) { return 0; }
int _ZNK2at7Context19userEnabledCuDNNSDPEv(void) { return 0; }
