"""torch.amp.GradScaler's protocol, case by case: where torch is right we agree with it, where it is not we differ.

The numbers in the names are those of the list of edge cases that torch's scaler was measured on.
"""

import copy
import math
import pickle
import warnings

import pytest
import torch

import halfstep as hs

pytestmark = pytest.mark.smoke
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def param(*values, dtype=torch.float32):
    return torch.nn.Parameter(torch.tensor(values or (1.0, 1.0), dtype=dtype))


def ready(scale=8.0, **kw):
    """A scaler that has seen a loss."""
    scaler = hs.GradScaler("cpu", init_scale=scale, **kw)
    scaler.scale(torch.ones(()))
    return scaler


def give(p, *values):
    p.grad = torch.tensor(values, dtype=p.dtype) if p.grad_dtype is None else torch.tensor(values, dtype=p.grad_dtype)


MAKERS = {"ours": lambda p: hs.optim.SGD([("w", p)], lr=1.0), "masters": lambda p: hs.optim.Masters(torch.optim.SGD, [("w", p)], lr=1.0),
          "stock": lambda p: torch.optim.SGD([p], lr=1.0), "fused": lambda p: torch.optim.SGD([p], lr=1.0, fused=True)}
every_kind = pytest.mark.parametrize("make", list(MAKERS.values()), ids=list(MAKERS))


# -- torch's edge cases ----------------------------------------------------------------------------
def test_01_scale_and_tracker_are_made_on_the_device_of_the_first_output():
    scaler = hs.GradScaler()
    with pytest.raises(RuntimeError, match="scale_tensor: nothing was scaled yet"):
        scaler.scale_tensor
    assert isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled() and scaler.get_scale() == 65536
    assert scaler.scale(torch.ones((), device="meta")).device.type == "meta" and scaler.scale_tensor.device.type == "meta"
    scaler = hs.GradScaler()  # on a CPU box too: never silently unscaled
    assert scaler.scale(torch.ones(())) == 65536 and scaler.scale_tensor.device.type == "cpu"
    with pytest.raises(ValueError, match="GradScaler was made for cuda but the loss is on cpu"):
        hs.GradScaler("cuda").scale(torch.ones(()))


@every_kind
def test_01_02_the_protocol_is_enforced_for_every_kind_of_optimizer(make):
    p = param()
    opt, scaler = make(p), hs.GradScaler("cpu")
    for call in (lambda: scaler.step(opt), lambda: scaler.unscale_(opt), lambda: scaler.update(), lambda: scaler.update(2.0)):
        with pytest.raises(AssertionError, match="_scale"):
            call()
    scaler.scale(p.sum()).backward()
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(opt)
    scaler.step(opt)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(opt)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
        scaler.unscale_(opt)
    scaler.update()
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.update()


@every_kind
def test_03_no_gradient_at_all_raises_on_every_path(make):
    """torch's fused path returns silently."""
    p = param()
    opt, scaler = make(p), ready()
    before = p.detach().clone()
    with pytest.raises(AssertionError, match="No inf checks were recorded for this optimizer"):
        scaler.step(opt)
    assert torch.equal(p, before)


@every_kind
def test_04_closures_positional_as_in_torch_and_by_name(make):
    p = param()
    opt, scaler, calls = make(p), ready(4.0), []

    def closure():
        calls.append(1)
        opt.zero_grad()
        loss = p.sum()
        scaler.scale(loss).backward()
        return loss

    assert scaler.step(opt, closure) == 2 and (p == 0).all()
    scaler.update()
    assert scaler.step(opt, closure=closure) == 0 and (p == -1).all() and len(calls) == 2
    scaler.update()
    scaler.scale(p.sum()).backward()
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"step: unscale_\(\) has been called for this optimizer, but its closure"):
        scaler.step(opt, closure)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", FLOATS)
@every_kind
def test_05_every_dtype_unscales(make, dtype):
    """torch refuses FP16 gradients; BF16 and FP64 pass in both. Complex ones are refused in both."""
    p = param(dtype=dtype)
    opt, scaler = make(p), ready(16.0)
    scaler.scale((p * 3).sum()).backward()
    scaler.unscale_(opt)
    assert (p.grad == 3).all()
    scaler.step(opt), scaler.update()
    assert (p == -2).all()


