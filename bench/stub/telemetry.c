/* NVML, which reads a card's clocks, power and temperature. It gives those of a card at rest. PyTorch also calls NVML
   when the GPU's memory is exhausted. */
#include <string.h>

int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int error) { return "refused by the stub driver"; }
int nvmlDeviceGetCount_v2(unsigned *count) { return *count = 1, 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) { return *device = (void *)uuid, 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device) { return *device = (void *)bus, 0; }
int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count, void *found) { return *count = 0, 0; }
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, void *found) { return *count = 0, 0; }
int nvmlDeviceGetNvLinkRemoteDeviceType(void *device, unsigned link, int *kind) { return *kind = 0, 3; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, void *bus) { return 3; } /* not supported */
int nvmlDeviceGetGpuFabricInfoV(void *device, void *info) { return 3; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { return *version = 13000, 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { return *device = "", 0; }
int nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *reasons) { return *reasons = 0, 0; }
int nvmlDeviceGetClockInfo(void *device, int kind, unsigned *mhz) { return *mhz = 345, 0; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { return *milliwatts = 70000, 0; }
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) { return *celsius = 30, 0; }
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
  strncpy(uuid, "GPU-stub", length);
  return 0;
}
