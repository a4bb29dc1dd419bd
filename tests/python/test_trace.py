"""Recording a run and replaying it: the recorded policy gives the recorded run, another one what the histograms allow to say."""

import gc
import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy
import pytest
import torch

import halfstep as hs
from halfstep import policies
from halfstep.trace import policy_of, read, table

pytestmark = pytest.mark.smoke
DYNAMIC = dict(growth_interval=4, min_scale=2.0**-10)


def net(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    hs.cast_model(model)
    return model


def train(path, steps=60, policy=None, every=1, bad=(), optimizer=None, unscale=False, scaler=None, spread=1.0, model=None, manual={}):
    """Trains with a recorder; returns the scales and skips that happened, and the losses."""
    model = net() if model is None else model
    opt = optimizer(model) if optimizer else hs.optim.AdamW(model.named_parameters(), lr=1e-2)
    scaler = scaler or hs.GradScaler(policy=policy or policies.Dynamic(init_scale=2.0**20, **DYNAMIC))
    g = torch.Generator().manual_seed(1)
    scales, skips, losses = [], [], []
    with hs.record(scaler, path, every=every) as recorder:
        for step in range(1, steps + 1):
            opt.zero_grad()
            x = torch.randn(8, 6, generator=g) * spread
            with hs.autocast("cpu"):
                loss = model(x).float().square().mean()
            if step in bad:
                loss = loss * math.nan
            scaler.scale(loss).backward()
            scales.append(scaler.get_scale())
            if unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update(*([manual[step]] if step in manual else []))
            skips.append(scaler.step_was_skipped())
            losses.append(float(loss.detach()))
    assert recorder.rows == steps and scaler._history.recorder is None
    return scales, skips, losses


KINDS = {"ours": None, "masters": lambda m: hs.optim.Masters(torch.optim.RMSprop, m.named_parameters(), lr=1e-3)}


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", ["ours", "masters"])
def test_the_recorded_policy_replayed_is_the_recorded_run(tmp_path, kind, unscale):
    path = tmp_path / "run.trace"
    scales, skips, losses = train(path, bad=(17, 18), optimizer=KINDS[kind], unscale=unscale)
    assert 3 < sum(skips) < 30 and len(set(scales)) > 3  # or it shows nothing
    for policy in (None, policies.Dynamic(init_scale=2.0**20, **DYNAMIC)):
        result = hs.simulate(path, policy)
        assert result.scale == scales and result.skipped == skips and result.step == list(range(1, 61))
        assert set(result.unknown.values()) == {0} and set(result.flushed) == {0.0}
    recorded = read(path)
    assert [s.loss for s in recorded.steps] == pytest.approx(losses, nan_ok=True) and [s.found_inf for s in recorded.steps] == skips
    assert [t["name"] for t in recorded.tensors] == ["0.weight", "0.bias", "2.weight", "2.bias"] and {t["dtype"] for t in recorded.tensors} == {"float16"}


def test_a_run_that_goes_on_from_a_checkpoint_and_changes_by_hand(tmp_path):
    scaler = hs.GradScaler(policy=policies.Dynamic(init_scale=2.0**24, **DYNAMIC))
    train(tmp_path / "first", steps=10, scaler=scaler)
    again = hs.GradScaler(policy=policies.Dynamic(init_scale=8.0))
    again.load_state_dict(scaler.state_dict())
    path = tmp_path / "second"
    scales, skips, _ = train(path, steps=30, scaler=again, manual={5: 2.0**18, 11: 4.0})
    result = hs.simulate(path)
    assert result.scale == scales and result.skipped == skips and scales[5] == 2.0**18 and scales[11] == 4.0
    again.set_growth_interval(1)
    state = again.state_dict()
    with hs.record(again, path):
        p = torch.nn.Parameter(torch.zeros(2).half())
        opt, scales = hs.optim.SGD([p], lr=0.0), []
        for i in range(6):
            if i == 3:
                again.load_state_dict(state)
            scales.append(again.get_scale())
            again.scale(p.float().sum()).backward()
            again.step(opt), again.update(), opt.zero_grad()
    assert hs.simulate(path).scale == scales == [scales[0] * f for f in (1, 2, 4, 1, 2, 4)]


def test_several_optimizers_and_every_third_histogram(tmp_path):
    a, b = torch.nn.Parameter(torch.zeros(2).half()), torch.nn.Parameter(torch.zeros(3))
    opts = [hs.optim.SGD([("w", a)], lr=0.0), torch.optim.SGD([("w", b)], lr=0.0)]
    scaler = hs.GradScaler(init_scale=4.0)
    path = tmp_path / "t"
    with hs.record(scaler, path, every=3):
        for step in range(5):
            scaler.scale(torch.tensor(1.5)), scaler.scale(torch.tensor([1.0]))
            a.grad, b.grad = torch.tensor([8.0, 0.0]).half(), torch.tensor([1.0, math.inf if step == 3 else 2.0, 0.0])
            for opt in opts:
                scaler.step(opt)
            scaler.update()
    recorded = read(path)
    assert [(t["name"], t["optimizer"], t["dtype"], t["numel"]) for t in recorded.tensors] == [("w", 1, "float16", 2), ("w", 2, "float32", 3)]
    assert [s.grads is not None for s in recorded.steps] == [True, False, False, True, False] and [s.loss for s in recorded.steps] == [2.5] * 5
    grads = recorded.steps[0].grads
    assert grads.count.tolist() == [2, 3] and grads.zeros.tolist() == [1, 1] and grads.nonfinite.tolist() == [0, 0] and grads.largest.tolist() == [2.0, 0.5]
    assert recorded.steps[3].grads.nonfinite.tolist() == [0, 1]
    assert grads.counts[0].nonzero().flatten().tolist() == [1 + 40 + 1] and grads.counts[1].nonzero().flatten().tolist() == [1 + 40 - 2, 1 + 40 - 1]


def test_optimizers_that_step_in_turn_keep_their_tensors_apart(tmp_path):
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))
    opts, scaler = [hs.optim.SGD([("w", a)], lr=0.0), hs.optim.SGD([("w", b)], lr=0.0)], hs.GradScaler()
    with hs.record(scaler, tmp_path / "t"):
        for step in range(4):
            scaler.scale(torch.ones(()))
            (a, b)[step % 2].grad = torch.ones(2 + step % 2)
            scaler.step(opts[step % 2]), scaler.update()
    assert [s.grads.tensors.tolist() for s in read(tmp_path / "t").steps] == [[0], [1], [0], [1]] and [t["optimizer"] for t in read(tmp_path / "t").tensors] == [1, 2]


