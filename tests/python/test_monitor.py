"""hs.monitor: what it says against counts of another kind, that it changes nothing, and what it survives; the status line."""

import contextlib
import copy
import importlib.util
import io
import json
import math
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import halfstep as hs
from halfstep import _monitor_schema as schema
from halfstep import _watch, cli
from halfstep._shares import unpacked
from test_compare_shares import counted
from test_compare_tensorboard import scalars

ROOT = Path(__file__).resolve().parents[2]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_backward_hooks")


pytestmark = pytest.mark.usefixtures("one_thread")


class Mixed(nn.Module):
    """A bit of everything that a monitor must survive."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(30, 16, sparse=kind == "sparse")
        self.twice = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.batch = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.3)
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(16, 5)
        if kind == "tied":
            self.head = nn.Linear(16, 30, bias=False)
            self.head.weight = self.embed.weight
        if kind == "frozen":
            self.embed.weight.requires_grad_(False)
            self.twice.requires_grad_(False)

    def inner(self, x):
        return nn.functional.relu(self.twice(self.norm(self.drop(x))), inplace=True)

    def forward(self, ids):
        x = self.embed(ids)
        for _ in range(2):
            x = checkpoint(self.inner, x, use_reentrant=self.kind == "reentrant") if self.kind in ("checkpoint", "reentrant") else self.inner(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.lstm(x.float() if self.kind == "autocast" else x)[0]
        return self.head(self.batch(x.transpose(1, 2)).mean(-1))


def train(kind="cast", look=None, steps=8, scaler=None, micro=1, **kw):
    """(state at the end, the monitor); look: every."""
    torch.manual_seed(3)
    model = Mixed(kind)
    if kind not in ("autocast", "plain", "sparse"):
        hs.cast_model(model, keep_fp32=[nn.LayerNorm, nn.BatchNorm1d])
    if kind in ("autocast", "sparse"):
        optimizer = (torch.optim.SGD if kind == "sparse" else torch.optim.AdamW)(model.parameters(), lr=1e-2)
    else:
        optimizer = hs.optim.AdamW(model.named_parameters(), lr=1e-2)
    scaler = hs.GradScaler(init_scale=2.0**12, growth_interval=3) if scaler is None else scaler
    mon = hs.monitor(model, optimizer, scaler or None, every=look, **kw) if look else None
    with mon or contextlib.nullcontext():
        for step in range(steps):
            optimizer.zero_grad()
            for _ in range(micro):
                with hs.autocast("cpu", enabled=kind not in ("plain", "sparse")):
                    loss = nn.functional.cross_entropy(model(torch.randint(0, 30, (6, 4))).float(), torch.randint(0, 5, (6,)))
                (scaler.scale(loss) if scaler else loss).backward()
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            with torch.no_grad(), hs.autocast("cpu", enabled=kind not in ("plain", "sparse")):
                model.eval()(torch.randint(0, 30, (2, 4)))
                model.train()
    moments = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    masters = optimizer.master_params() if isinstance(optimizer, hs.optim.Optimizer) else []
    return [*model.state_dict().values(), *moments, *masters, torch.get_rng_state()], mon


def same(a, b):
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x.nan_to_num() if x.is_floating_point() else x, y.nan_to_num() if y.is_floating_point() else y) for x, y in zip(a, b))


@pytest.mark.filterwarnings("ignore:None of the inputs")  # checkpoint's, of the evaluation
@pytest.mark.parametrize("kind", ["cast", "autocast", "plain", "tied", "frozen", "checkpoint", "reentrant", "sparse"])
def test_training_is_the_same_bits_and_every_layer_is_sampled(kind):
    with_monitor, mon = train(kind, look=1, steps=9)
    without, _ = train(kind, steps=9)
    assert same(with_monitor, without)
    report = schema.validate(mon.report())
    assert report["unsampled"] == {"unused": "not called in a sampled step"}
    kinds = {(row["name"], row["kind"]) for row in report["layers"]}
    expected = {("twice", "activation"), ("twice.weight", "weight"), ("lstm", "activation gradient"), ("attention.in_proj_weight", "weight gradient"), ("attention.out_proj.weight", "weight gradient"),
                ("head", "activation"), ("norm.weight", "weight gradient"), ("lstm.weight_hh_l0", "weight gradient")}
    assert expected <= kinds and (("twice.weight", "weight gradient") in kinds) == (kind != "frozen")


@pytest.mark.parametrize("scaler", [hs.GradScaler(enabled=False), False], ids=["disabled", "none"])
def test_a_run_without_a_scale_is_watched_too(scaler):
    with_monitor, mon = train("plain", look=1, scaler=scaler, micro=2)
    without, _ = train("plain", scaler=scaler, micro=2)
    report = schema.validate(mon.report())
    assert same(with_monitor, without) and report["status"]["step"] == 8 and report["scale"] is None and report["status"]["scale"] is None
    assert [s["step"] for s in report["shares"]["samples"]] == [1, 2, 3, 4, 5, 6, 8]  # 7: the layer that is not called


class Seen(nn.Module):
    """A layer whose inputs, outputs and gradients the test keeps for itself."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(40, 60)
        self.kept = {}

    def forward(self, x):
        y = self.fc(x)
        self.kept["x"] = x.detach().clone()
        y.register_hook(lambda g: self.kept.update(g=g.detach().clone()))
        return y


