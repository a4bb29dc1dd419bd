// The untraced services of the Python package; everything that computes is an op of
// torch.ops.halfstep.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <halfstep/cuda.h>
#include <halfstep/overrides.h>
#include <halfstep/version.h>

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    pybind11::dict info;
    info["version"] = HALFSTEP_VERSION;
    info["torch"] = HALFSTEP_TORCH_VERSION;
    info["cuda"] = bool(HALFSTEP_HAVE_CUDA);
    info["cuda_reason"] = HALFSTEP_CUDA_REASON;
    return info;
  });
  m.def("cuda_status", &halfstep::cuda_status);
  m.def("set_overrides", &halfstep::set_overrides, pybind11::arg("enabled"));
  m.def("overrides_enabled", &halfstep::overrides_enabled);
  m.def("cpu_path", &halfstep::cpu_path);
}
