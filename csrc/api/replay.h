#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>

#include <functional>
#include <utility>
#include <vector>

namespace halfstep::api {

/// A copy of the values in FP32 or wider, apart from the graph; of what is not floating, as it is.
at::Tensor widened(const at::Tensor& tensor);

/// Whether an op only shows or casts argument `index`: what it returns is that tensor once more.
bool shows(const c10::FunctionSchema& schema, size_t index);

/// One op, taken down before it runs to be computed once more in FP32 behind it.
class Replay {
 public:
  /// What stands for a tensor among the arguments; `written`: the op writes into it.
  using Substitute = std::function<at::Tensor(const at::Tensor&, bool written)>;

  Replay(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> inputs,
         const Substitute& substitute);
  /// The results. Random numbers fall as they did for the op, and its generators are afterwards
  /// where it left them. Once.
  std::vector<c10::IValue> run();

 private:
  c10::OperatorHandle op_;
  std::vector<c10::IValue> arguments_;
  std::vector<std::pair<at::Generator, at::Tensor>> random_;  ///< states before the op
};

}  // namespace halfstep::api
