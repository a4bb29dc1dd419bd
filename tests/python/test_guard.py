"""hs.AccuracyGuard: checks that leave no trace, actions in their order, rewinds to the bit, logs that replay."""

import copy
import importlib.util
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep._islands import Islands
from halfstep._runstate import RunState, lower_lr


pytestmark = pytest.mark.usefixtures("one_thread")


def net(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def data(n=256):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 16, generator=generator)
    return x, (x @ torch.randn(16, 4, generator=generator)).argmax(1)


X, Y = data()


def evaluate(model):
    return {"accuracy": (model(X).argmax(1) == Y).float().mean().item()}


class Run:
    """A small training in FP16; `cast`: 16-bit weights, else FP32 weights under autocast."""

    def __init__(self, cast=True, dropout=0.0, optimizer=None, scaled=True):
        self.model = net(dropout)
        if cast:
            hs.cast_model(self.model)
        self.optimizer = optimizer(self.model) if optimizer else hs.optim.AdamW(self.model.named_parameters(), lr=3e-3)
        self.scaler, self.guard, self.count = hs.GradScaler(enabled=scaled), None, 0

    def step(self):
        rows = slice(64 * (self.count % 4), 64 * (self.count % 4) + 64)
        self.optimizer.zero_grad()
        with hs.autocast("cpu"):
            loss = nn.functional.cross_entropy(self.model(X[rows]).float(), Y[rows])
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.count += 1
        return self.guard.step() if self.guard is not None else None

    def steps(self, n):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [d for d in [self.step() for _ in range(n)] if d is not None]

    def watched(self, **kw):
        self.guard = hs.AccuracyGuard(self.model, self.optimizer, self.scaler, **{"evaluate": evaluate, "every": 5, "margin": "5pp", **kw})
        return self

    def bits(self):
        """Everything a rewind gives back."""
        state = self.optimizer.state_dict(packed=True) if isinstance(self.optimizer, hs.optim.Optimizer) else self.optimizer.state_dict()
        return copy.deepcopy([list(self.model.state_dict().items()), state, self.scaler.state_dict(), torch.get_rng_state()])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


OPTIMIZERS = {
    **{master: lambda model, m=master: hs.optim.AdamW(model.named_parameters(), lr=3e-3, master=m) for master in ("split16", "fp32", "kahan", "stochastic")},
    "int8": lambda model: hs.optim.AdamW(model.named_parameters(), lr=3e-3, states="int8", ema_decay=0.9),
    "sgd": lambda model: hs.optim.SGD(model.named_parameters(), lr=3e-2, momentum=0.9),
    "masters": lambda model: hs.optim.Masters(torch.optim.RMSprop, model.parameters(), lr=1e-3),
}


# -- checks ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("cast", [True, False])
def test_a_healthy_run_is_the_same_bits_with_and_without_a_guard(cast):
    plain, watched = Run(cast, dropout=0.2), Run(cast, dropout=0.2).watched()
    torch.manual_seed(3)
    plain.steps(30)
    expected = plain.bits()
    torch.manual_seed(3)
    assert watched.steps(30) == [] and same(watched.bits(), expected)
    assert [c["step"] for c in watched.guard.checks] == [5, 10, 15, 20, 25, 30] and all(c["good"] for c in watched.guard.checks)
    assert all(m.training for m in watched.model.modules())


def test_a_check_holds_both_evaluations():
    run = Run().watched()
    run.steps(20)
    with hs.evaluate_in(run.model, run.optimizer, torch.float32):
        exact = evaluate(run.model)["accuracy"]
    run.model.eval()
    with torch.no_grad(), hs.autocast("cpu"):
        trained = evaluate(run.model)["accuracy"]
    assert run.guard.checks[-1] == {"step": 20, "trained": trained, "fp32": exact, "good": True} and exact > 0.5


def test_a_fault_is_seen_within_every_steps_and_the_ladder_is_climbed():
    run = Run().watched(actions=("warn", "lower_lr", "rewind+lower_lr", "stop"))
    run.steps(22)
    with torch.no_grad():
        run.model[3].weight.mul_(-1)
    run.optimizer.param_groups[0]["lr"] = 1e-9  # nothing mends
    found = run.steps(18)
    assert [(d.step, d.action) for d in found] == [(25, "warn"), (30, "lower_lr"), (35, "rewind+lower_lr")]
    assert "accuracy in FP32" in found[0].why and "worse than" in found[0].why
    assert found[1].details == {"factor": 0.5, "lr": [5e-10]} and found[2].details["to_step"] == 20 and found[2].details["lr"] == [1.5e-3]
    assert not run.guard.stopped and run.guard.checks[-1]["good"]  # after the rewind


