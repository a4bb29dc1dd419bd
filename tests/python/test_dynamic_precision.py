"""hs.DynamicPrecision: planted bad layers become islands and the run converges; a healthy net stays in FP16; no flip-flop; logs replay."""

import copy
import json
import math

import pytest
import torch
import torch._functorch.config
from torch import nn

import halfstep as hs
from halfstep import _dynamic
from halfstep._islands import Islands, layers
from halfstep._runstate import RunState

BOTH = pytest.mark.parametrize("cast", [True, False], ids=["cast", "autocast"])


def data(n=512):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 16, generator=generator)
    return x, (x @ torch.randn(16, 4, generator=generator)).argmax(1)


X, Y = data()


class Loud(nn.Module):
    """A layer whose hidden values are `gain` times too large, between its parts."""

    def __init__(self, width, gain):
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.register_buffer("gain", torch.tensor(gain))

    def forward(self, x):
        return self.fc(x) * self.gain / self.gain


class Steep(nn.Module):
    """A layer whose gradients are `gain` times as large as they should be."""

    def __init__(self, inputs, width, gain):
        super().__init__()
        self.fc, self.gain = nn.Linear(inputs, width), gain

    def forward(self, x):
        return hs.functional.scale_gradient(self.fc(x), self.gain)


def healthy():
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def loud(gain=2.0**18):
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), Loud(32, gain), nn.ReLU(), nn.Linear(32, 4))


