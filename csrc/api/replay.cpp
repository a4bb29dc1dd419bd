#include "replay.h"

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <mutex>

#include "observe.h"

namespace halfstep::api {

namespace {

/// The names that the schema gives to what it shares; those of a list are one level below.
std::vector<c10::Symbol> shared_names(const c10::Argument& argument) {
  std::vector<c10::Symbol> names;
  const c10::AliasInfo* info = argument.alias_info();
  if (!info || is_written(argument)) return names;
  names.assign(info->beforeSets().begin(), info->beforeSets().end());
  for (const auto& inner : info->containedTypes())
    names.insert(names.end(), inner.beforeSets().begin(), inner.beforeSets().end());
  return names;
}

bool is_dtype(const c10::Argument& argument) {
  c10::TypePtr type = argument.real_type();
  if (const auto optional = type->cast<c10::OptionalType>()) type = optional->getElementType();
  return type->kind() == c10::TypeKind::ScalarTypeType;
}

c10::IValue replaced(const c10::IValue& value, const c10::Argument& argument,
                     const Replay::Substitute& substitute) {
  const auto stands = [&](const at::Tensor& tensor) {
    return tensor.defined() ? substitute(tensor, is_written(argument)) : tensor;
  };
  if (value.isTensor()) return stands(value.toTensor());
  if (value.isInt() && is_dtype(argument)) {  // a cast to 16 bits is none
    const auto type = c10::ScalarType(value.toInt());
    return c10::isReducedFloatingType(type) ? int64_t(at::kFloat) : value.toInt();
  }
  bool any = false;
  each_tensor(value, [&](const at::Tensor&, int64_t) { any = true; });
  if (!any) return value;
  c10::List<c10::IValue> items = value.toList().copy();
  for (size_t i = 0; i < items.size(); ++i) {
    const c10::IValue item = items.get(i);
    if (item.isTensor()) items.set(i, stands(item.toTensor()));
  }
  return items;
}

at::Tensor state_of(at::Generator& generator) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}
void set_state(at::Generator& generator, const at::Tensor& state) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

/// Those that an op with these arguments may draw from.
std::vector<at::Generator> generators_of(c10::ArrayRef<c10::IValue> inputs) {
  std::vector<at::Generator> found = {at::globalContext().defaultGenerator(at::kCPU)};
  const auto add = [&](const at::Generator& generator) {
    if (std::find(found.begin(), found.end(), generator) == found.end()) found.push_back(generator);
  };
  for (const auto& input : inputs) {
    if (input.isGenerator()) add(input.toGenerator());
    each_tensor(input, [&](const at::Tensor& t, int64_t) {
      if (t.defined() && !t.is_cpu() && !t.is_meta())
        add(at::globalContext().defaultGenerator(t.device()));
    });
  }
  return found;
}

/// Inside, the generators that an op moved draw what it drew; at the end they are as now.
class Rewound {
 public:
  explicit Rewound(std::vector<std::pair<at::Generator, at::Tensor>>& before) {
    for (auto& [generator, state] : before) {
      const at::Tensor now = state_of(generator);
      if (at::equal(now, state)) continue;
      now_.emplace_back(generator, now);
      set_state(generator, state);
    }
  }
  ~Rewound() {
    for (auto& [generator, state] : now_) set_state(generator, state);
  }
  Rewound(const Rewound&) = delete;
  Rewound& operator=(const Rewound&) = delete;

 private:
  std::vector<std::pair<at::Generator, at::Tensor>> now_;
};

}  // namespace

at::Tensor widened(const at::Tensor& tensor) {
  const at::Tensor values = tensor.detach();
  if (!tensor.is_floating_point()) return values.clone();
  return values.to(c10::promoteTypes(tensor.scalar_type(), at::kFloat), false, /*copy=*/true);
}

bool shows(const c10::FunctionSchema& schema, size_t index) {
  static constexpr std::array kCopies = {"aten::_to_copy", "aten::clone"};
  if (index == 0 && std::find(kCopies.begin(), kCopies.end(), schema.name()) != kCopies.end())
    return true;
  const auto given = shared_names(schema.arguments()[index]);
  const auto is_given = [&](const c10::Symbol& name) {
    return std::find(given.begin(), given.end(), name) != given.end();
  };
  return std::any_of(schema.returns().begin(), schema.returns().end(), [&](const auto& result) {
    const auto names = shared_names(result);
    return std::any_of(names.begin(), names.end(), is_given);
  });
}

Replay::Replay(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> inputs,
               const Substitute& substitute)
    : op_(op) {
  for (auto& generator : generators_of(inputs))
    random_.emplace_back(generator, state_of(generator));
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i)
    arguments_.push_back(replaced(inputs[i], arguments[i], substitute));
}

std::vector<c10::IValue> Replay::run() {
  const Unobserved unobserved;
  const at::AutoGradMode grad_mode(true);
  const Rewound rewound(random_);
  op_.callBoxed(arguments_);
  return std::move(arguments_);
}

}  // namespace halfstep::api