def test_stop_ends_the_ladder_and_stays():
    run = Run().watched(actions=("stop",))
    run.steps(40)
    with torch.no_grad():
        run.model[5].weight.mul_(-1)
    run.optimizer.param_groups[0]["lr"] = 0.0
    found = run.steps(10)
    assert run.guard.stopped and found[0].action == "stop" and found[0].step == 45 and all(d is found[0] for d in found) and len(run.guard.decisions) == 1


def test_a_run_that_takes_no_step_any_more_is_checked_at_once():
    run = Run(optimizer=lambda m: hs.optim.SGD(m.named_parameters(), lr=0.1)).watched(every=1000, actions=("rewind",))
    run.steps(3)
    with torch.no_grad():
        run.model[0].weight.fill_(float("nan"))
    found = run.steps(40)
    assert len(found) == 1 and found[0].step == 3 + 20 and found[0].action == "rewind" and found[0].details["to_step"] == 0
    assert found[0].why == "'0.weight' holds inf or NaN" and run.model[0].weight.isfinite().all()


@pytest.mark.parametrize("every", [1000, 23])
def test_a_stuck_run_is_bad_though_its_weights_are_well(every):
    run = Run().watched(every=every, actions="warn")
    run.steps(3)
    X[:, 0].fill_(float("inf"))
    try:
        found = run.steps(30)
    finally:
        X.copy_(data()[0])
    assert [d.why for d in found] == ["no step is taken any more: loss is not finite"]


def test_a_non_finite_value_is_bad_and_lower_can_be_better():
    run, values = Run(), iter([1.0, 1.0, 0.9, 0.9, 1.3, 1.3, float("nan"), 0.5])
    run.watched(evaluate=lambda model: next(values), every=1, margin=0.25, better="lower", actions="warn")
    found = run.steps(4)
    assert [c["good"] for c in run.guard.checks] == [True, True, False, False]
    assert "0.4 worse than the 0.9 of a check before" in found[0].why and "as trained is nan" in found[1].why


# -- rewinding -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rewind_is_to_the_bit_and_training_goes_on_as_it_did(name):
    run = Run(dropout=0.3, optimizer=OPTIMIZERS[name])
    run.steps(9)
    kept, then = RunState(run.model, [run.optimizer], run.scaler, []), run.bits()
    run.count = 0
    run.steps(7)
    later = run.bits()
    assert not same(later, then)
    kept.restore()
    assert same(run.bits(), then)
    run.count = 0
    run.steps(7)
    assert same(run.bits(), later)
    kept.restore()  # as often as one likes
    assert same(run.bits(), then)


def test_a_rewind_of_a_stock_optimizer_under_autocast_is_to_the_bit():
    run = Run(cast=False, optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3))
    run.steps(5)
    kept, then = RunState(run.model, [run.optimizer], run.scaler, []), run.bits()
    run.steps(5)
    kept.restore()
    assert same(run.bits(), then)


def test_the_guard_rewinds_to_the_last_good_check():
    run = Run(dropout=0.3).watched(actions=("rewind",))
    run.steps(40)
    good = run.bits()
    run.steps(2)
    with torch.no_grad():
        run.model[0].weight.zero_()
    run.optimizer.param_groups[0]["lr"] = 0.0
    (decision,) = run.steps(3)
    assert (decision.step, decision.details["to_step"]) == (45, 40) and same(run.bits(), good)