def steep():
    return nn.Sequential(Steep(16, 32, 2.0**40), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


class Faint(nn.Module):
    """A layer whose gradients are 2^-34 of what they should be, and which has everything to learn."""

    def __init__(self, inputs, width):
        super().__init__()
        self.fc = nn.Linear(inputs, width)
        nn.init.zeros_(self.fc.weight)

    def forward(self, x):
        return hs.functional.scale_gradient(self.fc(x), 2.0**-34)


def faint():
    return nn.Sequential(Faint(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def faint_and_loud():
    return nn.Sequential(Faint(16, 32), nn.ReLU(), Loud(32, 2.0**18), nn.ReLU(), nn.Linear(32, 4))


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


class Run:
    def __init__(self, make, cast, policy=None, lr=3e-3, eps=1e-8, watch=True, wrap=lambda model: model, **kw):
        torch.manual_seed(0)
        self.model = make()
        if cast:
            hs.cast_model(self.model)
        self.optimizer, self.scaler = hs.optim.AdamW(self.model.named_parameters(), lr=lr, eps=eps), hs.GradScaler(policy=policy)
        self.precision = hs.DynamicPrecision(self.model, self.optimizer, self.scaler, loss_of, **kw) if watch else None
        self.run, self.count, self.losses = wrap(self.model), 0, []

    def steps(self, n):
        for _ in range(n):
            rows = slice(64 * (self.count % 8), 64 * (self.count % 8) + 64)
            self.optimizer.zero_grad()
            with hs.autocast("cpu"):
                loss = loss_of(self.run, (X[rows], Y[rows]))
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.count += 1
            self.losses.append(float(loss.detach()))
            if self.precision is not None:
                self.precision.step((X[rows], Y[rows]))
        return self

    def accuracy(self):
        """As trained."""
        self.model.eval()
        with torch.no_grad(), hs.autocast("cpu"):
            found = (self.model(X).argmax(1) == Y).float().mean().item()
        self.model.train()
        return found

    def bits(self):
        return copy.deepcopy([*self.model.state_dict().values(), *self.optimizer.master_params(), self.scaler.get_scale(), torch.get_rng_state()])

    def moves(self):
        return [(d.step, d.layer, d.to) for d in self.precision.decisions]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b))


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*steps in a row were skipped")]


# -- planted layers --------------------------------------------------------------------------------
@BOTH
def test_a_layer_that_overflows_inside_is_an_island_after_one_step_and_the_run_converges(cast):
    plain, ours = Run(loud, cast, watch=False).steps(150), Run(loud, cast).steps(150)
    assert plain.scaler.stats().steps_applied == 0 and plain.accuracy() < 0.5
    assert ours.moves() == [(1, "2", "float32")] and ours.precision.islands == ["2"] and ours.accuracy() > 0.9
    assert "inf in forward made by aten::mul" in ours.precision.decisions[0].why
    assert ours.precision.layers["2"].signals.headroom < -1  # seen between its parts, where FP16 would overflow again


@BOTH
def test_a_chain_of_layers_that_carries_too_large_values_is_found_one_by_one(cast):
    def chain():
        net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        with torch.no_grad():
            net[0].weight.mul_(2.0**10)
            net[2].weight.mul_(2.0**10)
            net[4].weight.mul_(2.0**-20)
        return net

    plain, ours = Run(chain, cast, watch=False).steps(60), Run(chain, cast).steps(60)
    assert plain.scaler.stats().steps_applied == 0
    assert [(layer, to) for _, layer, to in ours.moves()] == [("2", "float32"), ("4", "float32")] and ours.moves()[-1][0] <= 3
    assert ours.scaler.stats().clean_steps > 20 and math.isfinite(ours.losses[-1])  # after the scale found its place


@BOTH
def test_a_layer_whose_gradients_overflow_at_the_floor_is_an_island(cast):
    plain, ours = Run(steep, cast, watch=False).steps(150), Run(steep, cast).steps(150)
    assert plain.scaler.stats().steps_applied == 0
    (step, layer, to), = ours.moves()
    assert (layer, to) == ("0", "float32") and step <= 18 and ours.accuracy() > 0.8
    assert "gradients overflow at scale 1: inf in backward" in ours.precision.decisions[0].why


@BOTH
def test_a_layer_whose_gradients_vanish_is_an_island_within_n_checks_and_the_run_converges(cast):
    plain, ours = Run(faint, cast, watch=False, eps=1e-20).steps(300), Run(faint, cast, eps=1e-20, every=10, checks=3).steps(300)
    assert plain.accuracy() < 0.5 and ours.accuracy() > 0.9
    assert ours.moves() == [(30, "0.fc", "float32")] and "of its gradients would be 0 in FP16, above 5 % in 3 checks in a row" in ours.precision.decisions[0].why


def test_only_given_layers_move():
    run = Run(loud, True, layers=["0", "4"]).steps(5)
    assert list(run.precision.layers) == ["0", "4"] and run.moves() == [] and run.scaler.stats().steps_skipped == 5
    whole = Run(loud, True, layers=["2"]).steps(5)
    assert whole.moves() == [(1, "2", "float32")] and list(whole.precision.layers) == ["2"]


# -- healthy ones ----------------------------------------------------------------------------------
@BOTH
def test_a_healthy_net_stays_in_fp16_for_2000_steps_and_its_bits_are_those_without_us(cast):
    torch.manual_seed(5)
    plain = Run(healthy, cast, watch=False).steps(2000)
    ours = Run(healthy, cast, every=100).steps(2000)
    assert ours.moves() == [] and ours.precision.islands == [] and ours.precision.recompiles == 0
    assert same(ours.bits(), plain.bits()) and ours.accuracy() > 0.9


@pytest.mark.parametrize("hysteresis", [1, 3])
def test_the_search_for_a_scale_moves_no_layer(hysteresis):
    run = Run(healthy, True, policy=hs.policies.Dynamic(init_scale=2.0**60, hysteresis=hysteresis)).steps(120)
    assert run.scaler.stats().steps_skipped > 20 and run.moves() == []


def test_bad_data_and_bad_weights_are_no_layers_fault():
    run = Run(healthy, False).steps(3)
    X[:, 0].fill_(float("inf"))
    try:
        run.steps(5)
    finally:
        X.copy_(data()[0])
    assert run.scaler.stats().steps_skipped == 5 and run.moves() == []
    run.steps(2)
    with torch.no_grad():
        run.model[6].weight.fill_(float("nan"))
    run.steps(3)
    assert run.moves() == []


@pytest.mark.parametrize("value", [-math.inf, -1e9, torch.finfo(torch.float32).min])
def test_a_mask_of_infinities_is_meant(value):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)
            self.register_buffer("mask", torch.full((4, 4), value).triu(1), persistent=False)

        def forward(self, x):
            x = torch.stack([x, x, x, x], 1)
            return self.head(self.attend(x, x, x, attn_mask=self.mask, need_weights=False)[0].mean(1))

    run = Run(Masked, False, every=5)
    assert list(run.precision.layers) == ["attend", "head"]
    run.steps(20)
    assert run.moves() == [] and run.scaler.stats().steps_skipped == 0


