"""A run that C++ recorded (tests/cpp/record_peer.cpp) is, line by line, the same run recorded by Python, and is replayed like one."""

import json
import math
import os
import subprocess

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep import cli, policies

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(shape, seed):
    n = torch.arange(math.prod(shape)) * 7919 + seed * 104729
    return ((n % 2001 - 1000).double() / 1000).float().view(shape)


class Half(policies.Policy):
    init_scale = 2.0**20

    def init(self):
        return {"clean": torch.zeros(())}

    def update(self, state, stats):
        bad = stats.found_inf != 0
        clean = torch.where(bad, 0.0, state["clean"] + 1)
        grow = clean >= 4
        state["clean"] = torch.where(grow, 0.0, clean)
        return torch.where(bad, stats.scale / 2, torch.where(grow, stats.scale * 2, stats.scale))


DYNAMIC = policies.Dynamic(init_scale=2.0**20, growth_interval=4, min_scale=2.0**-10, refill="growth", skip_limit=50)
POLICIES = {"dynamic": DYNAMIC, "unscale": DYNAMIC, "underflow": policies.Underflow(init_scale=2.0**20), "two": policies.Occupancy(init_scale=2.0**20), "custom": Half()}


def record(kind, path):
    """The run of tests/cpp/record_peer.cpp; returns its scales and skips."""
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        for seed, p in enumerate(net.parameters(), 1):
            p.copy_(numbers(p.shape, seed))
    if kind == "two":
        optimizers = [hs.optim.AdamW(net[0].named_parameters(), lr=1e-2), torch.optim.SGD(net[2].parameters(), lr=1e-2)]
    else:
        hs.cast_model(net)
        optimizers = [hs.optim.AdamW(net.named_parameters(), lr=1e-2)]
    scaler, scales, skips = hs.GradScaler(policy=POLICIES[kind]), [], []
    with hs.record(scaler, path, every=3 if kind == "two" else 1):
        for step in range(1, 41):
            for optimizer in optimizers:
                optimizer.zero_grad()
            with hs.autocast("cpu"):
                loss = net(numbers((8, 6), 100 + step)).float().square().mean()
            scaler.scale(loss * math.nan if step in (17, 18) else loss).backward()
            scales.append(scaler.get_scale())
            if kind == "unscale":
                scaler.unscale_(optimizers[0])
                scaler.clip_grad_norm_(optimizers, 1.0)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update(*([2.0**10] if kind == "two" and step % 12 == 5 else []))
            skips.append(scaler.step_was_skipped())
    return scales, skips


@pytest.mark.parametrize("kind", POLICIES)
def test_cpp_records_what_python_records(kind, cpp_program, tmp_path, capsys):
    ours, theirs = tmp_path / "python.trace", tmp_path / "cpp.trace"
    scales, skips = record(kind, ours)
    subprocess.run([cpp_program("record_peer"), kind, theirs], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in (ours, theirs)]
    for at, (mine, other) in enumerate(zip(*lines, strict=True)):
        assert list(mine) == list(other) and mine == other, f"line {at + 1}"
    assert len(lines[1]) == 2 + 4 + 40 and len(set(scales)) > 3 and sum(skips) > 2  # or it shows nothing

    if kind == "custom":
        with pytest.raises(ValueError, match="recorded a policy of yours, Half; pass it as policy"):
            hs.simulate(theirs)
    for policy in (POLICIES[kind], *([None] if kind != "custom" else [])):
        result = hs.simulate(theirs, policy)
        assert result.scale == scales and result.skipped == skips and set(result.unknown.values()) == {0}
    if kind == "dynamic":
        assert cli.main(["simulate", str(theirs), "--policy", "recorded", "--policy", "static:scale=256"]) == 0
        rows = capsys.readouterr().out.splitlines()
        assert rows[1].startswith("recorded: Dynamic(init_scale=1.04858e+06, growth_interval=4") and rows[1].split()[-1] == "0" and rows[2].startswith("static:scale=256")