def test_shares_are_those_of_a_count_in_fp64():
    torch.manual_seed(1)
    net = Seen()
    with torch.no_grad():
        net.fc.weight *= torch.exp2(torch.randint(-30, 3, net.fc.weight.shape).float())
        net.fc.weight[:, ::5] = -0.0
    hs.cast_model(net)
    optimizer, scaler = hs.optim.SGD(net.named_parameters(), lr=0.0), hs.GradScaler(init_scale=2.0**10)
    x = torch.randn(1, 40) * torch.exp2(torch.randint(-20, 4, (1, 40)).float())
    x[:, ::7] = 0
    with hs.monitor(net, optimizer, scaler, every=1) as mon:
        with hs.autocast("cpu"):
            loss = (net(x).float() * torch.exp2(torch.randint(-30, 4, (1, 60)).float())).sum()
        scaler.scale(loss).backward()
        stored = {n: p.grad.clone() for n, p in net.named_parameters()}
        scaler.step(optimizer), scaler.update()
    weight, bias = optimizer.master_params()
    wide, g = {k: v.double() for k, v in (("x", net.kept["x"]), ("w", weight), ("b", bias))}, net.kept["g"].double()
    single = lambda t: t.float().double()  # what FP32 holds of a product, and of a sum that is exact in FP64
    expected = {("fc", "activation"): single(wide["x"] @ wide["w"].T + wide["b"]), ("fc.weight", "weight"): wide["w"], ("fc.bias", "weight"): wide["b"],
                ("fc.weight", "weight gradient"): single(g.T @ wide["x"]), ("fc.bias", "weight gradient"): g[0]}
    shares = mon.report()["shares"]
    found = {(shares["tensors"][row[0]]["name"], shares["tensors"][row[0]]["kind"]): unpacked(row) for row in shares["samples"][0]["rows"]}
    assert set(found) == set(expected)  # the input wants no gradient, so there is none
    for key, values in expected.items():
        for what, count in counted(values, 1.0).items():
            assert getattr(found[key], what) == count, (key, what)
    grad = found["fc.weight", "weight gradient"]
    assert grad.lost == int(((expected["fc.weight", "weight gradient"] != 0) & (stored["fc.weight"] == 0)).sum()) == grad.underflow > 100
    assert 60 * 30 < found["fc.weight", "weight"].nonzero <= 60 * 32 and 0 < grad.subnormal and grad.nonzero == 60 * 34 and shares["samples"][0]["scale"] == 2.0**10


def net_of(*layers, lr=1e-2, **kw):
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    optimizer = hs.optim.AdamW(model.named_parameters(), lr=lr)
    return model, optimizer, hs.GradScaler(**kw)


def one_step(model, optimizer, scaler, x=None, blow=False):
    optimizer.zero_grad()
    loss = model(torch.randn(8, 6) if x is None else x).float().square().mean()
    scaler.scale(loss * (math.inf if blow else 1.0)).backward()
    scaler.step(optimizer), scaler.update()