# -- the way back ----------------------------------------------------------------------------------
def test_an_island_goes_back_when_its_cause_is_gone_and_hysteresis_bounds_its_moves():
    run = Run(loud, True, every=5, clean=3, hold=40)
    run.steps(10)
    assert run.moves() == [(1, "2", "float32")]
    run.model[2].gain.fill_(1.0)  # well from here on
    run.steps(60)
    assert run.moves()[1:] == [(45, "2", "float16")] and run.precision.decisions[1].why.startswith("7 clean checks in a row, ")  # of steps 15 to 45
    assert run.precision.islands == [] and run.model[2].__dict__.get("forward") is None
    run.model[2].gain.fill_(2.0**18)
    run.steps(2)
    run.model[2].gain.fill_(1.0)
    run.steps(100)
    assert [to for _, _, to in run.moves()] == ["float32", "float16", "float32", "float16"] and run.moves()[3][0] - run.moves()[2][0] >= 80  # twice as long


@BOTH
def test_no_layer_moves_more_than_twice_in_hold_steps(cast):
    run = Run(loud, cast, every=5, clean=1, hold=50, checks=1)
    for i in range(40):  # a cause that comes and goes
        run.model[2].gain.fill_(2.0**18 if i % 2 else 1.0)
        run.steps(10)
    steps = {name: [s for s, layer, _ in run.moves() if layer == name] for name in run.precision.layers}
    assert len(steps["2"]) >= 4
    assert all(sum(start <= s < start + 50 for s in moved) <= 2 for moved in steps.values() for start in moved)


def test_by_default_at_most_two_moves_in_2000_steps():
    run = Run(loud, True)
    for i in range(40):
        run.model[2].gain.fill_(2.0**18 if i % 2 else 1.0)
        run.steps(50)
    assert all(layer.transitions <= 2 for layer in run.precision.layers.values()) and run.precision.layers["2"].transitions >= 1


def test_an_island_of_others_is_seen_and_stays():
    run = Run(healthy, True, every=5, clean=1, hold=1)
    Islands(run.model, [run.optimizer]).put("4")
    run.steps(30)
    assert run.precision.layers["4"].precision == "float32" and run.precision.islands == ["4"] and run.moves() == []


def test_it_sees_what_comes_after_a_rewind():
    run = Run(loud, True)
    run.model[2].gain.fill_(1.0)
    run.steps(3)
    kept = RunState(run.model, [run.optimizer], run.scaler, [])
    run.steps(20)
    kept.restore()
    run.model[2].gain.fill_(2.0**18)
    run.steps(3)
    assert [(layer, to) for _, layer, to in run.moves()] == [("2", "float32")] and run.scaler.stats().steps_skipped <= 2


# -- compiled, logged, replayed --------------------------------------------------------------------
class Straight(nn.Module):
    """A model without a loop, which torch.compile can leave and enter."""

    def __init__(self):
        super().__init__()
        self.first, self.loud, self.last = nn.Linear(16, 32), Loud(32, 2.0**18), nn.Linear(32, 4)

    def forward(self, x):
        return self.last(self.loud(self.first(x).relu()).relu())


@BOTH
def test_a_compiled_model_notices_its_islands_and_the_recompilations_are_counted(cast):
    torch._dynamo.reset()
    eager = Run(Straight, cast).steps(40)
    run = Run(Straight, cast, wrap=lambda model: torch.compile(model, backend="aot_eager")).steps(40)
    assert run.moves() == eager.moves() == [(1, "loud", "float32")] and run.accuracy() > 0.8
    assert run.precision.recompiles == 2 and run.precision.transitions == 1  # before the island and after it
    assert "1 moves, 2 recompilations in 40 steps" in str(run.precision)


@torch._functorch.config.patch(backward_pass_autocast="off")
def test_where_torch_compile_leaves_backwards_alone_an_island_is_in_the_graph():
    torch._dynamo.reset()
    run = Run(Straight, False, wrap=lambda model: torch.compile(model, backend="aot_eager", fullgraph=True)).steps(40)
    assert run.moves() == [(1, "loud", "float32")] and run.precision.recompiles == 1 and run.accuracy() > 0.8