def test_05_complex_is_refused_and_nothing_is_written():
    p, q = param(), torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    opt, scaler = torch.optim.SGD([p, q], lr=1.0), ready()
    p.grad, q.grad = torch.ones(2), torch.ones(2, dtype=torch.complex64)
    with pytest.raises(NotImplementedError, match="a gradient is torch.complex64"):
        scaler.unscale_(opt)
    assert (p.grad == 1).all()


def test_06_sparse_fp16_duplicates_that_overflow_only_when_summed_are_found():
    p = torch.nn.Parameter(torch.zeros(4, 1).half())
    opt, scaler = torch.optim.SGD([p], lr=1.0), ready(1.0)
    index = torch.tensor([[1, 1]])
    p.grad = torch.sparse_coo_tensor(index, torch.tensor([[40000.0], [40000.0]]).half(), (4, 1))
    scaler.step(opt)
    assert scaler.step_was_skipped(opt) and (p == 0).all()
    scaler.update()
    q = torch.nn.Parameter(torch.zeros(4, 1))
    opt = torch.optim.SGD([q], lr=1.0)
    q.grad = torch.sparse_coo_tensor(index, torch.tensor([[1.0], [2.0]]), (4, 1))
    scaler.unscale_(opt)
    assert not q.grad.is_coalesced() and q.grad._values().tolist() == [[2.0], [4.0]]  # FP32 is left as it is; the scale is 1/2 now


def test_07_a_product_that_overflows_is_found():
    """torch looks before the multiplication only: BF16 3e38 / 0.25 becomes inf with found_inf 0."""
    p = param(dtype=torch.bfloat16)
    opt, scaler = torch.optim.SGD([p], lr=1.0), ready(0.25)
    give(p, 3e38, 1.0)
    scaler.step(opt)
    assert scaler.step_was_skipped(opt) and (p == 1).all()
    theirs = torch.amp.GradScaler("cpu", init_scale=0.25)
    theirs.scale(torch.ones(()))
    give(p, 3e38, 1.0)
    theirs.unscale_(opt)
    assert torch.isinf(p.grad[0]) and float(theirs._per_optimizer_states[id(opt)]["found_inf_per_device"][torch.device("cpu")]) == 0


def test_08_the_scale_never_reaches_zero_where_torch_writes_nan():
    p, q = param(), param()
    ours, theirs = hs.GradScaler(policy=hs.policies.preset("torch")), torch.amp.GradScaler("cpu")
    opts = hs.optim.SGD([p], lr=1.0), torch.optim.SGD([q], lr=1.0)
    for i in range(201):
        for w, opt, scaler in ((p, opts[0], ours), (q, opts[1], theirs)):
            opt.zero_grad()
            loss = scaler.scale(w.sum())
            (loss * math.inf if i < 200 else loss).backward()
            scaler.step(opt), scaler.update()
    assert (p == 0).all() and ours.get_scale() == 2.0**-126
    assert torch.isnan(q).all() and theirs.get_scale() == 0


def test_09_growth_at_the_top_is_refused_and_the_tracker_starts_again():
    scaler = hs.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)
    p = param()
    opt = hs.optim.SGD([p], lr=0.0)
    scaler.scale(torch.ones(()))
    for _ in range(2):
        give(p, 0.5, 0.5)
        scaler.step(opt), scaler.update()
    assert scaler.get_scale() == 2.0**127 and scaler._get_growth_tracker() == 0


def test_09_a_shorter_interval_than_the_tracker_still_grows():
    """torch tests for equality: with tracker 10 and interval 5 it never grows again."""
    p, q = param(), param()
    ours, theirs = ready(8.0, growth_interval=100), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    theirs.scale(torch.ones(()))
    opts = hs.optim.SGD([p], lr=0.0), torch.optim.SGD([q], lr=0.0)
    for i in range(20):
        if i == 10:
            ours.set_growth_interval(5), theirs.set_growth_interval(5)
        for w, opt, scaler in ((p, opts[0], ours), (q, opts[1], theirs)):
            give(w, 1.0, 1.0)
            scaler.step(opt), scaler.update()
        if i == 10:
            assert ours.get_scale() == 16
    assert theirs.get_scale() == 8 and ours.get_scale() == 32


