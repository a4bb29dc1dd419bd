#pragma once

#include <pybind11/pybind11.h>

namespace halfstep::python {

/// `Operator`, `versions` and `pointers` of operators.cpp.
void bind_operators(pybind11::module_& m);

}  // namespace halfstep::python
