"""docs/autocast.md: hs.autocast is torch's own with FP16 as default, and a step empties the cast cache."""

import pytest
import torch

import halfstep as hs

pytestmark = pytest.mark.smoke


def test_it_is_torchs_autocast_with_fp16_by_default():
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    assert type(hs.autocast("cpu")) is torch.autocast
    with hs.autocast("cpu"):
        assert layer(x).dtype == torch.float16
        with hs.autocast("cpu", enabled=False):
            assert layer(x).dtype == torch.float32
        with hs.autocast("cpu", torch.bfloat16):
            assert torch.nn.Linear(4, 4)(x).dtype == torch.bfloat16
        assert layer(x).dtype == torch.float16
    assert layer(x).dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    assert hs.autocast("cpu")(lambda: layer(x))().dtype == torch.float16


def test_it_is_traced_by_compile():
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)

    def run(x):
        with hs.autocast("cpu"):
            return layer(x)

    out = torch.compile(run, fullgraph=True, backend="eager")(x)
    assert out.dtype == torch.float16 and torch.equal(out, run(x))


MAKERS = {"ours": lambda p: hs.optim.AdamW(p, lr=0.02), "masters": lambda p: hs.optim.Masters(torch.optim.AdamW, p, lr=0.02),
          "stock": lambda p: torch.optim.AdamW(p, lr=0.02), "fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True)}


def losses(make, scaled, cast=False):
    """30 steps inside one guard."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    x = torch.randn(64, 16)
    y = (x[:, 0] > 0).long()
    if cast:
        hs.cast_model(net)
    opt, scaler, out = make(net.parameters()), hs.GradScaler("cpu", enabled=scaled), []
    with hs.autocast("cpu"):
        for _ in range(30):
            opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(x).float(), y)
            scaler.scale(loss).backward()
            scaler.step(opt), scaler.update()
            out.append(loss.item())
    return out


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("kind,scaled", [("ours", True), ("ours", False), ("masters", True), ("masters", False), ("stock", True), ("fused", True)])
def test_one_guard_around_the_whole_loop_trains(kind, scaled, cast):
    if cast and kind in ("stock", "fused"):
        pytest.skip("a stock optimizer has no masters for FP16 weights")
    out = losses(MAKERS[kind], scaled, cast)
    assert out[-1] < 0.5 * out[0]


def test_without_a_step_of_ours_it_does_not():
    """What the rule is for: torch's own loop keeps the first copies of the weights."""
    out = losses(MAKERS["stock"], scaled=False)
    assert out[-1] > 0.99 * out[0]
