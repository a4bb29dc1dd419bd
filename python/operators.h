#pragma once

#include <pybind11/pybind11.h>

namespace halfstep::python {

/// `Operator`, `TensorList`, `versions`, `pointers`; `release_freed_memory` of csrc/api/memory.h.
void bind_operators(pybind11::module_& m);

}  // namespace halfstep::python