def test_scale_and_skips_are_those_of_a_recording(tmp_path):
    model, optimizer, scaler = net_of(nn.Linear(6, 3), init_scale=2.0**8, growth_interval=4)
    with hs.record(scaler, tmp_path / "t"), hs.monitor(model, optimizer, scaler, every=3) as mon:
        for step in range(70):
            one_step(model, optimizer, scaler, blow=step in (2, 3, 9))
            if step == 12:
                scaler.update(new_scale=2.0**20)
    from halfstep._worker import trajectory
    recorded = trajectory(tmp_path / "t")
    ours = mon.report()["scale"]
    assert ours["skipped"] == [3, 4, 10] and ours["longest"] == 2 == recorded["longest"] and ours["stable_from"] == 11
    at = {s: v for s, v in ours["points"]}
    # The recording counts the update by hand as one of its own, the scaler does not: from there on it is one ahead.
    assert [v for _, v in ours["points"]] == [v for _, v in recorded["points"]] and at[1] == 2.0**8 and at[14] == 2.0**20 and len(at) > 15
    status = mon.status()
    assert (status["state"], status["step"], status["skipped"], status["scale"]) == ("ended", 70, 3, scaler.get_scale())


def test_loading_an_earlier_state_takes_the_trajectory_back():
    model, optimizer, scaler = net_of(nn.Linear(6, 3), init_scale=2.0**8)
    with hs.monitor(model, optimizer, scaler) as mon:
        for _ in range(3):
            one_step(model, optimizer, scaler)
        state = scaler.state_dict()
        for step in range(5):
            one_step(model, optimizer, scaler, blow=step == 1)
        scaler.load_state_dict(state)
        one_step(model, optimizer, scaler)
    assert mon.report()["scale"] == {"steps": 4, "points": [[1, 256.0]], "skipped": [], "longest": 1, "stable_from": None}


@pytest.mark.parametrize("stock", [False, True])
def test_headroom_of_every_gradient_comes_from_the_free_counters(stock):
    model, optimizer, scaler = net_of(nn.Linear(6, 3), nn.Linear(3, 2), init_scale=2.0**10, growth_interval=2)
    if stock:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with hs.monitor(model, optimizer, scaler, every=3, layers=[]) as mon:
        for step in range(3):
            optimizer.zero_grad()
            scale = scaler.get_scale()
            scaler.scale(model(torch.randn(8, 6)).square().mean()).backward()
            scaled = {n: float(p.grad.abs().max()) for n, p in model.named_parameters()}
            scaler.step(optimizer), scaler.update()
    found = mon.report()["gradients"]
    assert found["step"] == 3 and scale == 2.0**11 and [t["name"] for t in found["tensors"]] == list(scaled)
    for tensor in found["tensors"]:
        assert tensor["headroom"] == pytest.approx(math.log2(65504 / scaled[tensor["name"]]), abs=1e-6) == tensor["least_headroom"]
    assert mon.report()["shares"] is None and mon.report()["unsampled"] == {}


def test_the_status_file_and_the_line_of_it(tmp_path, capsys):
    model, optimizer, scaler = net_of(nn.Linear(6, 3), init_scale=2.0**8)
    live = tmp_path / "live.json"
    with pytest.raises(ZeroDivisionError), hs.monitor(model, optimizer, scaler, every=2, live=live) as mon:
        assert schema.read(live)["status"]["state"] == "running" and cli.main(["watch", str(live), "--once"]) == 0
        for step in range(4):
            one_step(model, optimizer, scaler, blow=step == 1)
        mon._last_live -= 10
        one_step(model, optimizer, scaler)
        assert schema.read(live)["status"]["step"] == 5
        1 / 0
    status = schema.read(live)["status"]
    assert status["state"] == "failed" and status["error"] == "ZeroDivisionError: division by zero" and status["scale"] == 2.0**7
    capsys.readouterr()
    assert cli.main(["watch", str(live)]) == 1
    line = capsys.readouterr().out
    assert line.startswith("step 5  scale 2^7  skipped 1 (20 %)  loss ") and "bits 0." in line and line.endswith("failed: ZeroDivisionError: division by zero\n") and line.count("\n") == 1
    mon.write_json(tmp_path / "report.json")
    assert cli.main(["watch", str(tmp_path / "report.json"), "--once"]) == 1 and capsys.readouterr().out.startswith("step 5  ")
    assert list(tmp_path.iterdir()) and not [p for p in tmp_path.iterdir() if ".tmp." in p.name]


