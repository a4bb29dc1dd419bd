"""What FP16 loses: counts against another way to count, and the FP32 run beside a training step."""

import copy
import math

import numpy
import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep._ledger import ledger
from halfstep._shares import Shares, against_fp32, packed_samples, rng_state, shares, unpacked


def counted(x, scale):
    """By numpy's own conversion, which rounds once from FP64."""
    exact = numpy.abs(x.double().numpy() * scale)
    with numpy.errstate(over="ignore"):
        half = exact.astype(numpy.float16)
    there = (exact > 0) & numpy.isfinite(exact)
    return {"count": exact.size, "nonzero": int(there.sum()), "underflow": int((there & (half == 0)).sum()), "subnormal": int((there & (half > 0) & (half < numpy.float16(2.0**-14))).sum()),
            "overflow": int((~numpy.isfinite(half)).sum()), "saturated": int((~(exact <= 32752)).sum())}


@pytest.mark.parametrize("scale", [1.0, 2.0**16, 2.0**-3, float(numpy.float32(3.7)), float(numpy.float32(0.0123))])
def test_shares_are_those_of_a_count_in_fp64(scale):
    g = torch.Generator().manual_seed(3)
    spread = torch.randn(40_000, generator=g) * torch.exp2(torch.randint(-45, 20, (40_000,), generator=g).float())
    edges = torch.tensor([2.0**-25, 2.0**-24, 2.0**-14, 2.0**-14 - 2.0**-25, 65504.0, 65520.0, 32752.0, 0.0, -0.0]) / scale
    near = torch.cat([edges, torch.nextafter(edges, torch.tensor(math.inf)), torch.nextafter(edges, torch.tensor(0.0)), -edges])
    x = torch.cat([spread, near, torch.tensor([math.inf, -math.inf, math.nan])])
    found = shares(x, scale)
    for key, value in counted(x, scale).items():
        assert getattr(found, key) == value, key
    finite = x[x.isfinite()].double().abs().max() * scale
    assert found.amax == float(finite) and found.headroom == math.log2(65504 / found.amax)


def test_negative_zero_and_structural_zeros_are_not_lost():
    x = torch.tensor([0.0, -0.0, 1.0, 2.0**-30, -(2.0**-30)])
    found = shares(x, 1.0, stored=torch.tensor([0.0, -0.0, 1.0, 0.0, -0.0], dtype=torch.float16))
    assert (found.nonzero, found.underflow, found.lost) == (3, 2, 2)
    assert shares(torch.zeros(5)).headroom is None and shares(torch.empty(0)) == Shares()


def test_relu_zeros_are_structural_in_the_run_too():
    torch.manual_seed(4)
    model, found = run(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)), torch.randn(4, 8), scale=2.0**10)
    zeros = int((dict(model.named_parameters())["0.weight"].grad == 0).sum())
    weight, output = found["0.weight", "weight gradient"], found["1", "activation"]
    assert weight.count - weight.nonzero == zeros > 0 and weight.lost == 0  # units that no example switches on: zero in both
    assert 0.3 < output.nonzero / output.count < 0.7 and output.underflow == 0


def run(model, x, scale, device="cpu", cast=True, loss=None):
    loss = loss or (lambda model, batch: model(batch).float().pow(2).mean())
    if cast:
        hs.cast_model(model)
    optimizer = hs.optim.SGD(model.named_parameters(), lr=0.1)
    model.train()
    rng = rng_state()
    with hs.autocast(device):
        value = loss(model, x)
    (value * scale).backward()
    return model, against_fp32(model, [optimizer], loss, x, scale, rng)


