#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "common.h"

namespace halfstep::cuda {

namespace {

struct Cuda {
  template <class Rule>
  static void run(const ops::StepArgs& args, const ops::RuleInfo& info,
                  const typename Rule::Numbers& numbers) {
    if (args.params.empty()) return;
    ops::check_table(args.op, args.table, args.params[0], args.params.size(), sizeof(Row));
    const Place place(args.params[0]);
    const ops::Gathered work = ops::gather(args, info);
    const DeviceTable table(args.op, place, make_rows(work), args.table);
    const at::Tensor scratch = place.scratch(step_scratch<Rule>(table.get()));
    StepState state = {args.steps.mutable_data_ptr<int64_t>(),
                       args.overflowed.mutable_data_ptr<int64_t>(),
                       args.lr.const_data_ptr<double>(),
                       args.control ? args.control->const_data_ptr<double>() : nullptr};
    state.ema_decay = args.ema_decay;
    state.seed = args.seed;
    state.zero_grads = !args.zeroed.empty();
    check(args.op, step<Rule>(table.get(), numbers, state, scratch.data_ptr(), place.stream()));
    ops::zero_copied(args, work);
  }
};

void write_masters_(at::TensorList values, at::TensorList params, at::TensorList masters,
                    const at::Tensor& overflowed) {
  ops::check_write_masters(values, params, masters, overflowed);
  if (params.empty()) return;
  const Place place(params[0]);
  const std::vector<at::Tensor> flat = ops::values_for(values, params, masters);
  const DeviceTable table("write_masters_", place,
                          make_rows(ops::gather_masters(params, masters, flat)), {});
  overflowed.zero_();
  check("write_masters_",
        write_masters(table.get(), overflowed.mutable_data_ptr<int64_t>(), place.stream()));
}

std::vector<at::Tensor> read_masters_cuda(at::TensorList params, at::TensorList masters) {
  ops::check_masters("read_masters", params, masters);
  if (params.empty()) return {};
  const Place place(params[0]);
  std::vector<at::Tensor> values = ops::empty_values(params, masters);
  const DeviceTable table("read_masters", place,
                          make_rows(ops::gather_masters(params, masters, values)), {});
  check("read_masters", read_masters(table.get(), place.stream()));
  return values;
}

void refresh_masters_(at::TensorList params, at::TensorList masters, const at::Tensor& changed,
                      bool dry_run) {
  ops::check_refresh_masters(params, masters, changed);
  if (params.empty()) return;
  const Place place(params[0]);
  const DeviceTable table("refresh_masters_", place,
                          make_rows(ops::gather_masters(params, masters, {})), {});
  changed.zero_();
  check("refresh_masters_",
        refresh_masters(table.get(), dry_run, changed.mutable_data_ptr<int64_t>(), place.stream()));
}

/// One narrow state as a table of one row whose parameter is `value`.
DeviceTable state_table(const char* op, const Place& place, const at::Tensor& value,
                        const at::Tensor& state, const at::Tensor& scale) {
  math::StepTensor t;
  t.param = const_cast<void*>(value.const_data_ptr());
  t.state[0] = state.data_ptr();
  t.state_kind = ops::state_code(state.scalar_type());
  if (t.state_kind == math::StateKind::kInt8) t.exponent[0] = scale.data_ptr<int8_t>();
  return DeviceTable(op, place, make_rows({t}, {state.numel()}, {0}), {});
}

at::Tensor read_state_cuda(const at::Tensor& state, const at::Tensor& scale, bool is_signed) {
  ops::check_state("read_state", state, scale, is_signed);
  at::Tensor value = at::empty_like(state, state.options().dtype(at::kFloat));
  const Place place(state);
  const DeviceTable table = state_table("read_state", place, value, state, scale);
  check("read_state", read_state(table.get(), is_signed, place.stream()));
  return value;
}

void write_state_cuda(const at::Tensor& value, const at::Tensor& state, const at::Tensor& scale,
                      bool is_signed, int64_t seed) {
  ops::check_state("write_state_", state, scale, is_signed);
  ops::check_state_value(value, state);
  const at::Tensor flat = ops::in_layout_of(value, state);
  const Place place(state);
  const DeviceTable table = state_table("write_state_", place, flat, state, scale);
  check("write_state_",
        write_state(table.get(), is_signed, math::random_key(seed, 0, 0), place.stream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CUDA, m) {
  ops::register_steps<Cuda>(m);
  m.impl("read_state", read_state_cuda);
  m.impl("write_state_", write_state_cuda);
  m.impl("write_masters_", write_masters_);
  m.impl("read_masters", read_masters_cuda);
  m.impl("refresh_masters_", refresh_masters_);
}

}  // namespace halfstep::cuda