def test_watch_follows_until_the_job_ends(tmp_path, capsys):
    model, optimizer, scaler = net_of(nn.Linear(6, 3))
    mon = hs.monitor(model, optimizer, scaler, live=tmp_path / "live")
    one_step(model, optimizer, scaler)
    ends = threading.Timer(0.3, mon.close)
    ends.start()
    assert cli.main(["watch", str(tmp_path / "live"), "--every", "0.05"]) == 0
    ends.join()
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 0  ") and last.startswith("step 1  ") and last.endswith("  ended")


def test_a_job_that_was_killed_and_one_that_forgot_to_close(tmp_path, capsys):
    code = """
import os, signal, torch, halfstep as hs
model = torch.nn.Linear(2, 2)
watch = lambda path: hs.monitor(model, hs.optim.SGD(model.parameters(), lr=.1), hs.GradScaler(), live=path)
child = os.fork()
if not child:
    mon = watch("killed")
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(child, 0)
mon = watch("forgot")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}, check=True)
    assert cli.main(["watch", str(tmp_path / "killed")]) == 1
    assert "is gone and did not close its monitor; the last it said was step 0" in capsys.readouterr().err
    assert cli.main(["watch", str(tmp_path / "forgot")]) == 0 and capsys.readouterr().out.endswith("  ended\n")


@pytest.mark.parametrize("text, said", [
    (None, "No such file"), ("{", "is not JSON"), ("[]", "not a halfstep monitor's file"), ('{"format": "halfstep-report", "version": 1}', "'format' is 'halfstep-report'"),
    ('{"format": "halfstep-monitor", "version": 9}', "version 9; this halfstep reads version 1"), ('{"format": "halfstep-monitor", "version": 1}', "has no 'status'"),
    ('{"format": "halfstep-monitor", "version": 1, "status": {"state": "asleep", "step": 1}}', "status.state is 'asleep'"),
    ('{"format": "halfstep-monitor", "version": 1, "status": {"state": "ended"}}', "has no 'step'"),
    ('{"format": "halfstep-monitor", "version": 1, "status": {"state": "ended", "step": 1, "scale": "big"}}', "status.scale"),
    ('{"format": "halfstep-monitor", "version": 1, "status": {"state": "ended", "step": 1, "headroom": {"name": "a", "bits": NaN}}}', "bits"),
    ('{"format": "halfstep-monitor", "version": 1, "status": {"state": "ended", "step": 1}, "shares": {"tensors": [], "samples": [3]}}', "samples[0]"),
    ('{"format": "halfstep-monitor", "version": 1, "status": {"state": "ended", "step": 1}, "layers": [{"name": "a"}]}', "layers[0] has no 'kind'"),
])
def test_watch_refuses_a_bad_file_in_one_line(tmp_path, capsys, text, said):
    path = tmp_path / "file"
    if text is not None:
        path.write_text(text)
    assert cli.main(["watch", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and said in err and str(path) in err and err.startswith("halfstep watch: ") and err.count("\n") == 1


def test_watch_refuses_wrong_arguments(tmp_path, capsys):
    for arguments in (["watch"], ["watch", "a", "b"], ["watch", "a", "--every", "soon"]):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 1
    assert cli.main(["watch", "a", "--every", "0"]) == 1 and "--every is 0" in capsys.readouterr().err


def test_the_line_in_words():
    status = {"state": "running", "step": 12345, "scale": 3.0, "skipped": 617, "consecutive_skips": 20, "grad_norm": "nan", "loss": 1.5, "headroom": {"name": "a.b", "bits": 3.25},
              "underflow": {"name": "c", "share": 0.0125}, "steps_per_second": 12.345, "diagnosis": "gradients overflow", "first_bad_param": "d\n", "time": 100.0}
    assert _watch.said(status, 107.0) == ("step 12,345  scale 2^1.58  skipped 617 (5 %, 20 in a row)  loss 1.5  norm nan  headroom 3.2 bits a.b  underflow 1.25 % c  12.3 steps/s  "
                                          "no step is taken: gradients overflow, 'd ' first")
    assert _watch.said(status, 161.0).endswith("(no news for 61 s)") and schema.line({"state": "ended", "step": 0}) == "step 0  ended"


def test_tensorboard_has_the_tags_of_the_others(tmp_path):
    model, optimizer, scaler = net_of(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 1), init_scale=2.0**8, growth_interval=50)
    with hs.monitor(model, optimizer, scaler, every=4, tensorboard=tmp_path, aliases=["megatron", "deepspeed", "fairseq"]) as mon:
        for step in range(8):
            one_step(model, optimizer, scaler, blow=step == 5)
    found = {}
    for tag, step, value in scalars(next(tmp_path.iterdir())):
        found.setdefault(tag, {})[step] = value
    assert found["amp/loss_scale"] == {1: 256.0, 4: 256.0, 6: 256.0, 7: 128.0, 8: 128.0} == found["loss-scale"] == found["Train/Samples/loss_scale"] == found["loss_scale"]
    assert found["amp/loss_scale_log2"] == {1: 8, 4: 8, 6: 8, 7: 7, 8: 7} and found["amp/found_inf"] == {1: 0, 4: 0, 6: 1, 7: 0, 8: 0} and found["amp/skipped_total"][8] == 1
    assert found["amp/consecutive_skips"] == {1: 0, 4: 0, 6: 1, 7: 0, 8: 0} and set(found["num-zeros"]) == {1, 4, 6, 7, 8} and math.isnan(found["amp/grad_norm_unscaled"][6])
    assert set(found["amp/headroom_bits/0.weight"]) == {4, 8} and set(found["amp/underflow_share/0.weight/weight_gradient"]) == {4} and set(found["amp/underflow_share/2/activation"]) == {8}
    assert found["train/loss"][8] == pytest.approx(mon.report()["losses"][-1][1], rel=1e-6) and mon.report()["losses"][-1][0] == 8


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, optimizer, scaler = net_of(nn.Linear(6, 3))
    with hs.monitor(model, optimizer, scaler, every=2, tensorboard=tmp_path):
        for _ in range(4):
            one_step(model, optimizer, scaler)
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    assert [e.step for e in reader.Scalars("amp/loss_scale")] == [1, 2, 4]


@pytest.fixture(scope="module")
def peer(cpp_program, tmp_path_factory):
    """The folder with what tests/cpp/monitor_peer writes."""
    folder = tmp_path_factory.mktemp("peer")
    subprocess.run([cpp_program("monitor_peer"), folder], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder


def test_a_run_of_cpp_is_watched_with_the_same_files(peer, capsys):
    tmp_path = peer
    report = schema.read(tmp_path / "monitor.json")
    assert report["scale"]["skipped"] == [5] and report["scale"]["points"] == [[1, 256.0], [6, 128.0]] and report["scale"]["steps"] == 8 and report["unsampled"] == {}
    assert {row["kind"] for row in report["layers"]} == {"weight", "weight gradient", "activation", "activation gradient"} and [s["step"] for s in report["shares"]["samples"]] == [2, 4, 6, 8]
    assert {t["name"] for t in report["gradients"]["tensors"]} == {"a \"quoted\" name.weight", "a \"quoted\" name.bias", "2.weight", "2.bias"}
    assert report["status"]["underflow"]["name"] in ("2.weight", "2.bias", "a \"quoted\" name.weight", "a \"quoted\" name.bias") and schema.read(tmp_path / "live.json")["status"]["state"] == "ended"
    assert cli.main(["watch", str(tmp_path / "live.json")]) == 0
    assert capsys.readouterr().out.startswith("step 8  scale 2^7  skipped 1 (12.5 %)  norm ")
    events = next(p for p in tmp_path.iterdir() if p.name.startswith("events."))
    found = {}
    for tag, step, value in scalars(events):
        found.setdefault(tag, {})[step] = value
    assert found["amp/loss_scale"] == {1: 256.0, 2: 256.0, 4: 256.0, 5: 256.0, 6: 128.0, 8: 128.0} == found["loss-scale"] and found["amp/found_inf"][5] == 1 and found["amp/loss_scale_log2"][8] == 7
    assert set(found) >= {"amp/skipped_total", "amp/consecutive_skips", "amp/grad_norm_unscaled", "amp/headroom_bits/2.weight", "amp/underflow_share/2.weight/weight", "amp/underflow_share/2.weight/weight_gradient", "amp/underflow_share/2/activation", "num-zeros"}


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(12, 12))

    def forward(self, x):
        return torch.matmul(x, self.weight.t())


class Net(nn.Module):
    """That of tests/cpp/monitor_peer.cpp."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.norm = nn.LayerNorm(12)
        self.lstm = nn.LSTM(12, 12, batch_first=True)
        self.twice = nn.Linear(12, 12)
        self.mix = Mix()
        self.batch = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        x = self.lstm(x.to(self.lstm.weight_hh_l0.dtype))[0].select(1, 3)
        for _ in range(2):
            x = torch.relu(self.twice(x))
        return self.head(torch.relu(self.batch(self.mix(x))))