# -- the learning rate -----------------------------------------------------------------------------
lrs = torch.optim.lr_scheduler
SCHEDULERS = {
    "step": lambda o: lrs.StepLR(o, 4, 0.5), "lambda": lambda o: lrs.LambdaLR(o, lambda s: 1 / (1 + s)), "cosine": lambda o: lrs.CosineAnnealingLR(o, 30, eta_min=1e-5),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 7, eta_min=1e-5), "onecycle": lambda o: lrs.OneCycleLR(o, 1e-2, total_steps=40), "poly": lambda o: lrs.PolynomialLR(o, 40, 2.0),
    "sequential": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, 1.0, 10), lrs.CosineAnnealingLR(o, 30)], [10]),
    "chained": lambda o: lrs.ChainedScheduler([lrs.ExponentialLR(o, 0.9), lrs.LinearLR(o, 0.5, 1.0, 20)]),
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_lowered_rate_stays_lowered_whatever_the_scheduler(name, tensor):
    def rates(lower_at):
        optimizer = hs.optim.SGD([nn.Parameter(torch.ones(3))], lr=torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1, momentum=0.9)
        scheduler, found, held = SCHEDULERS[name](optimizer), [], optimizer.param_groups[0]["lr"]
        for i in range(30):
            if i == lower_at:
                lower_lr([optimizer], [scheduler], 0.25)
            scheduler.step()
            found.append(float(optimizer.param_groups[0]["lr"]))
        assert not tensor or optimizer.param_groups[0]["lr"] is held  # a captured step reads it
        return found

    plain, lowered = rates(None), rates(6)
    assert lowered[:6] == plain[:6]
    assert lowered[6:] == pytest.approx([0.25 * lr for lr in plain[6:]], rel=1e-6)


def test_a_rate_that_groups_share_is_lowered_once():
    shared = torch.tensor(0.1)
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))]}], lr=shared)
    assert lower_lr([optimizer], [], 0.5) == pytest.approx([0.05, 0.05])


def test_skip_aware_schedulers_are_seen_through_and_forgotten_ones_refused():
    run = Run().watched()
    scheduler = hs.lr_scheduler.SkipAware(lrs.LambdaLR(run.optimizer, lambda s: 1.0), run.scaler)
    with pytest.raises(ValueError, match="optimizers\\[0\\] has a learning-rate scheduler.*pass schedulers="):
        run.watched()
    with pytest.raises(ValueError, match="pass schedulers="):  # made after the guard
        run.step()
    run.watched(schedulers=scheduler)
    assert lower_lr([run.optimizer], [scheduler], 0.5) == [1.5e-3]
    run.steps(1)
    scheduler.step()
    assert run.optimizer.param_groups[0]["lr"] == 1.5e-3


# -- islands ---------------------------------------------------------------------------------------
def overflowing(cast):
    """Trained, then one layer's outputs made too large for FP16; in FP32 the function is what it was."""
    run = Run(cast)
    run.steps(60)
    values = {k: v.float() for k, v in hs.export_state_dict(run.model, run.optimizer).items()}
    for layer, weight, bias in ((0, 2.0**5, 2.0**5), (3, 2.0**12, 2.0**17), (5, 2.0**-12, 2.0**5)):  # the logits are 32 times what they were
        values[f"{layer}.weight"] *= weight
        values[f"{layer}.bias"] *= bias
    hs.load_state_dict(run.model, run.optimizer, values)
    return run


@pytest.mark.parametrize("cast", [True, False])
def test_the_fewest_layers_that_mend_the_gap_become_islands(cast):
    run = overflowing(cast).watched(every=1, actions=("island", "stop"))
    run.optimizer.param_groups[0]["lr"] = 0.0
    (decision,) = run.steps(2)
    assert decision.action == "island" and decision.step == 1 and "as trained" in decision.why
    assert decision.details["layers"] == ["5", "3"] or set(decision.details["layers"]) == {"3", "5"}  # the ReLU between takes what it is given
    assert set(Islands(run.model).names) == {"3", "5"} and run.guard.checks[1]["good"] and run.guard.checks[1]["trained"] > 0.6


def test_an_island_that_cannot_help_is_passed_over():
    run = Run().watched(actions=("island", "warn"))
    run.steps(40)
    with torch.no_grad():
        run.model[0].weight.zero_()
    run.optimizer.param_groups[0]["lr"] = 0.0
    (decision,) = run.steps(5)
    assert decision.action == "warn" and decision.details == {} and Islands(run.model).names == []


# -- logs and replays ------------------------------------------------------------------------------
def faulty(**kw):
    run = Run(dropout=0.2).watched(actions=("warn", "rewind+lower_lr", "island", "stop"), **kw)
    torch.manual_seed(7)
    run.steps(42)
    with torch.no_grad():
        run.model[0].weight.mul_(0)
    run.steps(28)
    return run


def test_a_replay_takes_the_same_decisions_without_evaluating(tmp_path):
    log, again = tmp_path / "guard.json", tmp_path / "again.json"
    first = faulty(log=log)
    assert [d.action for d in first.guard.decisions][:2] == ["warn", "rewind+lower_lr"]
    content = json.loads(log.read_text())
    assert (content["format"], content["version"]) == ("halfstep-guard", 1) and len(content["checks"]) == 14

    def never(model):
        raise AssertionError("evaluated")

    second = faulty(evaluate=never, replay=log, log=again)
    assert second.guard.decisions == first.guard.decisions and same(second.bits(), first.bits())
    assert json.loads(again.read_text())["decisions"] == content["decisions"]


