"""tensor_stats, the stuck detector, and that neither waits for a device."""

import math
import pickle
import warnings

import pytest
import torch

import halfstep as hs
from halfstep import _stats

H = torch.ops.halfstep
pytestmark = pytest.mark.smoke


def param(*shape, dtype=torch.float16):
    return torch.nn.Parameter(torch.zeros(*shape, dtype=dtype))


def ready(scale=4.0, **kw):
    scaler = hs.GradScaler("cpu", init_scale=scale, **kw)
    scaler.scale(torch.zeros(()))
    return scaler


def run(scaler, *opts):
    for opt in opts:
        scaler.step(opt)
    scaler.update()
    return scaler.tensor_stats()


# -- tensor_stats ----------------------------------------------------------------------------------
def test_tensor_stats_of_every_kind_of_optimizer():
    a, b, c, d = param(4), param(3, dtype=torch.float32), param(2), param(2, dtype=torch.float64)
    opts = [hs.optim.SGD([("a", a), ("b", b)], lr=0.0), hs.optim.Masters(torch.optim.SGD, [("c", c)], lr=0.0), torch.optim.SGD([("d", d)], lr=0.0)]
    scaler = ready()
    assert scaler.tensor_stats() == {}
    a.grad = torch.tensor([0, 2.0**-15, 4, -8]).half()
    b.grad = torch.tensor([3.0, 0.0, 4.0])
    c.grad = torch.tensor([2.0, math.inf]).half()
    d.grad = torch.tensor([12.0, -16.0], dtype=torch.float64)
    stats = run(scaler, *opts)
    assert list(stats) == ["a", "b", "c", "d"]
    assert stats["a"] == hs.TensorStats(amax=8, norm=pytest.approx(math.sqrt(80) / 4), zero_share=0.25, subnormal_share=1 / 3, nonfinite=0, count=4)
    assert stats["b"] == hs.TensorStats(amax=4, norm=5 / 4, zero_share=1 / 3, subnormal_share=0, nonfinite=0, count=3)
    assert (stats["c"].nonfinite, stats["c"].amax, stats["c"].norm) == (1, math.inf, math.inf)
    assert stats["d"].norm == 5 and stats["d"].amax == 4  # a stock optimizer's gradients are unscaled before they are looked at


def test_tensor_stats_leave_out_what_had_no_gradient_and_tell_namesakes_apart():
    a, b, c = param(2), param(2), param(0)
    opts = [hs.optim.SGD([a], lr=0.0), hs.optim.SGD([b, c], lr=0.0)]
    scaler = ready()
    b.grad, c.grad = torch.ones(2).half(), torch.ones(0).half()
    a.grad = torch.full((2,), 3.0).half()
    stats = run(scaler, *opts)
    assert {name: s.amax for name, s in stats.items()} == {"group 0, parameter 0": 3, "group 0, parameter 0 (2)": 1}
    a.grad = None
    b.grad = torch.full((2,), 7.0).half()
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(opts[0])
    assert {name: s.amax for name, s in run(scaler, opts[1]).items()} == {"group 0, parameter 0": 7}


def test_norms_are_unscaled_under_clipping_unscale_and_a_scale_of_the_users():
    p = param(2)
    opt, scaler = hs.optim.SGD([("p", p)], lr=0.0, max_grad_norm=1e-3), ready(3.0)
    give = lambda: setattr(p, "grad", torch.tensor([9.0, 12.0]).half())
    give()
    assert run(scaler, opt)["p"].norm == pytest.approx(5)
    give()
    scaler.unscale_(opt)
    assert run(scaler, opt)["p"] == hs.TensorStats(amax=4, norm=pytest.approx(5), zero_share=0, subnormal_share=0, nonfinite=0, count=2)
    opt.zero_grad(), give()
    opt.grad_scale = torch.tensor(2.0)
    assert run(scaler, opt)["p"].norm == pytest.approx(2.5)


def test_the_rows_are_those_of_the_step_and_not_copied():
    net = torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(4)])
    opt, scaler = hs.optim.AdamW(net.named_parameters()), ready()
    scaler.scale(net(torch.randn(2, 3)).sum()).backward()
    table = H.grad_stats([p.grad for p in net.parameters()], [])
    stats = run(scaler, opt)
    assert [s.amax for s in stats.values()] == table[:-1, 2].tolist() and [s.count for s in stats.values()] == [9, 3] * 4
    assert scaler._history._newest.tables[0].shape == table.shape and scaler._history._newest.host.numel() < 40  # totals only