def test_10_update_takes_an_int_and_leaves_the_tracker():
    """torch: AttributeError for an int."""
    p = param()
    opt, scaler = hs.optim.SGD([p], lr=0.0), ready(8.0)
    for _ in range(3):
        give(p, 1.0, 1.0)
        scaler.step(opt), scaler.update()
    for value in (2, 2.0, torch.tensor(2.0), torch.tensor([2.0])):
        scaler.update(value)
        assert scaler.get_scale() == 2 and scaler._get_growth_tracker() == 3
    for bad in (0, -1.0, math.inf, math.nan, 2.0**-127):
        with pytest.raises(ValueError, match="update: new_scale is"):
            scaler.update(bad)
    assert scaler.get_scale() == 2


def test_10_nan_counts_as_found():
    p = param()
    opt, scaler = hs.optim.SGD([p], lr=1.0), ready()
    give(p, math.nan, 1.0)
    scaler.step(opt), scaler.update()
    assert scaler.get_scale() == 4 and (p == 1).all()


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_11_16_bit_losses_are_scaled_in_fp32(shape, dtype):
    """torch: one 1-d FP16 element times 2^16 is inf."""
    out = hs.GradScaler("cpu").scale(torch.ones(shape, dtype=dtype))
    assert out.dtype == torch.float32 and (out == 65536).all()
    nested = hs.GradScaler("cpu").scale({"a": [torch.ones(1)], "b": (torch.ones(2),)})
    assert nested["a"][0] == 65536 and (nested["b"][0] == 65536).all()
    with pytest.raises(ValueError, match="outputs is int"):
        hs.GradScaler("cpu").scale(3)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("flag", [2.0, 0.5, math.nan])
def test_12_any_flag_but_zero_skips_in_fused_optimizers_too(name, flag):
    """torch's fused kernels skip on found_inf == 1 only and write NaN or -inf for 2, with step = -1."""
    for lib in (hs.optim, torch.optim):
        p = param()
        opt = getattr(lib, name)([p], lr=1.0, **({"fused": True} if lib is torch.optim else {}))
        scaler = ready()
        give(p, 1.0, 1.0)
        scaler.unscale_(opt)
        scaler._per_optimizer_states[id(opt)]["found_inf_per_device"] = {torch.device("cpu"): torch.tensor(flag)}
        scaler.step(opt)
        assert (p == 1).all() and scaler.step_was_skipped(opt)
        assert all(float(s["step"]) == 0 for s in opt.state.values() if "step" in s)
        scaler.update()
        assert scaler.get_scale() == 4