def test_an_fp32_run_of_the_same_batch_on_the_exact_weights():
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(32, 4))
    wide, x = copy.deepcopy(plain), torch.randn(20, 12)
    torch.manual_seed(5)
    model, found = run(plain, x, 2.0**8)
    torch.manual_seed(5)
    wide(x).pow(2).mean().backward()
    for name, param in wide.named_parameters():
        assert found[name, "weight gradient"].amax == pytest.approx(float(param.grad.abs().max()) * 2**8, rel=1e-6), name
        assert found[name, "weight"].amax == float(param.detach().abs().max()), name  # the exact weights, not the rounded ones
    assert {kind for _, kind in found} == {"weight", "activation", "activation gradient", "weight gradient"}
    assert found["2", "activation"].nonzero < found["2", "activation"].count == 20 * 32


def test_training_goes_on_as_if_nobody_had_looked():
    def train(look):
        torch.manual_seed(2)
        tied = nn.Linear(16, 16)
        model = nn.Sequential(tied, nn.BatchNorm1d(16), nn.Dropout(0.2), tied, nn.LayerNorm(16))
        hs.cast_model(model)
        optimizer, scaler = hs.optim.AdamW(model.named_parameters(), lr=1e-2), hs.GradScaler()
        for _ in range(4):
            x, rng = torch.randn(8, 16), rng_state()
            loss = lambda model, batch: model(batch).float().pow(2).mean()
            with hs.autocast("cpu"):
                value = loss(model, x)
            scaler.scale(value).backward()
            if look:
                against_fp32(model, [optimizer], loss, x, scaler.get_scale(), rng)
            scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
        return [*optimizer.master_params(), *model.buffers()]
    for a, b in zip(train(True), train(False)):
        assert torch.equal(a, b)


def test_what_vanishes_on_the_way_is_lost():
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.Sigmoid())]
    loss = lambda model, batch: 1e-3 * model(batch).float().pow(2).mean()
    model, found = run(nn.Sequential(*layers), torch.randn(16, 16), 1.0, loss=loss)
    first, last = found["0.weight", "weight gradient"], found["10.weight", "weight gradient"]
    grad = dict(model.named_parameters())["0.weight"].grad
    assert first.lost == int((grad == 0).sum()) > 0.9 * first.nonzero and last.lost < 0.5 * last.nonzero
    scaled, found = run(nn.Sequential(*[copy.deepcopy(m).float() for m in layers]), torch.randn(16, 16), 2.0**16, cast=False, loss=loss)
    assert found["0.weight", "weight gradient"].lost < 0.01 * first.nonzero


def test_packed_samples_come_back():
    rows = {("a", "weight"): shares(torch.randn(10)), ("b", "weight gradient"): shares(torch.randn(5) * 1e-9, 4.0)}
    packed = packed_samples([(50, 4.0, rows)], 50)
    assert [unpacked(entry) for entry in packed["samples"][0]["rows"]] == list(rows.values())
    total = shares(torch.tensor([1.0, 2.0])) + shares(torch.tensor([3.0, 0.0]))
    assert (total.count, total.nonzero, total.amax) == (4, 3, 3.0)


@pytest.mark.parametrize("make, expected", [
    (lambda ps: torch.optim.AdamW(ps), {"weights": 4, "gradients": 4, "masters": 0, "states": 8}),
    (lambda ps: hs.optim.AdamW(ps), {"weights": 2, "gradients": 2, "masters": 2, "states": 8}),
    (lambda ps: hs.optim.AdamW(ps, master="fp32", states="bf16"), {"weights": 2, "gradients": 2, "masters": 4, "states": 4}),
    (lambda ps: hs.optim.Masters(torch.optim.RMSprop, ps), {"weights": 2, "gradients": 2, "masters": 4, "states": 4}),
])
def test_ledger_counts_each_storage_once_by_role(make, expected):
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64, affine=False))
    if expected["weights"] == 2:
        hs.cast_model(model, cast_inputs=True)
    optimizer = make(list(model.parameters()))
    model(torch.randn(8, 64)).float().sum().backward()
    optimizer.step()
    held = ledger(model, [optimizer])
    for role, each in expected.items():
        assert each * 4096 <= held[role] <= each * 4096 + 64, role  # 64: step counters
    assert held["buffers"] == 64 * 4 * 2 + 8
