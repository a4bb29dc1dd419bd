// A scale for each of several losses, and scale_gradient.

#include "api.h"

using namespace halfstep;

namespace {

/// Gradients 2^27 apart, an overflow of the first in one iteration and no first in every fifth.
std::vector<double> two_losses(GradScaler& first, int64_t at_first, GradScaler& second,
                               int64_t at_second, std::vector<at::Tensor>& weights) {
  weights = {torch::ones({64}, torch::requires_grad()),
             torch::ones({64}, torch::kHalf).set_requires_grad(true)};
  optim::AdamW one({weights[0]}, optim::AdamWOptions(1e-2));
  optim::SGD two({weights[1]}, optim::SGDOptions(1e-6));
  std::vector<double> log;
  for (int i = 0; i < 30; ++i) {
    const bool active = i % 5 != 4;
    one.zero_grad(), two.zero_grad();
    const double bad = i == 7 ? INFINITY : 1.0;
    if (active) first.scale((weights[0] * weights[0]).sum() * 0x1p-18 * bad, at_first).backward();
    second.scale(weights[1].to(torch::kFloat).square().sum() * 0x1p9, at_second).backward();
    if (active) first.step(one, nullptr, at_first);
    if (i % 3 == 0) second.clip_grad_norm_({&two}, 1.0, 2.0, at_second);
    second.step(two, nullptr, at_second);
    if (active && &first != &second) first.update();
    second.update();
    log.insert(log.end(), {first.get_scale(at_first), second.get_scale(at_second),
                           double(first.stats(at_first).steps_skipped),
                           double(second.stats(at_second).steps_skipped)});
  }
  return log;
}

GradScalerOptions quick(int64_t losses) {
  return GradScalerOptions()
      .policy(policies::Dynamic().init_scale(0x1p14).growth_interval(3))
      .losses(losses);
}

}  // namespace

TEST_CASE("each loss is in lock-step with a scaler of its own", "[api]") {
  GradScaler both(quick(2)), a(quick(1)), b(quick(1));
  std::vector<at::Tensor> ours, twins;
  const auto log = two_losses(both, 0, both, 1, ours);
  CHECK(log == two_losses(a, 0, b, 0, twins));
  CHECK(torch::equal(ours[0], twins[0]));
  CHECK(torch::equal(ours[1], twins[1]));
  CHECK(both.losses() == 2);
  CHECK(both.get_scale(0) > 0x1p18);
  CHECK(both.get_scale(1) < 0x1p14);
  CHECK(torch::equal(both.scales(),
                     torch::tensor({float(both.get_scale(0)), float(both.get_scale(1))})));
}

TEST_CASE("a part of a model has a scale of its own", "[api]") {
  // The part's gradients are 2^-30 of the rest's, which no one scale suits.
  at::Tensor part = torch::full({64}, 8.0, torch::kHalf).set_requires_grad(true);
  at::Tensor rest = torch::full({64}, 0.5, torch::kHalf).set_requires_grad(true);
  optim::SGD first({rest}, optim::SGDOptions(1e-3)), second({part}, optim::SGDOptions(1e-3));
  GradScaler scaler(quick(2).device(torch::kCPU));
  CHECK(scaler.scales().equal(torch::tensor({0x1p14f, 0x1p14f})));
  for (int i = 0; i < 80; ++i) {
    first.zero_grad(), second.zero_grad();
    const auto ratio = scaler.scales()[1] / scaler.scales()[0];
    auto h = functional::scale_gradient(part * 1, 0x1p-20);
    h = functional::scale_gradient(functional::scale_gradient(h, ratio), 0x1p-10);
    scaler.scale((h * rest).to(torch::kFloat).sum(), 0).backward();
    scaler.step(first, nullptr, 0), scaler.step(second, nullptr, 1);
    scaler.update();
  }
  CHECK(scaler.get_scale(1) / scaler.get_scale(0) >= 0x1p8);
  CHECK(scaler.stats(0).steps_applied > 40);
  CHECK(part.grad().count_nonzero().item<int64_t>() == 64);

  GradScaler off(quick(2).enabled(false)), unknown(quick(2));
  CHECK(off.scales().equal(torch::ones({2})));
  CHECK(off.get_scale() == 1);
  GradScaler loaded(quick(2).device(torch::kCPU)), read(quick(2).device(torch::kCPU));
  loaded.load_state_dict(scaler.state_dict());
  CHECK(loaded.scales().equal(scaler.scales()));
  CHECK(read.scale_tensor(1).item<float>() == 0x1p14f);  // and nothing is made by that
  CHECK(has(message_of([&] { read.step(first); }), "step: nothing was scaled yet"));
  CHECK(has(message_of([&] { unknown.scales(); }), "scales: nothing was scaled yet"));
}