def test_12_two_bad_devices_skip_under_the_stock_scaler():
    """The stock scaler adds the flags of devices up and hands us 2, or a tensor of shape [1] (pytorch#140514)."""
    for opt_of in (lambda p: hs.optim.Adam([p], lr=1.0), lambda p: hs.optim.Masters(torch.optim.Adam, [p], lr=1.0)):
        for found in (torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([1.0])):
            p = param()
            opt = opt_of(p)
            give(p, 1.0, 1.0)
            opt.grad_scale, opt.found_inf = torch.tensor([4.0]), found
            opt.step()
            assert (p == 1).all()
            opt.found_inf = torch.zeros(1)
            opt.step()
            assert torch.allclose(p, torch.zeros(2), atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_13_14_flags_of_devices_or_ranks_combine_by_maximum(order):
    """Sums turn two bad ranks into 2; a maximum of any of them is what every path tests against zero."""
    flags = [torch.tensor(0.0), torch.tensor([1.0])]
    combined = hs.GradScaler._combine([flags[i] for i in order], torch.device("cpu"))
    assert combined == 1 and combined.shape == ()
    assert torch.isnan(hs.GradScaler._combine([torch.tensor(0.0), torch.tensor(math.nan)], torch.device("cpu")))
    assert hs.GradScaler._combine([torch.tensor(1.0), torch.tensor(1.0)], torch.device("cpu")) == 1


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_15_gradients_are_never_written_by_our_step(bad, dtype):
    p = param(dtype=dtype)
    opt, scaler = hs.optim.Adam([p], lr=0.1, max_grad_norm=0.5), ready(1024.0)
    give(p, 3.0, math.inf if bad else 5.0)
    before, version = p.grad.clone(), p.grad._version
    scaler.step(opt), scaler.update()
    assert torch.equal(p.grad, before) and p.grad._version == version


class Aware(torch.optim.SGD):
    """A third-party optimizer with torch's hook."""

    _step_supports_amp_scaling = True

    def step(self, closure=None):
        self.seen = (self.grad_scale, float(self.found_inf))  # without getattr: the attributes must be there
        if self.found_inf == 0:
            for g in self.param_groups:
                for p in g["params"]:
                    p.data.sub_(p.grad / (1 if self.grad_scale is None else self.grad_scale))


def test_16_optimizers_that_unscale_themselves_get_scale_and_flag():
    p = param()
    opt, scaler = Aware([p], lr=1.0), ready(8.0)
    give(p, 8.0, 8.0)
    scaler.step(opt), scaler.update()
    assert float(opt.seen[0]) == 8 and opt.seen[1] == 0 and (p == 0).all() and (p.grad == 8).all()
    assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")
    scaler.unscale_(opt)
    scaler.step(opt), scaler.update()
    assert opt.seen[0] is None and (p == -1).all()
    give(p, 8.0, math.inf)
    scaler.step(opt), scaler.update()
    assert opt.seen[1] == 1 and (p == -1).all() and scaler.get_scale() == 4 and scaler.stats().first_bad_param == "group 0, parameter 0"
    opt.grad_scale = 2.0  # torch multiplies what the user left there
    give(p, 8.0, 8.0)
    scaler.step(opt), scaler.update()
    assert float(opt.seen[0]) == 8 and (p == -2).all()


class Deprecated(torch.optim.SGD):
    _step_supports_amp_scaling = True

    def step(self, closure=None, *, grad_scaler=None):
        grad_scaler.unscale_(self)
        torch.optim.SGD.step(self)


def test_16_the_deprecated_keyword_form_still_works():
    p = param()
    opt, scaler = Deprecated([p], lr=1.0), ready(8.0)
    give(p, 8.0, 8.0)
    with pytest.warns(FutureWarning, match="grad_scaler"):
        scaler.step(opt)
    scaler.update()
    assert (p == 0).all() and not scaler.step_was_skipped()


@every_kind
def test_17_several_optimizers_share_one_scale(make):
    """One bad optimizer backs the scale off once, though the clean one stepped."""
    p, q = param(), param()
    a, b, scaler = make(p), make(q), ready(8.0)
    give(p, math.inf, 1.0), give(q, 8.0, 8.0)
    scaler.step(a), scaler.step(b)
    assert scaler.step_was_skipped(a) and not scaler.step_was_skipped(b) and scaler.step_was_skipped()
    scaler.update()
    assert scaler.get_scale() == 4 and (p == 1).all() and (q == 0).all()
    give(p, 4.0, 4.0), give(q, 4.0, 4.0)
    scaler.step(a), scaler.step(b)
    assert not scaler.step_was_skipped()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_17_copies_between_iterations_go_on_alike(clone):
    p = param()
    opt, scaler = hs.optim.SGD([p], lr=0.0), ready(8.0, growth_interval=3)
    for i in range(4):
        give(p, 1.0, math.inf if i == 1 else 1.0)
        scaler.step(opt), scaler.update()
    give(p, 1.0, 1.0)
    scaler.unscale_(opt)
    with pytest.raises(AssertionError, match="beginning of an iteration"):
        pickle.dumps(scaler)
    scaler.step(opt), scaler.update()
    other = clone(scaler)
    assert other.state_dict() == scaler.state_dict()
    old, new = scaler.stats(), other.stats()
    assert (new.step, new.steps_applied, new.steps_skipped) == (old.step, old.steps_applied, old.steps_skipped) == (5, 4, 1)
    for s in (scaler, other):
        s.scale(torch.ones(()))
        for _ in range(3):
            give(p, 1.0, 1.0)
            s.step(opt), s.update()
    assert other.state_dict() == scaler.state_dict()


@every_kind
def test_18_fp64_gradients_beyond_fp32_are_not_infinite(make):
    p = param(1e300, 1.0, dtype=torch.float64)
    opt, scaler = make(p), ready(2.0)
    give(p, 2e299, 2.0)
    scaler.step(opt), scaler.update()
    assert not scaler.step_was_skipped(opt) and p.tolist() == [1e300 - 1e299, 0.0]


# -- defects of other scalers ------------------------------------------------------------------------
def test_the_scale_that_unscales_is_the_one_that_scaled():
    """DeepSpeed updates the scale first: on a growth step a true gradient of 1 is used as 0.5."""
    p = param(0.0, 0.0)
    opt, scaler = hs.optim.SGD([p], lr=1.0), ready(8.0, growth_interval=1)
    for i in range(1, 6):
        opt.zero_grad()
        scaler.scale(p.sum()).backward()
        scaler.step(opt), scaler.update()
        assert (p == -i).all() and scaler.get_scale() == 8.0 * 2**i


def test_the_step_after_an_overflow_is_unscaled():
    """fairscale's layerwise scaler trusts the flags of the step before."""
    p = param(0.0, 0.0)
    opt, scaler = hs.optim.SGD([p], lr=1.0), ready(8.0)
    for bad in (True, False):
        opt.zero_grad()
        scaler.scale(p.sum() * (math.inf if bad else 1)).backward()
        scaler.step(opt), scaler.update()
    assert (p == -1).all()


@every_kind
def test_a_skip_can_be_asked_for_whoever_does_the_skipping(make):
    """Accelerate infers it from whether optimizer.step was called, so fused skips go unseen."""
    p = param()
    opt, scaler = make(p), ready()
    assert not scaler.step_was_skipped(opt)
    for bad in (True, False):
        give(p, 1.0, math.inf if bad else 1.0)
        scaler.step(opt)
        assert scaler.step_was_skipped(opt) == bad
        scaler.update()
        assert scaler.step_was_skipped(opt) == bad == scaler.step_was_skipped()


# -- rules of our own --------------------------------------------------------------------------------
def test_our_optimizers_under_the_stock_scaler_step_and_its_unscale_refuses_fp16():
    for make in (lambda p: hs.optim.SGD([p], lr=1.0), lambda p: hs.optim.Masters(torch.optim.SGD, [p], lr=1.0)):
        p = param(dtype=torch.float16)
        opt, scaler = make(p), torch.amp.GradScaler("cpu", init_scale=256.0)
        scaler.scale(p.sum()).backward()
        with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
            scaler.unscale_(opt)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        scaler.scale(torch.ones(()))
        scaler.step(opt), scaler.update()
        assert (p == 0).all()
        p.grad[0] = math.inf
        scaler.step(opt), scaler.update()
        assert (p == 0).all() and scaler.get_scale() == 128


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("unscale", [False, True])
@every_kind
def test_clipping_is_torchs_for_every_kind_of_optimizer(make, unscale, norm_type):
    torch.manual_seed(0)
    value, grad = torch.randn(40), torch.randn(40) * 3
    p, q = torch.nn.Parameter(value.clone()), torch.nn.Parameter(value.clone())
    opt, scaler, theirs = make(p), ready(64.0), torch.optim.SGD([q], lr=1.0)
    p.grad, q.grad = grad * 64, grad.clone()
    if unscale:
        scaler.unscale_(opt)
    norm = scaler.clip_grad_norm_(opt, 2.0, norm_type)
    want = torch.nn.utils.clip_grad_norm_([q], 2.0, norm_type)
    scaler.step(opt), scaler.update(), theirs.step()
    assert norm.shape == () and norm.item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.allclose(p, q, atol=1e-6)
    p.grad, q.grad = grad * 64, grad.clone()  # the factor served one step
    scaler.step(opt), theirs.step()
    assert torch.allclose(p, q, atol=1e-5)


def test_clipping_twice_and_over_several_optimizers_is_what_torch_does():
    a, b, x, y = (param(0.0, 0.0) for _ in range(4))
    opts, scaler = [hs.optim.SGD([a], lr=1.0), hs.optim.Masters(torch.optim.SGD, [b], lr=1.0)], ready(4.0)
    give(a, 12.0, 0.0), give(b, 0.0, 16.0)
    give(x, 3.0, 0.0), give(y, 0.0, 4.0)
    for optimizers, params, limit in ((opts, [x, y], 2.0), ([opts[0]], [x], 0.5), (opts, [x, y], 100.0)):
        norm = scaler.clip_grad_norm_(optimizers, limit)
        assert norm.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(params, limit).item(), rel=1e-5)
    for opt in opts:
        scaler.step(opt)
    assert torch.allclose(a, -x.grad, atol=1e-6) and torch.allclose(b, -y.grad, atol=1e-6)


