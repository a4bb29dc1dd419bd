"""Checkpoints: golden files of every format, files that C++ and Python write for each other, refused loads."""

import copy
import importlib.util
import math
import os
import random
import subprocess
from pathlib import Path

import pytest
import torch

import halfstep as hs

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/fixtures"
_spec = importlib.util.spec_from_file_location("fixtures_make", FIXTURES / "make.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


def fixture(name):
    return torch.load(FIXTURES / f"{name}.pt", weights_only=True)


def everything(optimizer):
    """Every tensor and number that a load could touch, as bytes."""
    tensors = []
    for room in optimizer._rooms:
        tensors += [*room.params, *room.masters, room.steps, room.overflowed]
        tensors += [t for held in (room.states, room.scales) for key in sorted(held) for t in held[key]] + room.emas
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return [t.detach().clone().contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b"" for t in tensors] + [repr(groups)]


def same(a, b):
    """Equal structure, dtypes and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def at_golden(optimizer, model, keys, step=golden.STEP):
    """The optimizer is where the golden files were written."""
    units = {"exp_avg": golden.MOMENT, "exp_avg_sq": golden.SQUARE, "momentum_buffer": golden.BUFFER}
    for param, shape in zip(model.parameters(), golden.SHAPES.values()):
        state = optimizer.state[param]
        assert int(state["step"]) == step
        for key in keys:
            assert state[key].dtype == torch.float32 and torch.equal(state[key], golden.counted(shape, units[key]))
    return optimizer.param_groups[0]["lr"] == 2e-3


# -- golden files ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name,rule,keys", [("adamw", hs.optim.AdamW, ["exp_avg", "exp_avg_sq"]), ("adamw_packed", hs.optim.AdamW, ["exp_avg", "exp_avg_sq"]),
                                            ("cpp_adamw_packed", hs.optim.AdamW, ["exp_avg", "exp_avg_sq"]), ("sgd", hs.optim.SGD, ["momentum_buffer"])])
def test_golden_optimizers(name, rule, keys):
    model = golden.Model().filled()
    optimizer = rule(model.named_parameters(), **({"momentum": 0.5} if rule is hs.optim.SGD else {}))
    optimizer.load_state_dict(fixture(name))
    assert at_golden(optimizer, model, keys)
    assert all(map(torch.equal, optimizer.master_params(), golden.exact_weights()))


def test_golden_checkpoint_of_cpp():
    model, scaler = golden.Model(), hs.GradScaler()
    optimizer = hs.optim.AdamW(model.named_parameters())
    saved = hs.load(FIXTURES / "cpp_checkpoint.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    assert same(model.state_dict(), dict(golden.Model().filled().state_dict()))
    assert at_golden(optimizer, model, ["exp_avg", "exp_avg_sq"])
    assert all(map(torch.equal, optimizer.master_params(), golden.exact_weights()))
    assert same(saved["optimizer"], fixture("adamw")) and same(saved["scaler"], fixture("scaler"))  # both languages write the same


@pytest.mark.parametrize("name", golden.KINDS)
def test_golden_files_of_every_kind(name):
    """Loaded and written again, a file is what it was; loaded into FP32 states and masters, it has the values that it stands for."""
    model = golden.Model().filled()
    optimizer = golden.make(name, model)
    optimizer.load_state_dict(fixture(name))
    assert same(optimizer.state_dict(packed=name.endswith("packed"))["state"], fixture(name)["state"])
    plain = type(optimizer)(golden.Model().filled().named_parameters(), master="fp32", ema_decay=0.5)
    plain.load_state_dict(fixture(name), masters="from_params" if name == "lamb" else "saved")  # its weights had no master
    written, exact = plain.state_dict()["state"], optimizer.master_params()
    for i, entry in fixture(name)["state"].items():
        for key in plain._state_names(plain.param_groups[0]):
            value = entry[key].float()
            if f"{key}_scale" in entry:
                value = value * 2.0**-10
                value = value * value if key == "exp_avg_sq" else value
            assert torch.equal(written[i][key], value) and written[i]["step"] == golden.STEP
        assert torch.equal(plain.master_params()[i], exact[i]) and torch.equal(written[i]["ema"], entry.get("ema", exact[i]))


@pytest.mark.parametrize("name,rule,keys", [("torch_adamw", hs.optim.AdamW, ["exp_avg", "exp_avg_sq"]), ("torch_sgd", hs.optim.SGD, ["momentum_buffer"])])
def test_golden_torch_optim_files(name, rule, keys):
    model = golden.Model().filled()
    optimizer = rule(model.named_parameters(), **({"momentum": 0.5} if rule is hs.optim.SGD else {}))
    optimizer.load_state_dict(fixture(name))
    assert at_golden(optimizer, model, keys, step=1 if rule is hs.optim.SGD else golden.STEP)
    assert all(torch.equal(m, p.detach().float()) for m, p in zip(optimizer.master_params(), model.parameters()))


def test_golden_masters_of_another_optimizer():
    model = golden.Model().filled()
    optimizer = hs.optim.Masters(torch.optim.RMSprop, model.named_parameters(), lr=1.0)
    optimizer.load_state_dict(fixture("masters_rmsprop"))
    assert all(map(torch.equal, optimizer.master_params(), golden.exact_weights()))
    assert optimizer.param_groups[0]["lr"] == optimizer.inner.param_groups[0]["lr"] == 2e-3
    squares = [s["square_avg"] for s in optimizer.inner.state.values()]
    assert all(torch.equal(s, golden.counted(shape, golden.SQUARE)) for s, shape in zip(squares, golden.SHAPES.values()))


@pytest.mark.parametrize("name,applied", [("scaler", 6), ("torch_scaler", 0)])
def test_golden_scalers(name, applied):
    scaler = hs.GradScaler()
    scaler.load_state_dict(fixture(name))
    assert scaler.get_scale() == 1024 and scaler.get_growth_interval() == 10
    stats = scaler.stats()
    assert stats.scale == 1024 and stats.steps_applied == applied and stats.steps_skipped == (applied > 0)
    assert scaler.state_dict()["_growth_tracker"] == 3
    stock = torch.amp.GradScaler("cpu")
    stock.load_state_dict(fixture(name))
    assert stock.state_dict() == golden.SCALER


def test_golden_weights():
    model = golden.Model()
    model.load_state_dict(fixture("model"))
    assert same(dict(model.state_dict()), dict(golden.Model().filled().state_dict()))


def test_archives_of_torch_save_say_who_reads_them():
    with pytest.raises(RuntimeError, match=r"cpp_archive_adamw.pt' as a checkpoint: it is an archive of torch::save, which only C\+\+ reads"):
        hs.load(FIXTURES / "cpp_archive_adamw.pt")


# -- C++ and Python --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def peer(cpp_program):
    program = cpp_program("checkpoint_peer")

    def run(*words):
        done = subprocess.run([str(program), *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    return run


def make_job(kind):
    """The network, optimizer and scaler of tests/cpp/checkpoint_peer.cpp; the last layer stays FP32."""
    layers = [torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 24), torch.nn.ReLU(), torch.nn.Linear(24, 4)]
    model = torch.nn.Sequential(*layers)
    model[0].half(), model[2].half()
    args = {"AdamW": dict(lr=1e-2, max_grad_norm=1.0), "Adam": dict(lr=1e-2, amsgrad=True, master="fp32"),
            "SGD": dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
            "AdamW8": dict(lr=1e-2, decouple_lr=True, decay_order="apex", states="int8", ema_decay=0.9, seed=3),
            "Lion": dict(lr=1e-3, weight_decay=0.1, states="int8", master="split8"),
            "Adagrad": dict(lr=1e-2, initial_accumulator_value=0.1, lr_decay=0.01, states="bf16", master="kahan"),
            "Lamb": dict(lr=1e-2, ema_decay=0.99, zero_grads=True, max_grad_norm=1.0),
            "NovoGrad": dict(lr=1e-2, weight_decay=1e-3, master="stochastic", seed=7)}[kind]
    return model, getattr(hs.optim, kind.rstrip("8"))(model.named_parameters(), **args), hs.GradScaler(policy=hs.policies.Dynamic(growth_interval=3))


def train(model, optimizer, scaler, x, y, steps=5):
    for _ in range(steps):
        if not optimizer.zero_grads:
            optimizer.zero_grad()
        with hs.autocast("cpu"):
            loss = torch.nn.functional.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


PLAIN, PACKED = ["AdamW", "Adam", "SGD"], ["AdamW8", "Lion", "Adagrad", "Lamb", "NovoGrad"]


def checkpoint_of(model, optimizer, scaler, x, y, packed=False):
    return {"x": x, "y": y, "model": model.state_dict(), "optimizer": optimizer.state_dict(packed=packed), "scaler": scaler.state_dict()}


@pytest.mark.parametrize("kind", PLAIN + PACKED)
def test_python_goes_on_where_cpp_stopped(kind, peer, one_thread, tmp_path):
    peer("train", kind, tmp_path / "saved.pt", tmp_path / "after.pt")
    saved, after = (torch.load(tmp_path / name, weights_only=True) for name in ("saved.pt", "after.pt"))
    model, optimizer, scaler = make_job(kind)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    assert not same(saved["model"], after["model"])
    train(model, optimizer, scaler, saved["x"], saved["y"])
    assert same(checkpoint_of(model, optimizer, scaler, saved["x"], saved["y"], kind in PACKED), after)


@pytest.mark.parametrize("kind", PLAIN + PACKED)
def test_cpp_goes_on_where_python_stopped(kind, peer, one_thread, tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(64, 16), torch.randint(0, 4, (64,))
    model, optimizer, scaler = make_job(kind)
    train(model, optimizer, scaler, x, y)
    hs.save(checkpoint_of(model, optimizer, scaler, x, y, kind in PACKED), tmp_path / "saved.pt")
    train(model, optimizer, scaler, x, y)
    peer("resume", kind, tmp_path / "saved.pt", tmp_path / "after.pt")
    after = hs.load(tmp_path / "after.pt")
    assert same(checkpoint_of(model, optimizer, scaler, x, y, kind in PACKED), after)


def test_cpp_reads_and_writes_the_scales_of_several_losses(peer, tmp_path):
    scaler = hs.GradScaler(growth_interval=2, losses=2)
    for i, which in enumerate((0, 1, 1, 1, 0)):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = hs.optim.SGD([p], lr=0.1)
        (scaler.scale(p.sum(), which) * (math.inf if i == 4 else 1.0)).backward()
        scaler.step(optimizer, which=which)
        scaler.update()
    assert scaler.scales.tolist() == [2.0**15, 2.0**17]
    hs.save(scaler.state_dict(), tmp_path / "saved.pt")
    peer("losses", tmp_path / "saved.pt", tmp_path / "after.pt")
    after = hs.load(tmp_path / "after.pt")
    assert same(after, scaler.state_dict())
    other = hs.GradScaler(losses=2)
    other.load_state_dict(after)
    assert [other.get_scale(k) for k in (0, 1)] == [2.0**15, 2.0**17]


# -- files -----------------------------------------------------------------------------------------
def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.pt"
    hs.save({"step": 1}, path)
    before = path.read_bytes()

    class Unpicklable:
        def __reduce__(self):
            raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"):
        hs.save({"weights": torch.ones(1000), "bad": Unpicklable()}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["run.pt"]
    hs.save({"step": 2}, path)
    assert hs.load(path) == {"step": 2} and os.listdir(tmp_path) == ["run.pt"]
    for call in (lambda p: hs.save({}, p), hs.load):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            call(tmp_path / "no such folder" / "run.pt")


def test_a_link_keeps_pointing_where_it_does(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "latest.pt").symlink_to(tmp_path / "disk/run.pt")
    hs.save({"step": 3}, tmp_path / "latest.pt")
    assert (tmp_path / "latest.pt").is_symlink() and hs.load(tmp_path / "disk/run.pt") == {"step": 3}


def test_the_file_is_synced_before_it_takes_its_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *args, name=name, call=getattr(os, name): (order.append(name), call(*args)))
    hs.save({"step": 1}, tmp_path / "run.pt")
    assert order == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
def test_a_truncated_file_is_named(share, tmp_path):
    path = tmp_path / "run.pt"
    hs.save({"optimizer": fixture("adamw")}, path)
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(RuntimeError, match="cannot read '.*run.pt' as a checkpoint: "):
        hs.load(path)


def test_objects_are_not_read(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "class.pt")
    with pytest.raises(RuntimeError, match="cannot read '.*class.pt'"):
        hs.load(tmp_path / "class.pt")


# -- refused loads ---------------------------------------------------------------------------------
def edited(state, edit):
    state = copy.deepcopy(state)
    edit(state)
    return state


STATE_EDITS = {
    "has no 'state' ": lambda s: s.pop("state"),
    "has no 'param_groups'": lambda s: s.pop("param_groups"),
    "has format 2; this halfstep reads format 1": lambda s: s.update(format=2),
    "is of SGD but this optimizer is AdamW": lambda s: s.update(optimizer="SGD"),
    "has 2 parameter groups but the optimizer has 1": lambda s: s["param_groups"].append(s["param_groups"][0]),
    "has 4 parameters in group 0 but the optimizer has 3": lambda s: s["param_groups"][0]["params"].append(3),
    "has no entry 2 for 'gain'": lambda s: s["state"].pop(2),
    "of 'gain' has no 'step'": lambda s: s["state"][2].pop("step"),
    "of 'bias' has no 'exp_avg_sq'": lambda s: s["state"][1].pop("exp_avg_sq"),
    "of 'bias' has no 'master'": lambda s: s["state"][1].pop("master"),
    r"'exp_avg' of 'bias' is \[2\] but the parameter is \[3\]": lambda s: s["state"][1].update(exp_avg=torch.zeros(2)),
    "'exp_avg' of 'bias' is torch.int32; expected a floating dtype": lambda s: s["state"][1].update(exp_avg=torch.zeros(3, dtype=torch.int32)),
    "'exp_avg' of 'bias' is float; expected a tensor": lambda s: s["state"][1].update(exp_avg=0.5),
    "'step' of 'gain' is -1": lambda s: s["state"][2].update(step=torch.tensor(-1.0)),
    "'step' of 'gain' is nan": lambda s: s["state"][2].update(step=math.nan),
    r"'master' of 'bias' is \[2\]": lambda s: s["state"][1].update(master=torch.zeros(2)),
    "'bias' does not fit": lambda s: s["state"][1].update(master=torch.full((3,), 1e5)),
    "is for other weights: 'bias' differs in 1 of 3 elements; load the model first or pass masters=\"from_params\"":
        lambda s: s["state"][1]["master"].__setitem__(1, 9.0),
    "of 'bias' has an unknown 'momentum'": lambda s: s["state"][1].update(momentum=torch.zeros(3)),
    "has an entry 7 that is no parameter's": lambda s: s["state"].update({7: {}}),
    "has lr 'fast' in group 0; expected a number": lambda s: s["param_groups"][0].update(lr="fast"),
    "has lr -1 in group 0; expected a number >= 0": lambda s: s["param_groups"][0].update(lr=-1),
    r"has betas \(0.9, 1.5\) in group 0": lambda s: s["param_groups"][0].update(betas=(0.9, 1.5)),
    "has amsgrad 1 in group 0; expected True or False": lambda s: s["param_groups"][0].update(amsgrad=1),
}


@pytest.mark.parametrize("message", STATE_EDITS)
def test_a_refused_state_changes_nothing(message):
    model = golden.Model().filled()
    optimizer = hs.optim.AdamW(model.named_parameters(), lr=0.5)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    good = edited(golden.fill(hs.optim.AdamW(golden.Model().named_parameters())).state_dict(), STATE_EDITS[message])
    before = everything(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(good)
    assert everything(optimizer) == before
    assert optimizer.state[model.bias]["exp_avg"] is optimizer._rooms[0].states["exp_avg"][1]


def test_packed_remainders_of_other_weights_are_refused():
    model = golden.Model().filled()
    optimizer = hs.optim.AdamW(model.named_parameters())
    before = everything(optimizer)
    state = fixture("adamw_packed")
    for edit, message in ((lambda s: s["state"][1].update(remainder=torch.zeros(3)), "'remainder' of 'bias' is torch.float32; expected int16"),
                          (lambda s: s["state"][1].pop("weight_checksum"), "of 'bias' has no 'weight_checksum'")):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(edited(state, edit))
    assert everything(optimizer) == before
    with torch.no_grad():
        model.weight[0, 0] += 1
    before = everything(optimizer)
    with pytest.raises(ValueError, match="is for other weights: 'weight' differs; load the model first or pass masters=\"from_params\""):
        optimizer.load_state_dict(state)
    assert everything(optimizer) == before
    optimizer.load_state_dict(state, masters="from_params")
    assert torch.equal(optimizer.master_params()[0], model.weight.detach().float())
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], golden.counted((2, 3), golden.MOMENT))


def test_a_packed_remainder_loads_into_every_master():
    model = golden.Model().filled()
    split = hs.optim.AdamW(model.named_parameters())
    split.load_state_dict(fixture("adamw_packed"))
    wide = hs.optim.AdamW(model.named_parameters(), master="fp32")
    wide.load_state_dict(fixture("adamw_packed"))
    assert all(torch.equal(a, b) for a, b in zip(wide.master_params(), split.master_params()))


@pytest.mark.parametrize("name,found,rule", [("torch_sgd", "SGD", hs.optim.AdamW), ("torch_adamw", "AdamW", hs.optim.Adam), ("torch_adamw", "AdamW", hs.optim.SGD),
                                             ("adamw", "AdamW", hs.optim.SGD), ("masters_rmsprop", r"Masters\(RMSprop\)", hs.optim.AdamW)])
def test_a_file_of_another_optimizer_names_both(name, found, rule):
    model = golden.Model().filled()
    optimizer = rule(model.named_parameters())
    before = everything(optimizer)
    with pytest.raises(ValueError, match=f"optimizer state is of {found} but this optimizer is {rule.__name__}"):
        optimizer.load_state_dict(fixture(name))
    assert everything(optimizer) == before


def test_masters_refuse_and_keep_what_they_have():
    model = golden.Model().filled()
    optimizer = hs.optim.Masters(torch.optim.RMSprop, model.named_parameters(), lr=2e-3)
    optimizer.load_state_dict(fixture("masters_rmsprop"))
    before = copy.deepcopy(optimizer.state_dict())
    state = fixture("masters_rmsprop")
    cases = [(edited(state, lambda s: s["state"][1].pop("master")), "of 'bias' has no 'master'"),
             (edited(state, lambda s: s["state"][1].update(master=torch.zeros(3))), "is for other weights: 'bias' differs in 3 of 3"),
             (edited(state, lambda s: s["state"][1].update(square_avg=torch.zeros(4))), r"'square_avg' of 'bias' is \[4\] but here it is \[3\]"),
             (edited(state, lambda s: s.update(optimizer="Masters(Adagrad)")), r"is of Masters\(Adagrad\) but this optimizer is Masters\(RMSprop\)"),
             (edited(state, lambda s: s["param_groups"][0]["params"].pop()), "has 2 parameters in group 0 but the optimizer has 3"),
             (fixture("torch_adamw"), "no 'alpha' in group 0 .*is it of another optimizer than RMSprop"), (fixture("adamw"), "is of AdamW but")]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
        assert same(optimizer.state_dict(), before), message


def scaler_everything(scaler):
    return repr((scaler.state_dict(), scaler.stats(), scaler.policy, scaler._state, scaler._scale, scaler._policy_vector))


@pytest.mark.parametrize("message,edit", [
    ("scale inf", lambda s: s.update(scale=math.inf)), ("scale nan", lambda s: s.update(scale=math.nan)), ("scale 0.0", lambda s: s.update(scale=0.0)),
    ("no 'growth_factor'", lambda s: s.pop("growth_factor")), ("'growth_interval' is 'often'", lambda s: s.update(growth_interval="often")),
    ("growth_factor is 0.5", lambda s: s.update(growth_factor=0.5)), ("_growth_tracker -1", lambda s: s.update(_growth_tracker=-1)),
    ("format 2", lambda s: s["halfstep"].update(format=2)), ("'state' is ", lambda s: s["halfstep"].update(state=[1.0] * 15)),
    ("'policy' is ", lambda s: s["halfstep"].pop("policy")), ("policy kind 9", lambda s: s["halfstep"]["policy"].__setitem__(0, 9.0)),
    ("hysteresis is 0", lambda s: s["halfstep"]["policy"].__setitem__(7, 0.0)), ("no 'updates'", lambda s: s["halfstep"].pop("updates"))])
@pytest.mark.parametrize("used", [False, True])
def test_a_refused_scaler_state_changes_nothing(message, edit, used):
    scaler = hs.GradScaler(policy=hs.policies.preset("megatron"))
    if used:
        scaler.scale(torch.ones(1))
    before = scaler_everything(scaler)
    with pytest.raises(ValueError, match=message):
        scaler.load_state_dict(edited(fixture("scaler"), edit))
    assert scaler_everything(scaler) == before


# -- what a load means -----------------------------------------------------------------------------
def walk(scaler, optimizer, param, bad):
    optimizer.zero_grad()
    scaler.scale(param.sum() * (math.inf if bad else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale(), scaler._get_growth_tracker()


def test_stock_and_ours_go_on_in_lock_step_from_each_others_states():
    rng = random.Random(0)
    arms = []
    for _ in range(4):
        p = torch.nn.Parameter(torch.ones(2))
        arms.append((p, torch.optim.SGD([p], lr=0.0)))
    stock = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_factor=4.0, backoff_factor=0.25, growth_interval=3)
    ours = hs.GradScaler(policy=hs.policies.preset("torch", init_scale=2.0**9, growth_interval=5))
    for _ in range(17):
        bad = rng.random() < 0.3
        walk(stock, arms[0][1], arms[0][0], bad), walk(ours, arms[1][1], arms[1][0], bad)
    ours_from_stock, stock_from_ours = hs.GradScaler(policy=hs.policies.preset("torch")), torch.amp.GradScaler("cpu")
    ours_from_stock.load_state_dict(stock.state_dict())
    stock_from_ours.load_state_dict(ours.state_dict())
    for _ in range(60):
        bad = rng.random() < 0.3
        assert walk(stock, arms[0][1], arms[0][0], bad) == walk(ours_from_stock, arms[2][1], arms[2][0], bad)
        assert walk(ours, arms[1][1], arms[1][0], bad) == walk(stock_from_ours, arms[3][1], arms[3][0], bad)
    assert {k: v for k, v in ours_from_stock.state_dict().items() if k != "halfstep"} == stock.state_dict()


@pytest.mark.parametrize("policy", [hs.policies.preset("megatron", growth_interval=4), hs.policies.Static(512.0), hs.policies.Dynamic(hysteresis=3)])
def test_a_scaler_state_brings_its_policy(policy):
    saved = hs.GradScaler(policy=policy)
    p = torch.nn.Parameter(torch.ones(2))
    opt = torch.optim.SGD([p], lr=0.0)
    for bad in (False, True, False):
        walk(saved, opt, p, bad)
    other = hs.GradScaler(growth_interval=7)
    other.load_state_dict(saved.state_dict())
    assert other.policy == saved.policy and other.state_dict() == saved.state_dict()
    assert other.stats().steps_skipped == 1 and other.stats().step == 3 and math.isnan(other.stats().grad_norm)
    for bad in (True, True, False, False, False, True):
        assert walk(other, opt, p, bad) == walk(saved, opt, p, bad)
    assert other.state_dict() == saved.state_dict()


def test_loading_does_not_pass_through_the_parameter_dtype():
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = hs.optim.AdamW([param])
    held = [optimizer.state[param][key] for key in ("exp_avg", "exp_avg_sq", "master")]
    state = optimizer.state_dict()
    state["state"][0].update(exp_avg=torch.full((4,), 1e-9), exp_avg_sq=torch.full((4,), 1e-18))
    optimizer.load_state_dict(state)
    assert all(optimizer.state[param][key] is tensor for key, tensor in zip(("exp_avg", "exp_avg_sq", "master"), held))  # copied into
    assert torch.equal(held[0], torch.full((4,), 1e-9)) and torch.equal(held[1], torch.full((4,), 1e-18)) and held[2].dtype == torch.int16
    optimizer.load_state_dict(optimizer.state_dict(packed=True))
    assert held[2].dtype == torch.int16 and torch.equal(held[0], torch.full((4,), 1e-9))


def test_an_edited_weight_is_saved_with_a_master_that_follows_it():
    for master in ("fp32", "fp64"):  # a split16 master has the weight itself inside
        param = torch.nn.Parameter(torch.randn(8).half())
        optimizer = hs.optim.AdamW([param], master=master)
        param.grad = torch.randn(8).half()
        optimizer.step()
        with torch.no_grad():
            param[3] = 2.5
        with pytest.warns(UserWarning, match="their masters follow"):
            state = optimizer.state_dict()
        fresh = hs.optim.AdamW([torch.nn.Parameter(param.detach().clone())], master=master)
        fresh.load_state_dict(state)
        assert fresh.master_params()[0][3] == 2.5


@pytest.mark.parametrize("before,after", [(False, True), (True, False)])
def test_hyperparameters_come_from_the_file(before, after):
    """torch's rule; states that the file's options need are made, others go."""
    model, other = golden.Model().filled(), golden.Model().filled()
    saved = hs.optim.AdamW(model.named_parameters(), lr=0.25, amsgrad=after)
    torch.optim.lr_scheduler.StepLR(saved, 3)
    optimizer = hs.optim.AdamW(other.named_parameters(), lr=0.5, amsgrad=before)
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["initial_lr"] == 0.25
    for p, q in zip(model.parameters(), other.parameters()):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    saved.step(), optimizer.step()
    assert same(saved.state_dict(), optimizer.state_dict()) and same(dict(model.state_dict()), dict(other.state_dict()))
    assert ("max_exp_avg_sq" in optimizer.state[other.weight]) == after


def test_layouts_and_tied_storages_travel(tmp_path):
    param = torch.nn.Parameter(torch.randn(2, 3, 4, 4).half().to(memory_format=torch.channels_last))
    optimizer = hs.optim.AdamW([param])
    param.grad = torch.randn_like(param)
    optimizer.step()
    for packed in (False, True):
        hs.save(optimizer.state_dict(packed), tmp_path / "opt.pt")
        for shape in (torch.channels_last, torch.contiguous_format):
            other = torch.nn.Parameter(param.detach().clone(memory_format=shape))
            fresh = hs.optim.AdamW([other])
            fresh.load_state_dict(hs.load(tmp_path / "opt.pt"))
            assert torch.equal(fresh.master_params()[0], optimizer.master_params()[0])
            assert torch.equal(fresh.state[other]["exp_avg"], optimizer.state[param]["exp_avg"])
            other.grad = param.grad.clone(memory_format=shape)
            fresh.step()


def test_an_empty_entry_is_a_parameter_that_was_never_stepped():
    model = golden.Model().filled()
    optimizer = golden.fill(hs.optim.AdamW(model.named_parameters()))
    optimizer.load_state_dict(edited(optimizer.state_dict(), lambda s: s["state"].update({1: {}})))
    state = optimizer.state[model.bias]
    assert int(state["step"]) == 0 and not state["exp_avg"].any() and torch.equal(optimizer.master_params()[1], model.bias.detach().float())
    assert int(optimizer.state[model.weight]["step"]) == golden.STEP


def test_hooks_of_torch_optim_run():
    param = torch.nn.Parameter(torch.ones(3).half())
    optimizer, seen = hs.optim.AdamW([param]), []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before save"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": "mine"})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append(state.pop("note")))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("after load"))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert seen == ["before save", "mine", "after load"] and state["note"] == "mine"


def test_fp64_and_wide_masters_are_exact():
    for dtype, master in ((torch.float64, "auto"), (torch.float32, "fp64"), (torch.float16, "fp64"), (torch.bfloat16, "split16")):
        param = torch.nn.Parameter(torch.randn(50).to(dtype))
        optimizer = hs.optim.AdamW([param], lr=1e-3, master=master)
        for _ in range(3):
            param.grad = torch.randn(50).to(dtype)
            optimizer.step()
        other = torch.nn.Parameter(param.detach().clone())
        fresh = hs.optim.AdamW([other], master=master)
        fresh.load_state_dict(optimizer.state_dict())
        assert same(fresh.state_dict(), {**optimizer.state_dict()}) and torch.equal(fresh.master_params()[0], optimizer.master_params()[0])