TEST_CASE("the states of several losses are saved, and refused for another number", "[api]") {
  GradScaler both(quick(2)), fresh(quick(2)), single(quick(1));
  std::vector<at::Tensor> weights;
  two_losses(both, 0, both, 1, weights);
  fresh.load_state_dict(both.state_dict());
  CHECK(fresh.get_scale(0) == both.get_scale(0));
  CHECK(fresh.get_scale(1) == both.get_scale(1));
  CHECK(fresh.stats(1).steps_skipped == both.stats(1).steps_skipped);
  CHECK(has(message_of([&] { single.load_state_dict(both.state_dict()); }),
            "scaler state is of 2 losses but this GradScaler has losses=1"));
  CHECK(has(message_of([&] { both.load_state_dict(single.state_dict()); }),
            "scaler state is of 1 loss but this GradScaler has losses=2"));
  CHECK(has(message_of([&] { both.state_dict("torch"); }), "the state of torch holds one scale"));
  GradScaler apex(GradScalerOptions().policy(policies::preset("apex")).losses(2));
  StateDict state, entry;
  entry.insert("loss_scale", 64.0).insert("unskipped", int64_t(3));
  state.insert("loss_scaler0", entry);
  CHECK(has(message_of([&] { apex.load_state_dict(state); }), "of 1 loss but"));
  state.insert("loss_scaler1",
               StateDict().insert("loss_scale", 4.0).insert("unskipped", int64_t(1)));
  apex.load_state_dict(state);
  CHECK(apex.get_scale(0) == 64);
  CHECK(apex.get_scale(1) == 4);
  CHECK(apex.state_dict("apex").size() == 2);
}

TEST_CASE("an optimizer takes the gradients of one scale, and a loss has a number", "[api]") {
  auto p = torch::ones({4}, torch::requires_grad());
  optim::SGD opt({p}, optim::SGDOptions(1.0));
  GradScaler scaler(quick(2));
  scaler.scale(p.sum(), 0).backward();
  scaler.unscale_(opt, 0);
  CHECK(has(message_of([&] { scaler.step(opt, nullptr, 1); }),
            "step: which is 1, but the gradients of this optimizer were unscaled with which=0"));
  scaler.step(opt);
  scaler.update();
  CHECK(torch::equal(p.detach(), torch::zeros({4})));
  // Two scales meet in one gradient, and nothing could tell before the update.
  scaler.scale(p.sum(), 0).backward();
  scaler.scale(p.sum(), 1).backward();
  scaler.step(opt, nullptr, 1);
  {
    const Warnings warnings;
    scaler.update();
    CHECK(warnings.with("loss 0 was scaled with which=0, but nothing was unscaled or stepped") ==
          1);
  }
  CHECK(has(message_of([&] { scaler.scale(p.sum(), 2); }),
            "which is 2, but this GradScaler has losses=2"));
  CHECK(has(message_of([&] { GradScalerOptions().losses(0); }), "losses is 0"));
}

TEST_CASE("scale_gradient: the same forward, a scaled gradient", "[api]") {
  auto x = torch::randn({5}, torch::kHalf).set_requires_grad(true);
  const auto y = functional::scale_gradient(x, 0x1p20);
  CHECK(torch::equal(y, x));
  y.backward(torch::full({5}, 0x1p-20, torch::kHalf));
  CHECK(torch::equal(x.grad(), torch::ones({5}, torch::kHalf)));
  x.mutable_grad() = at::Tensor();
  functional::scale_gradient(x, torch::tensor(0.5)).sum().backward();
  CHECK(torch::equal(x.grad(), torch::full({5}, 0.5, torch::kHalf)));
}