@pytest.mark.parametrize("text, message", [
    ("{", "is not JSON"), ("[]", "is not a halfstep-guard file"), ('{"format": "halfstep-guard", "version": 9}', "version 9"),
    ('{"format": "halfstep-guard", "version": 1, "checks": []}', "'decisions' is NoneType; expected list"),
    ('{"format": "halfstep-guard", "version": 1, "checks": [], "decisions": [{"step": 1}]}', "has no good 'action'"),
    ('{"format": "halfstep-guard", "version": 1, "checks": [3], "decisions": []}', "checks\\[0\\]"),
    ('{"format": "halfstep-guard", "version": 1, "checks": [], "decisions": [{"step": 1, "action": "dance", "why": "", "details": {}}]}', "'dance'"),
    ('{"format": "halfstep-guard", "version": 1, "checks": [], "decisions": [{"step": 1, "action": "island", "why": "", "details": {"layers": ["x"]}}]}', "'x' is not in this model"),
])
def test_a_file_that_is_no_log_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "log.json").write_text(text)
    with pytest.raises(ValueError, match=f"(log.json.*)?{message}"):
        Run().watched(replay=tmp_path / "log.json")


@pytest.mark.parametrize("kw, message", [
    ({"every": 0}, "every is 0"), ({"every": True}, "every is True"), ({"margin": "x"}, "margin is 'x'"), ({"margin": -1}, "margin is -1"), ({"actions": ()}, "actions is empty"),
    ({"actions": ("warn", "panic")}, "'panic'"), ({"better": "up"}, "better is 'up'"), ({"lr_factor": 1.5}, "lr_factor is 1.5"), ({"layers": "conv*"}, "'conv\\*', which fits no module"),
    ({"dtype": torch.int8}, "dtype is torch.int8"), ({"log": "/nowhere/at/all/x.json"}, "its folder does not exist"), ({"replay": "/nowhere.json"}, "No such file"),
])
def test_arguments_are_refused_with_their_values(kw, message):
    with pytest.raises(ValueError, match=message):
        Run().watched(**kw)


def test_a_metric_that_is_not_there_is_named():
    run = Run().watched(metric="f1", every=1)
    with pytest.raises(ValueError, match="metric is 'f1', but evaluate\\(\\) returned accuracy"):
        run.steps(1)


def test_a_margin_in_points_of_what_is_no_share_is_refused():
    run = Run().watched(evaluate=lambda model: -3.5, every=1)
    with pytest.raises(ValueError, match="margin is in percentage points, but value is -3.5 and -3.5, which is no share"):
        run.steps(1)


def test_a_guard_goes_on_from_its_state():
    run = overflowing(True).watched(every=2, actions=("warn", "island", "stop"))
    run.steps(5)
    state = json.loads(json.dumps(run.guard.state_dict()))
    other = overflowing(True).watched(every=2, actions=("warn", "island", "stop"))
    other.guard.load_state_dict(state)
    assert other.guard.state_dict() == run.guard.state_dict() and set(Islands(other.model).names) == {"3", "5"}
    assert other.guard.decisions == run.guard.decisions
    with pytest.raises(ValueError, match="has no 'rung'"):
        other.guard.load_state_dict({k: v for k, v in state.items() if k != "rung"})


# -- the example -----------------------------------------------------------------------------------
def test_the_example_survives_both_faults_and_its_log_replays_to_the_bit(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    folder = Path(__file__).parents[2] / "examples/python"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "train_digits", raising=False)
    spec = importlib.util.spec_from_file_location("guard_example", folder / "guard.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, trained, exact, guard = example.train(log=tmp_path / "guard.json")
        again, *_, replayed = example.train(replay=tmp_path / "guard.json")
        alone = example.train(guarded=False)
    assert [(d.step, d.action) for d in guard.decisions] == [(140, "island"), (240, "rewind+lower_lr")]
    assert guard.decisions[0].details == {"layers": ["4"]} and guard.decisions[1].details["to_step"] == 220
    assert trained > 0.95 and exact > 0.95 and alone[1] < 0.8
    assert replayed.decisions == guard.decisions and same(again.state_dict(), model.state_dict())