def test_recording_that_begins_within_an_iteration_starts_with_the_next(tmp_path):
    p = torch.nn.Parameter(torch.zeros(2))
    opt, scaler = hs.optim.SGD([("w", p)], lr=0.0), hs.GradScaler()
    scaler.scale(torch.ones(()))
    p.grad = torch.ones(2)
    scaler.unscale_(opt)
    with hs.record(scaler, tmp_path / "t") as recorder:
        scaler.step(opt), scaler.update()
        assert recorder.rows == 0
        scaler.scale(torch.full((), 3.0))
        p.grad = torch.ones(2)
        scaler.step(opt), scaler.update()
    assert [(s.step, s.loss, s.grads.count.tolist()) for s in read(tmp_path / "t").steps] == [(1, 3.0, [2])]


def test_a_scale_set_by_hand_without_a_step_is_recorded(tmp_path):
    p = torch.nn.Parameter(torch.zeros(2))
    opt, scaler = hs.optim.SGD([("w", p)], lr=0.0), hs.GradScaler(init_scale=1024.0)
    with hs.record(scaler, tmp_path / "t"):
        for by_hand in (None, 64.0, None):
            scaler.scale(torch.ones(()))
            if by_hand is None:
                p.grad = torch.full((2,), math.inf)
                scaler.step(opt), scaler.update()
            else:
                scaler.update(by_hand)
    steps = read(tmp_path / "t").steps
    assert [(s.scale, s.set, s.found_inf) for s in steps] == [(1024.0, None, True), (512.0, 64.0, False), (64.0, None, True)] and steps[1].grads is None
    assert hs.simulate(tmp_path / "t").scale == [1024.0, 512.0, 64.0]


