#include <torch/library.h>

#include "common.h"

namespace halfstep::cuda {

namespace {

/// What both kinds of step need on the device. `constants`: scratch for one entry a row.
struct Step {
  Place place;
  ops::Gathered work;
  DeviceTable table;
  at::Tensor constants;
  StepState state;

  template <class Args>
  Step(const char* op, const Args& args, size_t constants_size)
      : place(args.params[0]),
        work(ops::gather(args)),
        table(op, place, make_rows(work), args.table),
        constants(place.scratch(int64_t(work.tensors.size() * constants_size))),
        state{args.steps.template mutable_data_ptr<int64_t>(),
              args.overflowed.template mutable_data_ptr<int64_t>(),
              args.lr.template const_data_ptr<double>(),
              args.control ? args.control->template const_data_ptr<double>() : nullptr} {}
};

void adam(const char* op, bool decoupled, const ops::AdamArgs& args) {
  if (args.params.empty()) return;
  ops::check_table(op, args.table, args.params[0], args.params.size(), sizeof(Row));
  const Step step(op, args, sizeof(math::AdamStep));
  const AdamNumbers numbers = {args.beta1, args.beta2,   args.eps,     args.weight_decay,
                               decoupled,  args.amsgrad, args.maximize};
  check(op,
        adam_step(step.table.get(), numbers, step.state,
                  static_cast<math::AdamStep*>(step.constants.data_ptr()), step.place.stream()));
}

void sgd(const ops::SgdArgs& args) {
  const char* op = "sgd_step_";
  if (args.params.empty()) return;
  ops::check_table(op, args.table, args.params[0], args.params.size(), sizeof(Row));
  const Step step(op, args, sizeof(math::SgdStep));
  const SgdNumbers numbers = {args.momentum, args.dampening, args.weight_decay, args.nesterov,
                              args.maximize};
  check(op, sgd_step(step.table.get(), numbers, step.state,
                     static_cast<math::SgdStep*>(step.constants.data_ptr()), step.place.stream()));
}

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

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CUDA, m) {
  m.impl("adamw_step_", ops::adam_op<adam, true>);
  m.impl("adam_step_", ops::adam_op<adam, false>);
  m.impl("sgd_step_", ops::sgd_op<sgd>);
  m.impl("write_masters_", write_masters_);
  m.impl("read_masters", read_masters_cuda);
  m.impl("refresh_masters_", refresh_masters_);
}

}  // namespace halfstep::cuda