@pytest.mark.parametrize("drop", ["update", "zero_grad"])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_clip_that_was_not_stepped_is_forgotten(drop, enabled):
    p, q = param(0.0, 0.0), param()
    opt, other = hs.optim.SGD([p], lr=1.0), hs.optim.SGD([q], lr=1.0)
    scaler = ready(1.0, enabled=enabled)
    give(p, 3.0, 4.0), give(q, 1.0, 1.0)
    assert scaler.clip_grad_norm_(opt, 1.0) == 5
    if drop == "update":
        scaler.step(other), scaler.update()
    else:
        opt.zero_grad()
    give(p, 3.0, 4.0)
    scaler.step(opt)
    assert p.tolist() == [-3.0, -4.0]


def test_a_disabled_scaler_clips_without_writing_gradients():
    p = param(0.0, 0.0)
    opt, scaler = hs.optim.SGD([p], lr=1.0), hs.GradScaler("cpu", enabled=False)
    give(p, 3.0, 4.0)
    assert scaler.clip_grad_norm_(opt, 1.0) == 5 and p.grad.tolist() == [3.0, 4.0]
    scaler.step(opt), scaler.update()
    assert torch.allclose(p, torch.tensor([-0.6, -0.8]))


def test_unscaled_gradients_stay_to_be_read_after_the_step():
    p = param(dtype=torch.float16)
    opt, scaler = hs.optim.SGD([p], lr=1.0), ready(1024.0)
    scaler.scale((p * 2.0**-20).sum()).backward()
    scaler.unscale_(opt)
    scaler.step(opt), scaler.update()
    assert p.grad.dtype == torch.float32 and (p.grad == 2.0**-20).all()
    opt.zero_grad()
    (p * 1.0).sum().backward()
    assert p.grad.dtype == torch.float16
    opt.zero_grad(set_to_none=False)
    assert p.grad.dtype == torch.float16 and (p.grad == 0).all()


