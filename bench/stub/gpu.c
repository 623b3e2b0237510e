/* The state of the GPUs that are not there, and the rules that a launch and a tensor map must keep: those of the CUDA
   driver API ("Execution Control", "Tensor Map Object Management") and of the programming guide ("Compute
   Capabilities"). */
#include "gpu.h"
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_RANGES 65536
#define DEFAULT_SHARED 49152 /* bytes of dynamic shared memory that need no attribute */

typedef struct {
  uint64_t begin, end;
  int device;
} Range;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Range ranges[MAX_RANGES];
static int num_ranges, capturing;
static long launches, maps, refused, copies_in, copies_out;
static char message[512] = "no call was refused";
static StubLaunch last_launch;
static _Thread_local int current = -1;

/* The variable CLIPFAST_STUB_GPU holds the numbers of a StubGpu in the order of its fields. */
const StubGpu *stub_gpu(void) {
  static StubGpu gpu = {90, 2, 132, 232448, 233472, 65536};
  static int is_read = 0;
  if (!is_read) {
    const char *text = getenv("CLIPFAST_STUB_GPU");
    if (text)
      sscanf(text, "%d %d %d %d %d %d", &gpu.arch, &gpu.devices, &gpu.multiprocessors, &gpu.block_shared, &gpu.shared,
             &gpu.registers);
    is_read = 1;
  }
  return &gpu;
}

CUresult stub_refuse(CUresult code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  pthread_mutex_lock(&lock);
  refused++;
  vsnprintf(message, sizeof message, format, arguments);
  pthread_mutex_unlock(&lock);
  va_end(arguments);
  return code;
}

const char *stub_message(void) { return message; }
int stub_current_device(void) { return current; }
void stub_set_device(int device) { current = device; }

/* --- memory --- */

void stub_own(uint64_t address, uint64_t bytes, int device) {
  pthread_mutex_lock(&lock);
  if (num_ranges < MAX_RANGES && bytes) ranges[num_ranges++] = (Range){address, address + bytes, device};
  pthread_mutex_unlock(&lock);
}

uint64_t stub_disown(uint64_t address) {
  uint64_t bytes = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < num_ranges; i++) {
    if (ranges[i].begin == address) {
      bytes = ranges[i].end - ranges[i].begin;
      ranges[i] = ranges[--num_ranges];
      break;
    }
  }
  pthread_mutex_unlock(&lock);
  return bytes;
}

void stub_disown_all(void) { num_ranges = 0; }

static Range find(uint64_t address) {
  Range found = {0, 0, -1};
  pthread_mutex_lock(&lock);
  for (int i = 0; i < num_ranges && found.device < 0; i++)
    if (ranges[i].begin <= address && address < ranges[i].end) found = ranges[i];
  pthread_mutex_unlock(&lock);
  return found;
}

int stub_owner(uint64_t address) { return find(address).device; }
uint64_t stub_end_of(uint64_t address) { return find(address).end; }

/* --- streams --- */

StubStream *stub_stream(void *handle) {
  /* the legacy default stream, and the default stream of this thread */
  static _Thread_local StubStream standard;
  if ((uintptr_t)handle > 2) return handle;
  standard.device = current < 0 ? 0 : current;
  return &standard;
}

void *stub_new_stream(int device) {
  StubStream *stream = calloc(1, sizeof *stream);
  stream->device = device;
  return stream;
}

void stub_begin_capture(void *stream) {
  __atomic_add_fetch(&capturing, 1, __ATOMIC_SEQ_CST);
  stub_stream(stream)->capturing = 1;
}

void stub_end_capture(void *stream) {
  __atomic_sub_fetch(&capturing, 1, __ATOMIC_SEQ_CST);
  stub_stream(stream)->capturing = 0;
}

int stub_any_capturing(void) { return __atomic_load_n(&capturing, __ATOMIC_SEQ_CST) > 0; }

/* --- launches --- */