def spread(shape, seed):
    n = torch.arange(math.prod(shape)) * 7919 + seed * 104729
    return ((n % 2001 - 1000).double() / 1500 * torch.exp2(-(n % 24).double())).float().view(shape)


@pytest.mark.parametrize("kind", ["cast", "autocast"])
def test_cpp_counts_what_python_counts(peer, kind):
    net = Net()
    with torch.no_grad():
        for seed, param in enumerate(net.parameters(), 1):
            param.copy_(spread(param.shape, seed))
    if kind == "cast":
        hs.cast_model(net)
    optimizer, scaler = hs.optim.SGD(net.named_parameters(), lr=1e-3), hs.GradScaler(init_scale=2.0**-8)
    with hs.monitor(net, optimizer, scaler, every=1) as mon:
        for step in range(7):
            optimizer.zero_grad()
            for micro in range(2):
                with hs.autocast("cpu"):
                    loss = nn.functional.cross_entropy(net(((torch.arange(24) * 7 + micro + step) % 20).view(6, 4)).float(), (torch.arange(6) + micro) % 5)
                scaler.scale(loss).backward()
            scaler.step(optimizer), scaler.update()
    ours, theirs = mon.report(), schema.read(peer / f"{kind}.json")
    assert theirs["unsampled"] == ours["unsampled"] == {}

    def samples(report):
        keys = [(t["name"], t["kind"]) for t in report["shares"]["tensors"]]
        return [(s["step"], s["scale"], {keys[row[0]]: unpacked(row) for row in s["rows"]}) for s in report["shares"]["samples"]]

    kinds = set()
    for (step, scale, mine), (their_step, their_scale, found) in zip(samples(ours), samples(theirs), strict=True):
        assert (step, scale, set(mine)) == (their_step, their_scale, set(found))
        kinds |= {kind for _, kind in mine}
        for key, shares in mine.items():
            assert vars(shares) == {**vars(found[key]), "amax": pytest.approx(found[key].amax, rel=1e-5)}, (step, key)
    assert kinds == {"weight", "weight gradient", "activation", "activation gradient"}
    total = sum((row for _, _, rows in samples(theirs) for row in rows.values()), start=unpacked([0] * 9))
    assert total.underflow > 20 and total.subnormal > 100 and total.lost > 20