@pytest.mark.parametrize("steps", [1, 4096])
@every_kind
def test_gradient_accumulation(make, steps):
    """The scale does not change between micro-batches; the sum is unscaled once."""
    if make is MAKERS["ours"]:
        make = lambda p: hs.optim.SGD([("w", p)], lr=1.0, grad_dtype="fp32")
        p = param(0.0, 0.0, dtype=torch.float16)
    else:
        p = param(0.0, 0.0)
    opt, scaler = make(p), ready(4.0)
    for _ in range(steps):
        scaler.scale((p * 1.0).sum()).backward()
    assert (p.grad == 4 * steps).all()
    scaler.step(opt), scaler.update()
    assert (p == -steps).all()


def test_fp16_accumulation_loses_what_grad_dtype_fp32_keeps():
    p = param(0.0, dtype=torch.float16)
    hs.optim.SGD([p], lr=1.0)
    for _ in range(4096):
        (p * 1.0).sum().backward()
    assert p.grad == 2048


@pytest.mark.parametrize("where", ["constructor", "cast_model"])
def test_both_ways_to_ask_for_fp32_accumulation(where):
    model = torch.nn.Linear(2, 1, bias=False)
    hs.cast_model(model, grad_dtype="fp32" if where == "cast_model" else None)
    opt = hs.optim.SGD(model.parameters(), lr=0.0, grad_dtype="fp32" if where == "constructor" else "param")
    x = torch.ones(1, 2).half()
    for _ in range(3000):
        model(x).sum().backward()
    assert model.weight.dtype == torch.float16 and model.weight.grad.dtype == torch.float32 and (model.weight.grad == 3000).all()
    opt.step()


