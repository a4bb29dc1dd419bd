// What a step asks of a thousand parameters. Through torch.ops a tensor in a list costs some 70 ns,
// and a Python loop as much an element, which is most of a step over small tensors.

#include "operators.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "../csrc/api/memory.h"

namespace halfstep::python {

namespace py = pybind11;

namespace {

/// The items of a list or tuple of tensors, one by one.
template <class F>
void for_each_item(const std::string& name, py::handle value, const F& body) {
  if (!PyList_Check(value.ptr()) && !PyTuple_Check(value.ptr()))
    throw py::type_error(name + " is " + Py_TYPE(value.ptr())->tp_name + "; expected a list");
  PyObject** items = PySequence_Fast_ITEMS(value.ptr());
  for (Py_ssize_t i = 0, n = PySequence_Fast_GET_SIZE(value.ptr()); i < n; ++i) body(items[i], i);
}

const at::Tensor& tensor_of(const std::string& name, PyObject* item, Py_ssize_t index = -1) {
  if (THPVariable_Check(item)) return THPVariable_Unpack(item);
  const std::string place = index < 0 ? name : name + '[' + std::to_string(index) + ']';
  throw py::type_error(place + " is " + Py_TYPE(item)->tp_name + "; expected a tensor");
}

template <class T>
T number(const std::string& name, py::handle value, const char* expected) {
  try {
    if (!value.is_none()) return value.cast<T>();
  } catch (const py::cast_error&) {
  }
  throw py::type_error(name + " is " + std::string(py::repr(value)) + "; expected " + expected);
}

template <class T>
c10::List<T> list_of(const std::string& name, py::handle value) {
  c10::List<T> list;
  for_each_item(name, value, [&](PyObject* item, Py_ssize_t i) {
    if constexpr (std::is_same_v<T, std::optional<at::Tensor>>)
      if (item == Py_None) return list.push_back(std::nullopt);
    list.push_back(tensor_of(name, item, i));
  });
  return list;
}

/// A list of tensors as ops take it, kept between calls while the Python list holds the same
/// objects. torch takes the GIL for each tensor that only Python holds when C++ takes a reference
/// to it and when it gives it back: with one kept here it does not.
class TensorList {
 public:
  TensorList& of(const py::list& tensors) {
    if (!holds(tensors)) {
      list_ = list_of<at::Tensor>("tensors", tensors);
      items_.clear();
      for (const py::handle item : tensors)
        items_.push_back(py::reinterpret_borrow<py::object>(item));
    }
    return *this;
  }
  const c10::List<at::Tensor>& list() const { return list_; }

 private:
  bool holds(const py::list& tensors) const {
    if (tensors.size() != items_.size()) return false;
    for (size_t i = 0; i < items_.size(); ++i)
      if (PyList_GET_ITEM(tensors.ptr(), Py_ssize_t(i)) != items_[i].ptr()) return false;
    return true;
  }

  /// The objects, so that none is taken for a later one at its address.
  std::vector<py::object> items_;
  c10::List<at::Tensor> list_;
};

c10::IValue convert(const std::string& name, py::handle value, const c10::Type& type) {
  switch (type.kind()) {
    case c10::TypeKind::OptionalType:
      return value.is_none()
                 ? c10::IValue()
                 : convert(name, value, *type.castRaw<c10::OptionalType>()->getElementType());
    case c10::TypeKind::TensorType:
      return tensor_of(name, value.ptr());
    case c10::TypeKind::FloatType:
      return number<double>(name, value, "a number");
    case c10::TypeKind::IntType:
      return number<int64_t>(name, value, "an integer");
    case c10::TypeKind::BoolType:
      return number<bool>(name, value, "a bool");
    case c10::TypeKind::ListType: {
      const c10::Type& element = *type.castRaw<c10::ListType>()->getElementType();
      if (element.kind() == c10::TypeKind::TensorType)
        return py::isinstance<TensorList>(value)
                   ? c10::IValue(value.cast<const TensorList&>().list())
                   : list_of<at::Tensor>(name, value);
      if (element.kind() == c10::TypeKind::OptionalType)
        return list_of<std::optional<at::Tensor>>(name, value);
      return value.cast<std::vector<int64_t>>();
    }
    default:
      throw py::type_error(name + ": no conversion to " + type.str());
  }
}

/// torch.ops.halfstep.<name> for eager calls. It goes through the dispatcher as that does (modes,
/// profiler, the tensors' own __torch_dispatch__), but not through __torch_function__.
class Operator {
 public:
  explicit Operator(const std::string& name)
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(("halfstep::" + name).c_str(), "")) {
  }

  py::object operator()(const py::args& args, const py::kwargs& kwargs) const {
    const auto& wanted = handle_.schema().arguments();
    if (args.size() > wanted.size())
      throw py::type_error(handle_.schema().name() + " takes " + std::to_string(wanted.size()) +
                           " arguments but was given " + std::to_string(args.size()));
    torch::jit::Stack stack;
    stack.reserve(wanted.size());
    size_t named = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      const std::string& name = wanted[i].name();
      if (i < args.size()) {
        stack.push_back(convert(name, args[i], *wanted[i].type()));
      } else if (kwargs.contains(name)) {
        stack.push_back(convert(name, kwargs[name.c_str()], *wanted[i].type()));
        ++named;
      } else {
        throw py::type_error(handle_.schema().name() + ": argument '" + name + "' is missing");
      }
    }
    if (named < kwargs.size())
      throw py::type_error(handle_.schema().name() + " was given an argument it does not take");
    {
      const py::gil_scoped_release release;
      handle_.callBoxed(&stack);
    }
    return stack.empty() ? py::none() : py::cast(stack.front().toTensor());
  }

 private:
  c10::OperatorHandle handle_;
};

/// int64 values of `tensors` as bytes, which Python compares at once.
template <class F>
py::bytes numbers(py::handle tensors, const F& number) {
  std::vector<int64_t> values;
  for_each_item("tensors", tensors, [&](PyObject* item, Py_ssize_t i) {
    values.push_back(number(tensor_of("tensors", item, i)));
  });
  return py::bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(int64_t));
}

}  // namespace

void bind_operators(py::module_& m) {
  py::class_<Operator>(m, "Operator")
      .def(py::init<const std::string&>(), py::arg("name"))
      .def("__call__", torch::wrap_pybind_function(
                           [](const Operator& self, const py::args& args,
                              const py::kwargs& kwargs) { return self(args, kwargs); }));
  py::class_<TensorList>(m, "TensorList")
      .def(py::init())
      .def("of", &TensorList::of, py::arg("tensors"), py::return_value_policy::reference_internal);
  m.def("release_freed_memory", &api::release_freed_memory,
        py::call_guard<py::gil_scoped_release>());
  m.def("versions", torch::wrap_pybind_function([](const py::object& tensors) {
          return numbers(tensors, [](const at::Tensor& t) { return int64_t(t._version()); });
        }));
  m.def("pointers", torch::wrap_pybind_function([](const py::object& tensors) {
          return numbers(tensors, [](const at::Tensor& t) {
            return int64_t(reinterpret_cast<intptr_t>(t.data_ptr()));
          });
        }));
}

}  // namespace halfstep::python
