// libhalfstep_cuda.so is a library of its own, so that a CPU-only build is libhalfstep.so and
// nothing else. It lies beside libhalfstep.so and is loaded with it wherever the process has a CUDA
// torch, so that a program links one library whatever the machine.

#include <dlfcn.h>
#include <halfstep/cuda.h>
#include <limits.h>
#include <unistd.h>

#include <ATen/Context.h>

#include <cstdlib>
#include <string>

namespace halfstep {

namespace {

struct CudaLibrary {
  bool present = false, loaded = false;
  std::string error;

  CudaLibrary() {
    // Only where torch's CUDA side is in the process already; nothing is pulled in.
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch_cuda) dlclose(torch_cuda);
    Dl_info own;
    if (!dladdr(reinterpret_cast<void*>(&cuda_status), &own) || !own.dli_fname) return;
    // Not std::filesystem: libtorch exports an older copy of it.
    char resolved[PATH_MAX];
    if (!realpath(own.dli_fname, resolved)) return;
    std::string path = resolved;
    path = path.substr(0, path.rfind('/') + 1) + "libhalfstep_cuda.so";
    present = access(path.c_str(), R_OK) == 0;
    if (!present || !torch_cuda) return;
    loaded = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr;
    if (!loaded) error = dlerror();
  }
};

const CudaLibrary& cuda_library() {
  static const CudaLibrary library;
  return library;
}

// At load, so that the CUDA kernels are there before the first op is called.
[[maybe_unused]] const bool kLoaded = cuda_library().loaded;

}  // namespace

std::string cuda_status() {
  const CudaLibrary& library = cuda_library();
  if (!library.present) return "not built";
  if (!library.error.empty()) return "not loaded (" + library.error + ")";
  if (!library.loaded) return "not loaded (this process has no CUDA torch)";
  return at::hasCUDA() && at::getNumGPUs() > 0 ? "ready" : "no device";
}

}  // namespace halfstep