def test_an_optimizer_that_took_the_place_of_another_has_tensors_of_its_own(tmp_path):
    scaler = hs.GradScaler()
    with hs.record(scaler, tmp_path / "t"):
        for dtype, size in ((torch.float16, 2), (torch.float32, 3), (torch.float32, 3)):
            p = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
            opt = hs.optim.SGD([("w", p)], lr=0.0)
            scaler.scale(torch.ones(()))
            p.grad = torch.ones_like(p)
            scaler.step(opt), scaler.update()
            del opt, p
            gc.collect()
    assert [(t["optimizer"], t["dtype"], t["numel"]) for t in read(tmp_path / "t").tensors] == [(1, "float16", 2), (2, "float32", 3), (3, "float32", 3)]


# -- what another policy would have seen, against the gradients themselves -------------------------
def make(path, gradients, scale, dtype=torch.float16, loss=1.0, found=()):
    """A trace of given unscaled gradients at a fixed scale; returns what FP16 stored."""
    p = torch.nn.Parameter(torch.zeros(len(gradients[0]), dtype=dtype))
    opt, scaler = hs.optim.SGD([("w", p)], lr=0.0), hs.GradScaler(policy=policies.Static(scale))
    with hs.record(scaler, path):
        for i, gradient in enumerate(gradients):
            scaler.scale(torch.tensor(loss))
            p.grad = (torch.tensor(gradient, dtype=torch.float64) * scale).to(dtype)
            scaler.step(opt), scaler.update()


@pytest.mark.parametrize("scale", [2.0**k for k in range(-6, 13, 2)])
def test_skips_and_flushed_shares_are_those_of_fp16(tmp_path, scale):
    rng = numpy.random.default_rng(0)
    gradients = [numpy.exp2(rng.uniform(-16, 4 + i / 4, 2000)) * (rng.integers(0, 8, 2000) > 0) for i in range(16)]
    make(tmp_path / "t", gradients, 2.0**8)
    exact = [(numpy.asarray(g) * 2.0**8).astype(numpy.float16).astype(numpy.float64) / 2.0**8 for g in gradients]
    result = hs.simulate(tmp_path / "t", policies.Static(scale))
    assert any(numpy.abs(g).max() * 2.0**12 >= 65520 for g in exact) and not all(numpy.abs(g).max() * 2.0**12 >= 65520 for g in exact)
    for i, gradient in enumerate(exact):
        with numpy.errstate(over="ignore"):
            stored = (gradient * scale).astype(numpy.float16)
        nonzero = (gradient != 0).sum()
        assert result.skipped[i] == bool(numpy.isinf(stored).any()), i
        # Ties at 2^-25 round to zero, and the histogram says they do not: none among random numbers.
        assert result.flushed[i] == pytest.approx(((gradient != 0) & (stored == 0)).sum() / nonzero, abs=0.002)
        small = (gradient != 0) & (numpy.abs(gradient * scale) < 2.0**-14) & (stored != 0)
        assert result.subnormal[i] == pytest.approx(small.sum() / nonzero, abs=0.002)
    assert result.unknown["zeros"] == (16 if scale > 2.0**8 else 0) and result.unknown["overflow"] == 0


def test_a_scale_that_is_no_power_of_two_cuts_a_bin_in_proportion(tmp_path):
    make(tmp_path / "t", [[2.0**-10 * (1 + i / 4096) for i in range(4096)]], 1024.0)
    cut = hs.simulate(tmp_path / "t", policies.Static(2.0**-15 / 1.5)).flushed[0]  # 2^-25 lies at 1.5 * 2^-10: half of the values, log2(1.5) of the bin
    assert cut == pytest.approx(math.log2(1.5), abs=1e-3)


def test_the_largest_value_decides_not_its_bin(tmp_path):
    make(tmp_path / "t", [[40000.0 / 1024, 1.0]], 1.0)
    at = lambda scale: hs.simulate(tmp_path / "t", policies.Static(scale)).skipped
    assert at(1024.0) == [False] and at(1024 * 1.63) == [False] and at(1024 * 1.64) == [True]