@pytest.mark.parametrize("master", ["split16", "fp32"])
def test_a_weight_that_was_edited_is_looked_at_as_it_is(master):
    from halfstep._shadow import exact_weight
    layer = nn.Linear(6, 3)
    hs.cast_model(layer, cast_inputs=True)
    optimizer = hs.optim.SGD(layer.parameters(), lr=0.1, master=master)
    assert torch.equal(exact_weight([optimizer], layer.weight), optimizer.master_params()[0])
    with torch.no_grad():
        layer.weight.fill_(0.5)
    assert torch.equal(exact_weight([optimizer], layer.weight), torch.full((3, 6), 0.5))


def hooks(model):
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in HOOKS) + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def test_close_takes_every_hook_away_whenever_it_comes():
    model, optimizer, scaler = net_of(nn.Linear(6, 3), nn.Linear(3, 2))
    before = hooks(model)
    mon = hs.monitor(model, optimizer, scaler, every=1)
    assert hooks(model) > before and mon in scaler._history.watchers
    loss = model(torch.randn(8, 6)).square().mean()
    mon.close(), mon.close()  # between the forward and the backward, and twice
    scaler.scale(loss).backward()
    scaler.step(optimizer), scaler.update()
    assert hooks(model) == before and not scaler._history.watchers and mon.report()["shares"] is None and mon.report()["status"]["step"] == 1
    plain = hs.monitor(model, optimizer, every=1)
    plain.close()
    assert not optimizer._optimizer_step_post_hooks and hooks(model) == before
    with pytest.raises(KeyboardInterrupt), hs.monitor(model, optimizer, scaler, every=1):
        raise KeyboardInterrupt
    assert hooks(model) == before and not scaler._history.watchers


