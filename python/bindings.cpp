// The untraced services of the Python package; everything that computes is an op of
// torch.ops.halfstep.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <halfstep/cuda.h>
#include <halfstep/nonfinite.h>
#include <halfstep/overrides.h>
#include <halfstep/shares.h>
#include <halfstep/tensorboard.h>
#include <halfstep/version.h>

#include "operators.h"

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
  halfstep::python::bind_operators(m);

  using halfstep::NonFinite;
  using halfstep::NonFiniteFinder;
  pybind11::class_<NonFinite>(m, "NonFinite")
      .def_readonly("producer", &NonFinite::producer)
      .def_readonly("phase", &NonFinite::phase)
      .def_readonly("module", &NonFinite::module)
      .def_readonly("call", &NonFinite::call)
      .def_readonly("op", &NonFinite::op)
      .def_readonly("node", &NonFinite::node)
      .def_readonly("role", &NonFinite::role)
      .def_readonly("tensor", &NonFinite::tensor)
      .def_readonly("index", &NonFinite::index)
      .def_readonly("value", &NonFinite::value)
      .def_readonly("dtype", &NonFinite::dtype)
      .def_readonly("largest_input", &NonFinite::largest_input)
      .def_readonly("swallowed_by", &NonFinite::swallowed_by)
      .def("__str__", &NonFinite::message);
  // Other threads run while it looks: a backward on a device has its own.
  pybind11::class_<NonFiniteFinder>(m, "NonFiniteFinder")
      .def(pybind11::init<const NonFiniteFinder::Named&>(), pybind11::arg("parameters"))
      .def("enter", &NonFiniteFinder::enter)
      .def("leave", &NonFiniteFinder::leave)
      .def("set_phase", &NonFiniteFinder::set_phase)
      .def("finish", &NonFiniteFinder::finish,
           pybind11::call_guard<pybind11::gil_scoped_release>());

  // The numbers of halfstep._shares.Shares, in the order of its fields.
  m.def(
      "shares",
      [](const at::Tensor& reference, double scale, const std::optional<at::Tensor>& stored) {
        const auto s = halfstep::shares(reference, scale, stored.value_or(at::Tensor()));
        return std::make_tuple(s.count, s.nonzero, s.underflow, s.subnormal, s.overflow,
                               s.saturated, s.lost, s.amax);
      },
      pybind11::arg("reference"), pybind11::arg("scale"), pybind11::arg("stored"));
  m.def("tensorboard_first_record", [](double wall_time) {
    return pybind11::bytes(halfstep::TensorBoardWriter::first_record(wall_time));
  });
  m.def("tensorboard_record",
        [](const std::string& tag, double value, int64_t step, double wall_time) {
          return pybind11::bytes(halfstep::TensorBoardWriter::record(tag, value, step, wall_time));
        });
}