@pytest.mark.parametrize("backward", ["off", "same_as_forward"])
@BOTH
def test_gradients_of_an_island_in_a_compiled_model_are_those_of_eager_in_fp32(cast, backward):
    def gradients(wrap):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        if cast:
            hs.cast_model(model)
        hs.islands_(model, ["0", "2"])
        with hs.autocast("cpu"):
            loss = wrap(model)(X[:32]).float().pow(2).mean() * 1e-7
        loss.backward()
        return [p.grad for p in model.parameters()]

    with torch._functorch.config.patch(backward_pass_autocast=backward):
        eager, compiled = gradients(lambda model: model), gradients(lambda model: torch.compile(model, backend="aot_eager"))
    assert 0 < eager[0].abs().max() < 2.0**-25 and eager[0].dtype == torch.float32  # FP16 would hold 0
    assert same(eager, compiled)


@BOTH
def test_a_replay_moves_the_same_layers_without_measuring(cast, tmp_path, monkeypatch):
    log = tmp_path / "precision.json"
    first = Run(faint_and_loud, cast, every=10, log=log, eps=1e-20).steps(60)
    assert {(layer, to) for _, layer, to in first.moves()} == {("0.fc", "float32"), ("2", "float32")}
    content = json.loads(log.read_text())
    assert content["format"] == "halfstep-precision" and content["transitions"] == len(first.moves()) == len(content["decisions"])
    for name in ("against_fp32", "find_nonfinite"):
        monkeypatch.setattr(_dynamic, name, None)
    second = Run(faint_and_loud, cast, every=10, replay=log, log=tmp_path / "again.json", eps=1e-20).steps(60)
    assert second.precision.decisions == first.precision.decisions and same(second.bits(), first.bits())
    assert json.loads((tmp_path / "again.json").read_text())["decisions"] == content["decisions"]
    with pytest.raises(ValueError, match="log and replay are both .*precision.json"):
        Run(faint_and_loud, cast, replay=log, log=log)


def test_it_goes_on_from_its_state():
    run = Run(loud, True, every=5).steps(12)
    state = json.loads(json.dumps(run.precision.state_dict()))
    other = Run(loud, True, every=5)
    other.precision.load_state_dict(state)
    assert other.precision.state_dict() == run.precision.state_dict() and other.precision.islands == ["2"]
    other.steps(20)
    assert other.moves() == run.moves() and other.scaler.stats().steps_skipped == 0
    with pytest.raises(ValueError, match="has no 'layers'"):
        other.precision.load_state_dict({"format": 1, "step": 0})


@pytest.mark.parametrize("kw, message", [
    ({"every": 0}, "every is 0"), ({"checks": 1.5}, "checks is 1.5"), ({"clean": -1}, "clean is -1"), ({"hold": 0}, "hold is 0"), ({"underflow": 2}, "underflow is 2"),
    ({"headroom": "x"}, "headroom is 'x'"), ({"floor": 0}, "floor is 0"), ({"layers": "conv*"}, "'conv\\*', which fits no module"), ({"log": "/nowhere/at/all/x.json"}, "its folder does not exist"),
    ({"replay": "/nowhere.json"}, "/nowhere.json: No such file"),
])
def test_arguments_are_refused_with_their_values(kw, message):
    with pytest.raises(ValueError, match=f"DynamicPrecision: .*{message}"):
        Run(healthy, True, **kw)


def test_what_has_nothing_to_decide_is_refused():
    model = healthy()
    optimizer = hs.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match="expected a halfstep.GradScaler"):
        hs.DynamicPrecision(model, optimizer, torch.amp.GradScaler("cpu"), loss_of)
    with pytest.raises(ValueError, match="scaler is disabled"):
        hs.DynamicPrecision(model, optimizer, hs.GradScaler(enabled=False), loss_of)
    with pytest.raises(ValueError, match="scaler has losses=2; expected 1"):
        hs.DynamicPrecision(model, optimizer, hs.GradScaler(losses=2), loss_of)
    wide = healthy()
    hs.cast_model(wide, torch.bfloat16)
    with pytest.raises(ValueError, match="the model is in BF16"):
        hs.DynamicPrecision(wide, hs.optim.AdamW(wide.parameters()), hs.GradScaler(), loss_of)