static CUresult check_sizes(const CUlaunchConfig *config, const StubKernel *kernel) {
  const StubGpu *gpu = stub_gpu();
  unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  if (!config->gridDimX || !config->gridDimY || !config->gridDimZ)
    return stub_refuse(CUDA_ERROR_INVALID_VALUE, "launch of %s: an empty grid", kernel->name);
  if (config->gridDimX > 0x7fffffffu || config->gridDimY > 65535 || config->gridDimZ > 65535)
    return stub_refuse(CUDA_ERROR_INVALID_VALUE, "launch of %s: grid (%u, %u, %u), allowed (2147483647, 65535, 65535)",
                       kernel->name, config->gridDimX, config->gridDimY, config->gridDimZ);
  if (!threads || threads > 1024 || config->blockDimZ > 64 || (int)threads > kernel->max_threads)
    return stub_refuse(CUDA_ERROR_INVALID_VALUE, "launch of %s: %u threads per block, %d allowed", kernel->name,
                       threads, kernel->max_threads < 1024 ? kernel->max_threads : 1024);
  int room = gpu->block_shared - kernel->static_shared;
  int limit = kernel->dynamic_limit < room ? kernel->dynamic_limit : room;
  if ((int)config->sharedMemBytes > limit)
    return stub_refuse(CUDA_ERROR_INVALID_VALUE, "launch of %s: %u bytes of shared memory, %d allowed on sm_%d",
                       kernel->name, config->sharedMemBytes, limit, gpu->arch);
  /* registers are given to whole warps, in units of 256 */
  int of_warp = (kernel->registers * 32 + 255) / 256 * 256;
  int of_block = of_warp * (int)((threads + 31) / 32);
  if (of_block > gpu->registers)
    return stub_refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "launch of %s: %d registers for a block, %d exist",
                       kernel->name, of_block, gpu->registers);
  return CUDA_SUCCESS;
}

static CUresult check_pointer(const StubKernel *kernel, int index, uint64_t address) {
  if (!address) return CUDA_SUCCESS;
  int owner = stub_owner(address);
  if (owner == current) return CUDA_SUCCESS;
  if (owner < 0)
    return stub_refuse(CUDA_ERROR_ILLEGAL_ADDRESS, "launch of %s: argument %d, %#llx, is no address of a GPU", kernel->name,
                       index, (unsigned long long)address);
  return stub_refuse(CUDA_ERROR_ILLEGAL_ADDRESS, "launch of %s: argument %d is memory of device %d, the current is %d",
                     kernel->name, index, owner, current);
}

static CUresult check_parameters(StubKernel *kernel, void **parameters) {
  for (int i = 0; i < kernel->num_params; i++) {
    const StubParam *param = &kernel->params[i];
    if (!parameters[i]) return stub_refuse(CUDA_ERROR_INVALID_VALUE, "launch of %s: argument %d is missing", kernel->name, i);
    uint64_t address = 0;
    if (param->size == 128 && !memcmp(parameters[i], &(uint64_t){MAP_MAGIC}, 8))
      address = ((const StubMap *)parameters[i])->base;
    else if (param->size == 128)
      return stub_refuse(CUDA_ERROR_INVALID_VALUE, "launch of %s: argument %d is no tensor map", kernel->name, i);
    else if (param->is_pointer)
      memcpy(&address, parameters[i], 8);
    CUresult result = check_pointer(kernel, i, address);
    if (result) return result;
    if (param->offset + param->size <= MAX_PARAM_BYTES)
      memcpy(last_launch.bytes + param->offset, parameters[i], param->size);
    last_launch.offsets[i] = param->offset;
    last_launch.sizes[i] = param->size;
  }
  return CUDA_SUCCESS;
}

CUresult stub_check_launch(const CUlaunchConfig *config, StubKernel *kernel, void **parameters) {
  if (current < 0) return stub_refuse(CUDA_ERROR_INVALID_CONTEXT, "launch of %s: no device is current", kernel->name);
  StubStream *stream = stub_stream(config->hStream);
  if (stream->device != current)
    return stub_refuse(CUDA_ERROR_INVALID_HANDLE, "launch of %s: its stream is of device %d, the current is %d",
                       kernel->name, stream->device, current);
  CUresult result = check_sizes(config, kernel);
  if (!result) result = check_parameters(kernel, parameters);
  if (result) return result;
  launches++;
  memcpy(last_launch.name, kernel->name, sizeof kernel->name);
  memcpy(last_launch.grid, &config->gridDimX, sizeof last_launch.grid);
  memcpy(last_launch.block, &config->blockDimX, sizeof last_launch.block);
  last_launch.shared = (int)config->sharedMemBytes;
  last_launch.registers = kernel->registers;
  last_launch.device = current;
  last_launch.stream = (uint64_t)config->hStream;
  last_launch.num_params = kernel->num_params;
  return CUDA_SUCCESS;
}