def test_a_model_can_be_copied_and_saved_while_it_is_watched():
    model, optimizer, scaler = net_of(nn.Linear(6, 3))
    with hs.monitor(model, optimizer, scaler, every=1) as mon:
        twin, read = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        buffer = io.BytesIO()
        torch.save(model, buffer), pickle.dumps(scaler)
        for other in (twin, read):
            other(torch.randn(2, 6)).sum().backward()
        one_step(model, optimizer, scaler)
    rows = {(r["name"], r["kind"]): r["nonzero"] for r in mon.report()["layers"]}
    assert rows["0", "activation"] == 8 * 3  # the copies are not counted


class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        if self.weight.dtype == torch.float32:
            raise RuntimeError("only in sixteen bits\nand no more")
        return x.to(self.weight.dtype) * self.weight


def test_a_layer_that_cannot_run_in_fp32_is_named_and_left_out():
    model, scaler = nn.Sequential(Wrong(), nn.Linear(6, 2)), hs.GradScaler()
    hs.cast_model(model, cast_inputs=True)
    optimizer = hs.optim.SGD(model.named_parameters(), lr=0.1)
    with hs.monitor(model, optimizer, scaler, every=1) as mon:
        for _ in range(4):
            one_step(model, optimizer, scaler)
    report = mon.report()
    assert report["unsampled"] == {"0": "RuntimeError: only in sixteen bits"} and len(report["shares"]["samples"]) == 3 and model[0].weight.dtype == torch.float16


def test_backward_twice_through_one_forward_is_the_sum():
    model, optimizer, scaler = net_of(nn.Linear(6, 3), init_scale=4.0)
    x = torch.randn(1, 6)
    with hs.monitor(model, optimizer, scaler, every=1) as mon:
        loss = scaler.scale(model(x).sum())
        loss.backward(retain_graph=True), loss.backward()
        scaler.step(optimizer), scaler.update()
    row = {(r["name"], r["kind"]): r for r in mon.report()["layers"]}["0.weight", "weight gradient"]
    assert row["headroom"] == pytest.approx(math.log2(65504 / (2 * 4.0 * float(x.abs().max()))), rel=1e-6)


def test_compiled_models_train_and_what_is_hidden_is_said():
    model, optimizer, scaler = net_of(nn.Linear(6, 3))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with hs.monitor(model, optimizer, scaler, every=1) as mon:
        for _ in range(3):
            one_step(compiled, optimizer, scaler)
    report = mon.report()
    assert report["status"]["step"] == 3 and report["unsampled"] == {"0": "not called in a sampled step"} and report["gradients"]["step"] == 3


