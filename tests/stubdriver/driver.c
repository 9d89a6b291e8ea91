// In the place of NVIDIA's driver, libcuda.so.1, for Triton on a machine without a GPU: its own launcher runs, each
// launch is written down as a line of JSON, and no kernel runs.  `stub_take` hands the lines out; `stub_record` stops
// and starts the writing, which takes longer than the launch; `stub_label` is JSON that the functions loaded from then
// on carry into their lines; `stub_fail` has one kind of call fail from then on.
//
// Device n is one of compute capability n / 10, n % 10: tests of several kinds of GPU share nothing that Triton keeps
// by device.  Each has 132 multiprocessors, and the shared memory of its kind.

#include <cuda.h>
#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 256 };  // parameters of a kernel

typedef struct {
  char *name, *label;
  unsigned count, sizes[MOST];  // of the parameters, in bytes
} Kernel;

static char *lines, *taken, *label;
static char failing[32];
static size_t length;
static int silent;
static FILE* out;

static CUresult answer(const char* call) { return strcmp(failing, call) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }

const char* stub_take(void) {
  if (out) fclose(out);
  free(taken);
  taken = out ? lines : strdup("");
  out = NULL;
  return taken;
}
void stub_record(int on) { silent = !on; }
void stub_fail(const char* call) { snprintf(failing, sizeof failing, "%s", call); }
void stub_label(const char* text) {
  free(label);
  label = strdup(text);
}

// A module is the binary that was loaded, of which only this is read, as the driver itself does: how large each of a
// kernel's parameters is.  Section .nv.info.NAME is a list of attributes (format, attribute, size of what follows), of
// which 0x17 describes one parameter: its place in the list, and its size in the upper bits of the last word.
CUresult cuModuleLoadData(CUmodule* module, const void* image) { return *module = (void*)image, answer("load"); }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const char* image = (const char*)module;
  const Elf64_Ehdr* file = (const void*)image;
  const Elf64_Shdr* sections = (const void*)(image + file->e_shoff);
  const char* names = image + sections[file->e_shstrndx].sh_offset;
  Kernel* kernel = calloc(1, sizeof *kernel);
  kernel->name = strdup(name);
  kernel->label = strdup(label ? label : "null");
  for (unsigned i = 0; i < file->e_shnum; ++i) {
    const char* section = names + sections[i].sh_name;
    if (strncmp(section, ".nv.info.", 9) || strcmp(section + 9, name)) continue;
    const char *at = image + sections[i].sh_offset, *end = at + sections[i].sh_size;
    while (at < end) {
      unsigned short size = 0, ordinal;
      if (at[0] == 4) memcpy(&size, at + 2, 2);  // the format whose value follows; other values are in these four bytes
      if (at[0] == 4 && at[1] == 0x17) {
        unsigned last;
        memcpy(&ordinal, at + 8, 2);
        memcpy(&last, at + 12, 4);
        if (ordinal >= MOST) return CUDA_ERROR_INVALID_IMAGE;
        kernel->sizes[ordinal] = last >> 18;
        if (ordinal >= kernel->count) kernel->count = ordinal + 1u;
      }
      at += 4 + size;
    }
  }
  *function = (void*)kernel;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* how, CUfunction function, void** parameters, void** extra) {
  if (silent) return answer("launch");
  const Kernel* kernel = (const void*)function;
  unsigned cluster = 1, early = 0, cooperative = 0;
  for (unsigned i = 0; i < how->numAttrs; ++i) {
    const CUlaunchAttribute* each = how->attrs + i;
    if (each->id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) cluster = each->value.clusterDim.x;
    if (each->id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) cooperative = each->value.cooperative;
    if (each->id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) {
      early = each->value.programmaticStreamSerializationAllowed;
    }
  }
  if (!out) out = open_memstream(&lines, &length);
  fprintf(out, "{\"kernel\": \"%s\", \"label\": %s, \"grid\": [%u, %u, %u], \"threads\": [%u, %u, %u], ", kernel->name,
          kernel->label, how->gridDimX, how->gridDimY, how->gridDimZ, how->blockDimX, how->blockDimY, how->blockDimZ);
  fprintf(out, "\"shared\": %u, \"stream\": %zu, \"cluster\": %u, \"early\": %s, \"cooperative\": %s, ",
          how->sharedMemBytes, (size_t)how->hStream, cluster, early ? "true" : "false", cooperative ? "true" : "false");
  fprintf(out, "\"parameters\": [");
  for (unsigned i = 0; i < kernel->count; ++i) {
    fprintf(out, i ? ", \"" : "\"");
    for (unsigned j = 0; j < kernel->sizes[i]; ++j) fprintf(out, "%02x", ((unsigned char**)parameters)[i][j]);
    fprintf(out, "\"");
  }
  fprintf(out, "]}\n");
  return answer("launch");
}
CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned threads_x,
                        unsigned threads_y, unsigned threads_z, unsigned shared, CUstream stream, void** parameters,
                        void** extra) {
  const CUlaunchConfig how = {grid_x, grid_y, grid_z, threads_x, threads_y, threads_z, shared, stream, NULL, 0};
  return cuLaunchKernelEx(&how, function, parameters, extra);
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  const int memory = device / 10 == 12 ? 99 << 10 : device == 80 ? 163 << 10 : 227 << 10;
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = device / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = device % 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = memory; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = memory + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;  // clock rates and the width of the bus
  }
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) { return CUDA_ERROR_NO_DEVICE; }  // whoever else asks finds no GPU; Triton does not ask
CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = (CUcontext)failing, CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)failing, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 90, CUDA_SUCCESS; }  // torch tells Triton the current one
CUresult cuCtxGetLimit(size_t* value, CUlimit which) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit which, size_t value) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr pointer) {
  return *(CUdeviceptr*)value = pointer, answer("pointer");
}
CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig* how) {
  return *clusters = 66, CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return memset(map, 1, sizeof *map), CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  return *text = error == CUDA_ERROR_INVALID_VALUE ? "the stub was told to fail" : "the stub", CUDA_SUCCESS;
}