def test_stats_describe_all_optimizers_of_the_update():
    p, q, r = param(dtype=torch.float16), param(), param()
    opts, scaler = [hs.optim.SGD([("a", p)], lr=0.0), torch.optim.SGD([("b", q)], lr=0.0), hs.optim.Masters(torch.optim.SGD, [("c", r)], lr=0.0)], ready(2.0)

    def run(*grads):
        for w, g in zip((p, q, r), grads):
            w.grad = torch.tensor(g, dtype=w.dtype)
        for opt in opts:
            scaler.step(opt)
        scaler.update()
        return scaler.stats()

    stats = run([2.0, 4.0], [4.0, 4.0], [0.0, 8.0])
    assert stats.grad_norm == pytest.approx(math.sqrt(1 + 4 + 4 + 4 + 16)) and stats.first_bad_param is None
    assert (stats.step, stats.clean_steps, stats.steps_applied, stats.zero_share) == (1, 1, 1, 1 / 6) and not stats.last_found_inf
    for bad, name in enumerate("abc"):
        grads = [[2.0, 4.0], [4.0, 4.0], [0.0, 8.0]]
        grads[bad][1] = math.nan
        stats = run(*grads)
        assert stats.first_bad_param == name and stats.last_found_inf and math.isnan(stats.grad_norm) and math.isnan(stats.amax)
    assert (stats.step, stats.clean_steps, stats.steps_applied, stats.steps_skipped, stats.consecutive_skips, stats.scale) == (4, 0, 1, 3, 3, 0.25)


def test_stats_skip_parameters_without_a_gradient_when_naming():
    a, b = param(), param()
    for make in (lambda: hs.optim.SGD([("a", a), ("b", b)], lr=0.0), lambda: hs.optim.Masters(torch.optim.SGD, [("a", a), ("b", b)], lr=0.0),
                 lambda: torch.optim.SGD([("a", a), ("b", b)], lr=0.0)):
        opt, scaler = make(), ready()
        a.grad = None
        give(b, 1.0, math.inf)
        scaler.step(opt), scaler.update()
        assert scaler.stats().first_bad_param == "b"


def test_subnormal_share_counts_what_unscaling_in_place_would_lose():
    p = torch.nn.Parameter(torch.zeros(8).half())
    opt, scaler = hs.optim.SGD([p], lr=0.0), ready(1.0)
    p.grad = torch.tensor([0, 0, 2.0**-24, 2.0**-15, 2.0**-14, 1, 2, 65504]).half()
    scaler.step(opt), scaler.update()
    stats = scaler.stats()
    assert (stats.zero_share, stats.subnormal_share, stats.amax) == (0.25, 2 / 6, 65504)


def test_flushed_values_are_counted_for_stock_optimizers_and_warned_of_once():
    p = torch.nn.Parameter(torch.zeros(4).half())
    opt, scaler = torch.optim.SGD([p], lr=0.0), ready(2.0**16)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for i in range(3):
            p.grad = torch.tensor([2.0**-9, 2.0**-8, 2.0**-10, 1.0]).half()  # the smallest halves: / 2^16 is 2^-25 (a tie, to zero), 2^-24, 2^-26
            scaler.step(opt), scaler.update()
            assert scaler.stats().flushed == 2 * (i + 1)
    assert [str(w.message) for w in seen] == ["unscaling FP16 gradients in place set 2 small values to zero; use a halfstep optimizer, which unscales in FP32"]
    ours = hs.optim.SGD([p], lr=0.0)
    scaler = ready(2.0**16)
    p.grad = torch.tensor([2.0**-9, 2.0**-8, 2.0**-10, 1.0]).half()
    scaler.unscale_(ours)
    assert (p.grad != 0).all()
    scaler.step(ours), scaler.update()
    assert scaler.stats().flushed == 0