def test_steps_that_nothing_notices_are_told_by_hand():
    model, optimizer, scaler = net_of(nn.Linear(6, 3), init_scale=2.0**8)
    one_step(model, optimizer, scaler)

    @torch.compile(backend="eager", fullgraph=True)
    def step():
        scaler.step(optimizer)
        scaler.update()

    with hs.monitor(model, optimizer, scaler, every=2) as mon:
        for _ in range(4):
            scaler.scale(model(torch.randn(8, 6)).square().mean()).backward()
            step()
            mon.step()
            optimizer.zero_grad()
    report = mon.report()
    assert report["status"]["step"] == 5 == report["scale"]["steps"] and [s["step"] for s in report["shares"]["samples"]] == [3, 5]


def test_a_disk_that_is_full_ends_the_output_and_not_the_training(tmp_path, monkeypatch):
    model, optimizer, scaler = net_of(nn.Linear(6, 3))
    folder = tmp_path / "there"
    folder.mkdir()
    with hs.monitor(model, optimizer, scaler, every=1, live=folder / "live", tensorboard=tmp_path / "events") as mon:
        monkeypatch.setattr(mon._writer, "scalar", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        (folder / "live").unlink(), folder.rmdir()
        mon._last_live -= 10
        with pytest.warns(UserWarning) as told:
            one_step(model, optimizer, scaler)
            one_step(model, optimizer, scaler)
    assert sorted(str(w.message).split(" cannot")[0] for w in told) == ["monitor: live", "monitor: tensorboard"] and mon.report()["status"]["step"] == 2


@pytest.mark.parametrize("change, kind, said", [
    (dict(model=3), TypeError, "model is int"), (dict(optimizers="adam"), TypeError, "optimizers has str"), (dict(scaler=torch.amp.GradScaler("cpu")), TypeError, "expected a halfstep.GradScaler"),
    (dict(every=0), ValueError, "every is 0"), (dict(every=2.5), ValueError, "every is 2.5"), (dict(every=True), ValueError, "every is True"),
    (dict(layers=["fc9"]), ValueError, "layers has 'fc9', which fits no module (modules: '0', '1')"), (dict(aliases="wandb"), ValueError, "aliases has 'wandb'; expected of megatron, deepspeed, fairseq"),
    (dict(optimizers=[], scaler=None), ValueError, "no step can be noticed"), (dict(scaler=hs.GradScaler(losses=2)), ValueError, "losses=2"), (dict(live="/nowhere/at/all"), OSError, "/nowhere/at/all"),
])
def test_wrong_arguments_are_named_before_anything_is_hooked(change, kind, said):
    model, optimizer, scaler = net_of(nn.Linear(6, 3), nn.Linear(3, 2))
    before = hooks(model)
    with pytest.raises(kind) as error:
        hs.monitor(**{**dict(model=model, optimizers=optimizer, scaler=scaler, every=1), **change})
    assert said in str(error.value) and hooks(model) == before and not scaler._history.watchers


def test_which_layers_is_chosen_by_name_or_glob():
    model = Mixed("plain")
    optimizer = hs.optim.SGD(model.parameters(), lr=0.1)
    names = lambda **kw: [name for name, _ in hs.monitor(model, optimizer, **kw)._layers]
    assert names() == ["embed", "twice", "norm", "batch", "attention", "lstm", "unused", "head"]
    assert names(layers="head") == ["head"] and names(layers=["n*", "lstm"]) == ["norm", "lstm"] and names(layers=[]) == []
    assert [name for name, _ in hs.monitor(nn.Linear(2, 2), optimizer)._layers] == ["(model)"]


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "monitor.md").read_text()
    code = text.split("```python\n", 1)[1].split("```", 1)[0]
    monkeypatch.chdir(tmp_path)
    model, optimizer, scaler = net_of(nn.Linear(6, 3))
    batches = [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(60)]
    scope = {"hs": hs, "torch": torch, "model": model, "optimizer": optimizer, "scaler": scaler, "batches": batches, "criterion": nn.CrossEntropyLoss()}
    exec(code, scope)
    assert schema.read("monitor.json")["status"]["step"] == 60 and schema.read("live.json")["status"]["state"] == "ended" and json.loads(Path("monitor.json").read_text())["every"] == 50
    assert numpy.isfinite(scaler.get_scale())