def test_what_cannot_be_known_is_counted_and_printed(tmp_path):
    fine, high = [0.5, 0.0], [2.0**20, 0.5]
    make(tmp_path / "t", [fine, high, fine, fine], 2.0**4)
    lower = hs.simulate(tmp_path / "t", policies.Static(1.0))
    assert lower.skipped == [False] * 4 and lower.unknown == {"overflow": 1, "zeros": 0, "not recorded": 0, "weights": 2}
    text = table([lower])
    assert "overflow 1, weights 2" in text and "unknown, overflow: a step that was not finite at a higher scale: taken as finite" in text and "unknown, zeros" not in text
    higher = hs.simulate(tmp_path / "t", policies.Static(2.0**10))
    assert higher.skipped == [False, True, False, False] and higher.unknown == {"overflow": 0, "zeros": 3, "not recorded": 0, "weights": 0}
    make(tmp_path / "n", [high], 2.0**4, loss=math.nan)
    assert hs.simulate(tmp_path / "n", policies.Static(1.0)).skipped == [True]  # the loss was not finite: no scale helps
    train(tmp_path / "e", steps=9, every=4, policy=policies.Static(2.0**12))
    sparse = hs.simulate(tmp_path / "e", policies.Static(2.0**13))
    assert sparse.unknown["not recorded"] == 6 and [f is None for f in sparse.flushed] == [False, True, True, True] * 2 + [False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tensors_that_are_not_fp16_neither_overflow_nor_flush(tmp_path, dtype):
    make(tmp_path / "t", [[1.0, 2.0**-30]], 1.0, dtype=dtype)
    result = hs.simulate(tmp_path / "t", policies.Static(2.0**60))
    assert result.skipped == [False] and result.flushed == [0.0]


def test_an_fp32_tensor_beyond_the_range_of_fp16_is_not_taken_for_one(tmp_path):
    make(tmp_path / "t", [[2.0, 1.0], [2.0**16, 1.0]], 4.0, dtype=torch.float32)
    assert hs.simulate(tmp_path / "t", policies.Static(2.0**15)).skipped == [False, False]
    make(tmp_path / "t", [[2.0, 1.0]], 4.0, dtype=torch.float32)
    assert hs.simulate(tmp_path / "t", policies.Static(2.0**15)).skipped == [True]  # nothing speaks against autocast here


# -- the file --------------------------------------------------------------------------------------
def test_every_prefix_of_a_file_can_be_read(tmp_path):
    path = tmp_path / "run.trace"
    scales, _, _ = train(path, steps=6)
    whole = path.read_bytes()
    seen = set()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        try:
            steps = read(path).steps
        except ValueError as error:
            assert "holds no step" in str(error) or "is not a halfstep trace" in str(error)
            continue
        assert [s.scale for s in steps] == scales[: len(steps)]
        seen.add(len(steps))
    assert seen == {1, 2, 3, 4, 5}


def test_a_process_that_is_killed_leaves_its_steps(tmp_path):
    path = tmp_path / "run.trace"
    program = textwrap.dedent("""
        import os, signal, sys, torch, halfstep as hs
        p = torch.nn.Parameter(torch.zeros(1000).half())
        opt, scaler = hs.optim.SGD([("p", p)], lr=0.0), hs.GradScaler()
        hs.record(scaler, sys.argv[1])
        for i in range(50):
            scaler.scale((p.float() * 1e-3).sum()).backward(); scaler.step(opt); scaler.update(); opt.zero_grad()
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", program, str(path)], env=dict(os.environ, PYTHONPATH=os.path.dirname(os.path.dirname(hs.__file__))))
    assert done.returncode == -signal.SIGKILL and len(hs.simulate(path).scale) == 50


def test_files_that_are_no_trace_are_refused_by_name(tmp_path):
    path = tmp_path / "x"
    for text, message in [("", "is not a halfstep trace"), ('{"a": 1}\n', "is not a halfstep trace"), ("\x00\x01\n", "is not a halfstep trace"),
                          ('{"format":"halfstep-trace","version":2}\n', "version 2; this halfstep reads version 1"), ('{"format":"halfstep-trace","version":1}\n', "holds no step"),
                          ('{"format":"halfstep-trace","version":1}\n{"step":1}\n', "line 2: KeyError 'scale'"), ('{"format":"halfstep-trace","version":1}\n{]\n', "line 2: JSONDecodeError")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            hs.simulate(path)


def test_a_recorder_is_one_a_scaler_and_takes_what_it_can_do(tmp_path):
    scaler = hs.GradScaler()
    recorder = hs.record(scaler, tmp_path / "a")
    with pytest.raises(ValueError, match="is being recorded into .*a already"):
        hs.record(scaler, tmp_path / "b")
    recorder.close(), recorder.close()
    hs.record(scaler, tmp_path / "b").close()
    with pytest.raises(ValueError, match="every is 0"):
        hs.record(scaler, tmp_path / "c", every=0)
    with pytest.raises(ValueError, match="disabled"):
        hs.record(hs.GradScaler(enabled=False), tmp_path / "c")
    with pytest.raises(FileNotFoundError):
        hs.record(scaler, tmp_path / "nowhere" / "c")
    assert scaler._history.recorder is None
    with pytest.raises(TypeError, match="policy is str"):
        make(tmp_path / "t", [[1.0]], 1.0)
        hs.simulate(tmp_path / "t", "torch")


def test_a_capture_is_refused(tmp_path, monkeypatch):
    p = torch.nn.Parameter(torch.zeros(2).half())
    opt, scaler = hs.optim.SGD([p], lr=0.0), hs.GradScaler()
    scaler.scale(torch.zeros(()))
    with hs.record(scaler, tmp_path / "t"):
        monkeypatch.setattr("halfstep._recording.capturing", lambda: True)
        p.grad = torch.ones(2).half()
        with pytest.raises(RuntimeError, match="a captured step cannot be recorded"):
            scaler.step(opt)


def test_recording_changes_nothing(tmp_path):
    runs = []
    for recorded in (False, True):
        model, scaler = net(), hs.GradScaler(policy=policies.Dynamic(init_scale=2.0**20, **DYNAMIC))
        opt = hs.optim.AdamW(model.named_parameters(), lr=1e-2)
        recorder = hs.record(scaler, tmp_path / "t", every=2) if recorded else None
        g = torch.Generator().manual_seed(1)
        for _ in range(20):
            opt.zero_grad()
            with hs.autocast("cpu"):
                loss = model(torch.randn(8, 6, generator=g)).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(opt), scaler.update()
        runs.append([*opt.master_params(), scaler._state.clone()])
        if recorder:
            recorder.close()
    assert all(torch.equal(a, b) for a, b in zip(*runs))


# -- results ---------------------------------------------------------------------------------------
def test_results_as_json_table_plot_and_frame(tmp_path):
    train(tmp_path / "t", steps=12)
    result = hs.simulate(tmp_path / "t", policies.preset("torch"))
    text = json.loads(result.to_json(tmp_path / "r.json"))
    assert text == json.loads((tmp_path / "r.json").read_text()) and text["scale"] == result.scale and text["skipped"] == result.skipped
    result.plot(tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    assert str(result).splitlines()[0].split()[:3] == ["policy", "steps", "skipped"]
    assert result.policy.startswith("Dynamic(min_scale=")
    assert hs.simulate(tmp_path / "t", policies.Static(2.0), name="two").policy == "two" and hs.simulate(tmp_path / "t", policies.Static(2.0)).policy == "Static(scale=2)"


def test_results_as_a_frame(tmp_path):
    pandas = pytest.importorskip("pandas")
    train(tmp_path / "t", steps=12)
    result = hs.simulate(tmp_path / "t", policies.preset("torch"))
    frame = result.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and list(frame.scale) == result.scale and frame.attrs["unknown"] == result.unknown


def test_policies_by_name():
    assert policy_of("torch") == policies.preset("torch") and policy_of("recorded") is None
    assert policy_of("static:scale=1024") == policies.Static(1024) and policy_of("dynamic:growth_interval=7,refill=growth").growth_interval == 7
    assert policy_of("megatron:init_scale=64") == policies.preset("megatron", init_scale=64)
    for text, message in [("nobody", "'nobody' is unknown"), ("torch:growth_interval", "expected name:key=value"), ("static:size=3", "unexpected keyword"),
                          ("recorded:x=1", "takes no options"), ("static:scale=-1", "scale is -1"), ("torch:nothing=3", "policy 'torch:nothing=3'")]:
        with pytest.raises(ValueError, match=message):
            policy_of(text)


def test_the_command_prints_one_table_and_writes_what_is_asked_for(tmp_path):
    train(tmp_path / "t", steps=12)
    command = [sys.executable, "-m", "halfstep", "simulate", str(tmp_path / "t")]
    env = dict(os.environ, PYTHONPATH=os.path.dirname(os.path.dirname(hs.__file__)))
    run = lambda *args: subprocess.run([*command, *args], capture_output=True, text=True, env=env)
    done = run("--policy", "torch", "--policy", "static:scale=256", "--policy", "recorded", "--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "p.json"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("policy") and lines[2].startswith("static:scale=256 ") and lines[3].startswith("recorded: Dynamic(init_scale=1.04858e+06, growth_interval=4") and lines[3].split()[-1] == "0"
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG" and [len(r["scale"]) for r in json.loads((tmp_path / "p.json").read_text())] == [12] * 3
    alone = run()
    assert alone.returncode == 0 and len(alone.stdout.splitlines()) == 2
    wrong = run("--policy", "nobody")
    assert wrong.returncode == 1 and "halfstep simulate: policy preset 'nobody' is unknown" in wrong.stderr and "Traceback" not in wrong.stderr


def test_the_example_records_and_compares_policies(tmp_path):
    program = os.path.join(os.path.dirname(__file__), "../../examples/python/record_and_simulate.py")
    env = dict(os.environ, PYTHONPATH=os.path.dirname(os.path.dirname(hs.__file__)), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, program, "--out", str(tmp_path), "--steps", "12"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert {"torch", "no scale", "static 1024"} <= set(rows) and len(read(tmp_path / "digits.trace").steps) == 12
    assert (tmp_path / "digits_policies.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(not hasattr(policies, "Policy"), reason="this version has no policies of the user's")
def test_a_policy_of_the_users_own_is_replayed(tmp_path):
    class Half(policies.Policy):
        init_scale = 2.0**20

        def init(self):
            return {"clean": torch.zeros(())}

        def update(self, state, stats):
            state["clean"] = torch.where(stats.found_inf != 0, 0.0, state["clean"] + 1)
            grow = state["clean"] >= 4
            state["clean"] = torch.where(grow, 0.0, state["clean"])
            return torch.where(stats.found_inf != 0, stats.scale / 2, torch.where(grow, stats.scale * 2, stats.scale))

    scales, skips, _ = train(tmp_path / "t", policy=Half())
    result = hs.simulate(tmp_path / "t", Half())
    assert result.scale == scales and result.skipped == skips and 3 < sum(skips)
    with pytest.raises(ValueError, match="recorded a policy of yours, Half; pass it"):
        hs.simulate(tmp_path / "t")


@pytest.mark.skipif(not hasattr(policies, "Policy"), reason="this version has no policies of the user's")
def test_a_policy_that_runs_on_the_host_is_replayed(tmp_path):
    class Norm(policies.Policy):
        init_scale, host = 2.0**14, True

        def update(self, state, stats):
            return stats.scale / 2 if stats.last_found_inf else 2.0 ** (14 + stats.steps_applied % 3)

    scales, skips, _ = train(tmp_path / "t", policy=Norm())
    result = hs.simulate(tmp_path / "t", Norm())
    assert result.scale == scales and result.skipped == skips and len(set(scales)) >= 3


@pytest.mark.parametrize("name", ["LogMax", "Occupancy", "Underflow"])
def test_policies_that_look_at_gradients_are_replayed_exactly(tmp_path, name):
    if not hasattr(policies, name):
        pytest.skip(f"this version has no {name}")
    policy = getattr(policies, name)(**{} if name == "LogMax" else {"init_scale": 2.0**20})
    scales, skips, _ = train(tmp_path / "t", policy=policy)
    for again in (policy, None):
        result = hs.simulate(tmp_path / "t", again)
        assert result.scale == scales and result.skipped == skips
    assert len(set(scales)) > 1
