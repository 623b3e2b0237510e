/* The GPUs that the stub pretends to have: their limits, memory, streams and kernels. driver.c gives them the driver
   API, and runtime.c and kernels.c give them the functions that PyTorch needs. Nothing here runs a kernel. */
#ifndef CLIPFAST_STUB_GPU_H
#define CLIPFAST_STUB_GPU_H

#include "cuda.h"
#include <stddef.h>
#include <stdint.h>

#define MAX_DEVICES 8
#define MAX_PARAMS 128
#define MAX_PARAM_BYTES 4096
#define MAP_MAGIC 0x70616d2062757473ull

typedef struct {
  int arch;               /* compute capability, 90 for sm_90 */
  int devices;            /* how many GPUs there are */
  int multiprocessors;    /* of each */
  int block_shared;       /* bytes of shared memory that one block may ask for */
  int shared;             /* bytes of shared memory of a multiprocessor */
  int registers;          /* of a multiprocessor, which is also the most of one block */
} StubGpu;

typedef struct {
  int offset, size, is_pointer;
} StubParam;

/* A kernel as its machine code (cubin) describes it. */
typedef struct {
  char name[256];
  int registers, static_shared, local_bytes, max_threads;
  int dynamic_limit; /* of shared memory, 48 KiB unless cuFuncSetAttribute raises it */
  int num_params;
  StubParam params[MAX_PARAMS];
} StubKernel;

/* The last launch, which Python compares with the arguments of the kernel's call. */
typedef struct {
  char name[256];
  unsigned grid[3], block[3];
  int shared, registers, device, num_params;
  uint64_t stream;
  int offsets[MAX_PARAMS], sizes[MAX_PARAMS];
  unsigned char bytes[MAX_PARAM_BYTES];
} StubLaunch;

/* The fields that the stub writes into the 128 opaque bytes of a tensor map. Triton clears a bit of the second word for
   small tensors, because of a fault of older drivers, so the stub writes nothing there. */
typedef struct {
  uint64_t magic, unused, base;
  uint32_t last[5]; /* each size minus one */
  uint16_t box[5];
  uint16_t element_bytes;
  uint64_t strides[4];
  uint8_t rank, swizzle;
} StubMap;

typedef struct {
  int device, capturing;
} StubStream;

const StubGpu *stub_gpu(void);

/* Notes why a call is refused, and returns `code`, with which the call must end. */
CUresult stub_refuse(CUresult code, const char *format, ...) __attribute__((format(printf, 2, 3)));
const char *stub_message(void);

/* The current device of this thread; -1 before the first context is made current. */
int stub_current_device(void);
void stub_set_device(int device);

/* Memory. stub_owner is the device that an address belongs to, or -1. */
void stub_own(uint64_t address, uint64_t bytes, int device);
uint64_t stub_disown(uint64_t address);
void stub_disown_all(void);
int stub_owner(uint64_t address);
uint64_t stub_end_of(uint64_t address);

/* Streams. The default stream (NULL) belongs to whatever device is current. */
StubStream *stub_stream(void *handle);
void *stub_new_stream(int device);
int stub_any_capturing(void);

/* Kernels. stub_read_cubin finds `name` in machine code and returns NULL where it is not there. */
StubKernel *stub_read_cubin(const void *cubin, const char *name);
CUresult stub_check_launch(const CUlaunchConfig *config, StubKernel *kernel, void **parameters);
CUresult stub_check_map(const StubMap *map, unsigned interleave, uint64_t where, const uint32_t *element_strides);
void stub_count_map(void);
void stub_count_copy(int to_device);

#endif