@pytest.mark.parametrize("text, message", [
    ("x", "is not JSON"), ('{"format": "halfstep-guard", "version": 1}', "is not a halfstep-precision file"),
    ('{"format": "halfstep-precision", "version": 1, "decisions": [{"step": 3, "layer": "9", "to": "float32", "why": ""}]}', "layer '9' is not in this model"),
    ('{"format": "halfstep-precision", "version": 1, "decisions": [{"step": 3, "layer": "0", "to": "int8", "why": ""}]}', "goes to 'int8'"),
    ('{"format": "halfstep-precision", "version": 1, "decisions": [{"step": 3, "layer": "0", "to": "float32", "why": ""}, {"step": 2, "layer": "0", "to": "float16", "why": ""}]}', "after one of step 3"),
])
def test_a_file_that_is_no_log_is_refused(tmp_path, text, message):
    (tmp_path / "log.json").write_text(text)
    with pytest.raises(ValueError, match=f"log.json.*{message}"):
        Run(healthy, True, replay=tmp_path / "log.json")


# -- islands themselves ----------------------------------------------------------------------------
@pytest.mark.parametrize("cast, inside", [(False, True), (True, True), (True, False)], ids=["autocast", "cast, autocast", "cast"])
def test_an_island_computes_as_the_layer_in_fp32_does(cast, inside):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), nn.Linear(8, 2))
    if cast:
        hs.cast_model(model)
    optimizer = hs.optim.AdamW(model.named_parameters())
    wide = copy.deepcopy(model[1]).float()  # an FP32 copy of the same 16-bit weights, without cast_model's hooks
    for module in wide.modules():
        module._forward_hooks.clear(), module._forward_pre_hooks.clear()
    islands, seen = Islands(model, [optimizer]), []
    islands.put("1")
    model[1].register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    x = torch.randn(5, 8)
    with hs.autocast("cpu", enabled=inside):
        out = model(x if inside else x.half())
    given, got = seen[0]
    expected = wide(given.detach().float())
    assert given.dtype == torch.float16 and got.dtype == (torch.float32 if inside else torch.float16) and out.dtype == torch.float16
    assert torch.equal(got, expected.to(got.dtype))
    incoming = torch.full_like(got, 2.0**-24)  # what it becomes on its way down FP16 would hold as 0
    got.backward(incoming)
    expected.backward(incoming.float())
    small = model[1][0].weight.grad.abs()
    assert ((small > 0) & (small < 2.0**-25)).any()
    for (name, param), other in zip(model[1].named_parameters(), wide.parameters()):
        assert param.grad.dtype == torch.float32 and torch.equal(param.grad, other.grad), name
    optimizer.step()
    islands.take("1")
    optimizer.zero_grad()
    with hs.autocast("cpu", enabled=inside):
        model(x if inside else x.half()).float().sum().backward()
    assert model[1][0].weight.grad.dtype == (torch.float16 if cast else torch.float32) and islands.names == []


@BOTH
def test_evaluation_in_one_dtype_knows_no_islands(cast):
    run = Run(healthy, cast).steps(5)
    run.model.eval()
    for dtype in (torch.float16, torch.float32, torch.float64):
        with hs.evaluate_in(run.model, run.optimizer, dtype):
            before = run.model(X)
        islands = Islands(run.model, [run.optimizer])
        islands.put("4")
        with hs.evaluate_in(run.model, run.optimizer, dtype):
            assert torch.equal(run.model(X), before) and before.dtype == dtype
        islands.take("4")


def test_layers_are_the_innermost_modules_or_what_the_rules_fit():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.MultiheadAttention(4, 1), nn.Linear(4, 4)), nn.ReLU())
    assert list(layers(model)) == ["0", "1.0", "1.1", "2"]
    assert list(layers(model, ["1", nn.ReLU])) == ["1", "2"] and list(layers(model, "1.*")) == ["1.0", "1.1"]
    with pytest.raises(ValueError, match="'9', which fits no module \\(modules: '0', '1', "):
        layers(model, "9")