def test_a_new_state_has_no_tensors_and_pickling_is_unharmed():
    p = param(2)
    opt, scaler = hs.optim.SGD([("p", p)], lr=0.0), ready()
    p.grad = torch.ones(2).half()
    assert run(scaler, opt)
    assert pickle.loads(pickle.dumps(scaler)).tensor_stats() == {}
    scaler.load_state_dict(scaler.state_dict())
    assert scaler.tensor_stats() == {}
    disabled = hs.GradScaler(enabled=False)
    assert disabled.tensor_stats() == {} and disabled.stats().diagnosis is None


def test_nothing_waits_and_the_newest_that_arrived_is_shown(monkeypatch):
    class Event:
        done = False

        def query(self):
            return self.done

    events = []

    def slow(numbers, free=()):
        events.append(Event())
        return numbers.clone(), events[-1]

    monkeypatch.setattr(_stats, "send", slow)
    p = param(2)
    opt, scaler = hs.optim.SGD([("p", p)], lr=0.0), ready()
    for i in range(1, 4):
        p.grad = torch.full((2,), float(i)).half()
        run(scaler, opt)
    assert scaler.stats().step == 0 and scaler.tensor_stats() == {}
    events[1].done = True  # a stream finishes its copies in order: the first is still under way
    assert scaler.stats().step == 0
    events[0].done = True
    assert scaler.stats().step == 2 and scaler.tensor_stats()["p"].amax == 2
    events[2].done = True
    assert scaler.tensor_stats()["p"].amax == 3 and scaler.stats().step == 3


def test_what_replays_of_a_captured_graph_leave_is_fetched_on_demand(monkeypatch):
    p, q = param(2), param(3)
    opt, scaler = hs.optim.SGD([("p", p), ("q", q)], lr=0.0), ready()
    p.grad, q.grad = torch.tensor([3.0, 4.0]).half(), torch.full((3,), 5.0).half()
    scaler.step(opt)
    monkeypatch.setattr(_stats, "capturing", lambda: True)
    scaler.update()
    assert scaler.tensor_stats() == {}  # nothing ran yet
    monkeypatch.setattr(_stats, "capturing", lambda: False)
    assert (scaler.stats().step, scaler.stats().scale) == (1, 4.0) and {k: t.amax for k, t in scaler.tensor_stats().items()} == {"p": 4, "q": 5}
    numbers = scaler._history._captured[0]
    numbers[_stats.SCALE], numbers[_stats.SKIPPED] = 2.0, 2.0  # as a replay would
    numbers[-3 * 8 + 2] = 9.0
    assert (scaler.stats().step, scaler.stats().scale) == (3, 2.0) and scaler.tensor_stats()["p"].amax == 9
    scaler.step(opt), scaler.update()
    assert scaler._history._captured is None and scaler.stats().scale == 4.0


def test_host_memory_of_a_copy_is_used_again(monkeypatch):
    made = []
    real = torch.empty

    def empty(*size, pin_memory=False, **kw):
        made.append(size)
        return real(*size, **kw)

    class Numbers:  # a tensor that says it is on a GPU
        def __init__(self, value):
            self.shape, self.dtype, self.device, self.value = torch.Size([3]), torch.float64, torch.device("cuda"), value

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, numbers, non_blocking: to.fill_(numbers.value))
    monkeypatch.setattr(torch.cuda, "Event", lambda: type("Event", (), {"record": lambda self: None, "query": lambda self: True})())
    free = []
    first, _ = _stats.send(Numbers(1.0), free)
    second, _ = _stats.send(Numbers(2.0), free)
    assert len(made) == 2 and first.data_ptr() != second.data_ptr()
    free.append(first)
    third, _ = _stats.send(Numbers(3.0), free)
    assert len(made) == 2 and third is first and free == [] and second.tolist() == [2.0] * 3


