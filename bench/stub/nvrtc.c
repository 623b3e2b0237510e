/* NVRTC, by which PyTorch compiles some of its kernels when they are first called (exp2 for one). It is a library of
   its own, because PyTorch looks for its functions in the library of this name. Nothing is compiled. */
#include <stddef.h>
#include <stdlib.h>

#define DOES_NOTHING(name)                                                                                             \
  int name() { return 0; }

int nvrtcCreateProgram(void **program) { return *program = calloc(1, 8), 0; }
DOES_NOTHING(nvrtcDestroyProgram) DOES_NOTHING(nvrtcAddNameExpression) DOES_NOTHING(nvrtcCompileProgram)
DOES_NOTHING(nvrtcGetPTX) DOES_NOTHING(nvrtcGetCUBIN) DOES_NOTHING(nvrtcGetProgramLog)

const char *nvrtcGetErrorString(int error) { return "refused by the stub driver"; }
int nvrtcGetPTXSize(void *program, size_t *size) { return *size = 8, 0; }
int nvrtcGetCUBINSize(void *program, size_t *size) { return *size = 8, 0; }
int nvrtcGetProgramLogSize(void *program, size_t *size) { return *size = 1, 0; }
int nvrtcGetLoweredName(void *program, const char *expression, const char **name) {
  return *name = "compiled_at_run_time", 0;
}

int nvrtcVersion(int *major, int *minor) {
  *major = 13;
  *minor = 0;
  return 0;
}