/* --- tensor maps --- */

static CUresult check_extent(const StubMap *map) {
  uint64_t end = stub_end_of(map->base), size = (map->last[0] + 1ull) * map->element_bytes;
  for (int i = 1; i < map->rank; i++) size += map->strides[i - 1] * map->last[i];
  if (end && map->base + size > end)
    return stub_refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: it reaches %llu bytes past its tensor",
                       (unsigned long long)(map->base + size - end));
  return CUDA_SUCCESS;
}

static CUresult check_box(const StubMap *map, unsigned interleave) {
  static const unsigned SPANS[] = {0, 32, 64, 128, 128, 128, 128}; /* by CUtensorMapSwizzle */
  unsigned inner = map->box[0] * map->element_bytes, span = map->swizzle < 7 ? SPANS[map->swizzle] : 0;
  uint64_t bytes = map->element_bytes;
  for (int i = 0; i < map->rank; i++) {
    if (!map->box[i] || map->box[i] > 256)
      return stub_refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: box dimension %d is %u, allowed are 1 to 256", i,
                         map->box[i]);
    bytes *= map->box[i];
  }
  if (!interleave && inner % 16)
    return stub_refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: the inner box of %u bytes is no multiple of 16", inner);
  if (span && inner > span)
    return stub_refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: the inner box of %u bytes is wider than its swizzle of %u",
                       inner, span);
  if (bytes > (uint64_t)stub_gpu()->block_shared)
    return stub_refuse(CUDA_ERROR_INVALID_VALUE, "tensor map: a box of %llu bytes, %d fit into shared memory",
                       (unsigned long long)bytes, stub_gpu()->block_shared);
  return CUDA_SUCCESS;
}

CUresult stub_check_map(const StubMap *map, unsigned interleave, uint64_t where, const uint32_t *element_strides) {
  CUresult bad = CUDA_ERROR_INVALID_VALUE;
  unsigned align = interleave == 2 ? 32 : 16;
  if (stub_gpu()->arch < 90) return stub_refuse(CUDA_ERROR_NOT_SUPPORTED, "tensor map: sm_%d has none", stub_gpu()->arch);
  if (where % 64) return stub_refuse(bad, "tensor map: it is not aligned to 64 bytes");
  if (map->base % align) return stub_refuse(bad, "tensor map: the base is not aligned to %u bytes", align);
  if (!map->element_bytes) return stub_refuse(bad, "tensor map: unknown type of elements");
  if (map->rank < 1 || map->rank > 5 || (interleave && map->rank < 3))
    return stub_refuse(bad, "tensor map: rank %d", map->rank);
  for (int i = 0; i < map->rank; i++)
    if (!element_strides[i] || element_strides[i] > 8)
      return stub_refuse(bad, "tensor map: element stride %u, allowed are 1 to 8", element_strides[i]);
  for (int i = 0; i + 1 < map->rank; i++) {
    uint64_t stride = map->strides[i], least = i ? map->strides[i - 1] : (map->last[0] + 1ull) * map->element_bytes;
    unsigned long long shown = stride;
    if (stride % align || stride >= 1ull << 40)
      return stub_refuse(bad, "tensor map: stride %llu must be a multiple of %u below 2^40", shown, align);
    if (stride < least) return stub_refuse(bad, "tensor map: stride %llu is below its row of %llu bytes", shown, (unsigned long long)least);
    if (i && stride % map->strides[i - 1])
      return stub_refuse(bad, "tensor map: stride %llu is no multiple of the one before it", shown);
  }
  CUresult result = check_box(map, interleave);
  return result ? result : check_extent(map);
}

/* --- what Python reads --- */

void stub_count_map(void) { maps++; }
void stub_count_copy(int to_device) { *(to_device ? &copies_in : &copies_out) += 1; }
long stub_launches(void) { return launches; }
long stub_maps(void) { return maps; }
long stub_refused(void) { return refused; }
long stub_copies_in(void) { return copies_in; }
long stub_copies_out(void) { return copies_out; }
const StubLaunch *stub_last_launch(void) { return &last_launch; }