# -- the stuck detector ----------------------------------------------------------------------------
def stuck(scaler, opt, p, steps, loss=1.0, grad=math.inf):
    """Diagnoses after each step, and the warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = []
        for _ in range(steps):
            scaler.scale(torch.tensor(loss))
            p.grad = torch.full_like(p, grad)
            scaler.step(opt), scaler.update()
            found.append(scaler.stats().diagnosis)
    return found, [str(w.message) for w in seen]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_told_from_gradients_that_overflow(loss):
    p = param(2)
    opt, scaler = hs.optim.SGD([("p", p)], lr=0.0), ready(2.0**100)
    found, said = stuck(scaler, opt, p, 25, loss=loss)
    assert found == [None] * 19 + ["loss is not finite"] * 6
    assert len(said) == 1 and said[0].startswith("20 steps in a row were skipped and the loss itself is inf or NaN")


def test_gradients_that_overflow_under_a_finite_loss():
    p, q = param(2), param(2)
    opt, scaler = hs.optim.SGD([("p", p), ("q", q)], lr=0.0), ready(2.0**100)
    found, said = stuck(scaler, opt, q, 21)
    assert found == [None] * 19 + ["gradients overflow"] * 2
    assert len(said) == 1 and "at scale 1.20893e+24, 'q' first" in said[0]


def test_a_scale_at_its_floor_is_told_after_three_skips():
    p = param(2)
    opt, scaler = hs.optim.SGD([("p", p)], lr=0.0), hs.GradScaler(policy=hs.policies.Dynamic(init_scale=8.0, min_scale=2.0))
    found, said = stuck(scaler, opt, p, 5)
    assert found == [None, None] + ["scale is at its floor"] * 3 and scaler.get_scale() == 2
    assert len(said) == 1 and said[0].startswith("3 steps in a row were skipped and the scale is at its floor 2") and "min_scale" in said[0]
    found, said = stuck(scaler, opt, p, 1, loss=math.nan)
    assert found == ["loss is not finite"] and said == []  # another finding, the same episode
    found, said = stuck(scaler, opt, p, 1, grad=1.0)
    assert found == [None] and said == []
    found, said = stuck(scaler, opt, p, 3)
    assert found[-1] == "scale is at its floor" and len(said) == 1  # a new episode is told again


def test_a_fixed_scale_has_no_floor_and_says_so_after_twenty():
    p = param(2)
    opt, scaler = hs.optim.SGD([("p", p)], lr=0.0), hs.GradScaler(policy=hs.policies.Static(1024.0))
    found, said = stuck(scaler, opt, p, 20)
    assert found == [None] * 19 + ["gradients overflow"] and "A fixed scale must be lower" in said[0]


def test_every_loss_of_an_update_counts_and_none_of_the_one_before():
    p = param(2)
    opt, scaler = hs.optim.SGD([("p", p)], lr=0.0), hs.GradScaler(policy=hs.policies.Dynamic(init_scale=1.0, min_scale=1.0))
    for step in range(6):
        for micro in range(4):  # accumulation: the NaN is in one micro-batch of four, in a list, of 16 bits
            value = torch.tensor([1.0, math.nan if micro == 1 and step < 4 else 2.0]).half()
            scaler.scale([value])
        p.grad = torch.full_like(p, math.inf)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scaler.step(opt), scaler.update()
        want = None if step < 2 else "loss is not finite" if step < 4 else "scale is at its floor"
        assert scaler.stats().diagnosis == want, step
    assert float(scaler._history.loss) == 0


def test_a_loss_before_a_scale_that_was_set_by_hand_is_forgotten():
    p = param(2)
    opt, scaler = hs.optim.SGD([("p", p)], lr=0.0), hs.GradScaler(policy=hs.policies.Dynamic(init_scale=1.0, min_scale=1.0))
    scaler.scale(torch.tensor(math.nan))
    p.grad = torch.ones(2).half()
    scaler.step(opt), scaler.update(1.0)
    found, _ = stuck(scaler, opt, p, 3)
    assert found[-1] == "scale is at its floor"


def test_scaling_a_loss_with_its_flag_compiles_without_a_break():
    net, scaler = torch.nn.Linear(4, 1), ready(8.0)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def scaled(x):
        return scaler.scale(net(x).mean())

    x = torch.randn(3, 4)
    for _ in range(2):
        scaled(x).backward()
    assert float(scaler._history.loss) == pytest.approx(2 * float(net(x).mean().detach()))
    assert torch.allclose(net.bias.grad, torch.full((1,), 16.0))
    scaler._history.close()
    assert float(scaler._history.judged) == pytest.approx(2 * float(net(x).mean().detach())) and float(scaler._history.loss) == 0
    scaled(x * math.nan)
    assert not math.isfinite(float(scaler._history.loss))