def test_all_zero_gradients_are_warned_of_after_two_steps_only():
    p = param()
    opt, scaler = hs.optim.SGD([p], lr=0.0), ready()
    pattern, warned = [0, 1, 0, 0, 0, 1, 0, 0], []
    for value in pattern:
        give(p, float(value), 0.0)
        scaler.step(opt)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            scaler.update()
        warned.append(any("were scaled FP16 gradients clipped?" in str(w.message) for w in seen))
    assert warned == [False, False, False, True, False, False, False, True]


def test_torchs_clip_on_scaled_fp16_gradients_is_noticed():
    """Its norm is inf, so it multiplies by zero and raises nothing."""
    p = torch.nn.Parameter(torch.ones(100).half())
    opt, scaler = hs.optim.SGD([p], lr=0.1), ready(2.0**15)
    with pytest.warns(UserWarning, match="were scaled FP16 gradients clipped"):
        for _ in range(2):
            opt.zero_grad()
            scaler.scale(p.sum()).backward()
            torch.nn.utils.clip_grad_norm_([p], 1.0)
            scaler.step(opt), scaler.update()


def test_one_closure_a_step_and_no_scale_for_what_is_not_enabled():
    p = param()
    scaler = hs.GradScaler(enabled=False)
    for opt in (hs.optim.SGD([p], lr=1.0), torch.optim.SGD([p], lr=1.0)):
        calls = []

        def closure():
            calls.append(1)
            opt.zero_grad()
            loss = scaler.scale(p.sum())
            loss.backward()
            return loss

        scaler.step(opt, closure)
        assert len(calls) == 1
    assert (p == -1).all() and not scaler.step_was_skipped() and scaler.stats().step == 0


def test_the_public_step_is_called_so_hooks_and_wrappers_see_it():
    p = param()
    opt, scaler, seen = hs.optim.SGD([p], lr=1.0), ready(1.0), []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1)
    give(p, 1.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a scheduler that runs ahead of optimizer.step
        scaler.step(opt), scaler.update(), schedule.step()
    assert seen == ["pre", "post"] and (p == 0).all()
    opt.step = lambda *a: seen.append("wrapped")  # one that does not step: the scale must still be updated
    give(p, math.inf, 1.0)
    scaler.step(opt), scaler.update()
    assert seen[-1] == "wrapped" and scaler.get_scale() == 0.5 and (p == 0).all()


@pytest.mark.parametrize("numbers", [dict(init_scale=2.0), dict(growth_factor=3.0), dict(backoff_factor=0.25), dict(growth_interval=7)])
def test_numbers_make_a_dynamic_policy_and_exclude_another(numbers):
    (key, value), = numbers.items()
    scaler = hs.GradScaler("cpu", **numbers)
    assert getattr(scaler.policy, key) == value and (scaler.policy.min_scale, scaler.policy.max_scale) == (2.0**-14, 2.0**127)
    with pytest.raises(TypeError, match=f"policy is .* and {key} too"):
        hs.GradScaler("cpu", policy=hs.policies.Static(2.0), **numbers)


def test_the_positional_order_is_torchs():
    scaler = hs.GradScaler("cpu", 4.0, 3.0, 0.25, 7, True)
    assert (scaler.get_scale(), scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()) == (4.0, 3.0, 0.25, 7)
    low = hs.GradScaler("cpu", 2.0**-20)  # torch takes it, so the floor gives way
    assert low.scale(torch.ones(())) == 2.0**-20


def test_the_setters_reach_the_device():
    p = param()
    opt, scaler = hs.optim.SGD([p], lr=0.0), ready(8.0)
    scaler.set_growth_factor(4.0), scaler.set_growth_interval(1), scaler.set_backoff_factor(0.25)
    for grad, scale in ((1.0, 32.0), (math.inf, 8.0)):
        give(p, grad, 1.0)
        scaler.step(opt), scaler.update()
        assert scaler.get_scale() == scale


def test_static_keeps_its_scale_and_skips():
    p = param()
    opt, scaler = hs.optim.SGD([p], lr=1.0), hs.GradScaler(policy=hs.policies.Static(128.0))
    scaler.scale(torch.ones(()))
    for bad in (True, False, True):
        give(p, 128.0, math.inf if bad else 128.0)
        scaler.step(opt), scaler.update()
    assert scaler.get_scale() == 128 and (p == 0).all() and scaler.stats().steps_skipped == 2
