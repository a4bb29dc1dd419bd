"""cast_model, evaluate_in, export_state_dict, load_state_dict."""

import pytest
import torch
from torch import nn

import halfstep as hs

pytestmark = pytest.mark.smoke


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("master", ["auto", "fp32", "fp64"])
def test_casting_keeps_the_low_bits(dtype, master):
    model, before = net(), net()
    report = hs.cast_model(model, dtype)
    assert report.cast == ["0.weight", "0.bias", "3.weight", "3.bias"] and report.kept == ["1.weight", "1.bias"]
    assert model[0].weight.dtype == dtype and model[1].weight.dtype == torch.float32
    opt = hs.optim.AdamW(model.named_parameters(), master=master)
    for exact, own in zip(before.parameters(), opt.master_params()):
        tiny = exact.abs() < 2.0**-16
        assert torch.equal(exact[~tiny], own.float()[~tiny]) and (exact - own).abs().max() <= 2.0**-40
    assert not hasattr(model[0].weight, "_halfstep_exact")


def test_runs_with_and_without_autocast():
    x = torch.randn(2, 8)
    model = net()
    hs.cast_model(model)
    with pytest.raises(RuntimeError, match=r"model was cast to float16: run it inside hs.autocast, or cast_model\(…, cast_inputs=True\)"):
        model(x)
    with hs.autocast("cpu"):
        inside = model(x)
    assert inside.dtype == torch.float16 and model(x.half()).dtype == torch.float16
    other = net()
    hs.cast_model(other, cast_inputs=True)
    assert torch.allclose(other(x), inside, atol=1e-2)
    other(x).float().sum().backward()
    assert other[0].weight.grad.dtype == torch.float16 and other[1].weight.grad.dtype == torch.float32


def test_buffers_ties_and_frozen_parameters():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16))
    model[4].weight = model[3].weight
    model[3].bias.requires_grad_(False)
    hs.cast_model(model, cast_inputs=True)
    assert model[1].running_mean.dtype == torch.float32 and model[1].num_batches_tracked.dtype == torch.int64
    assert model[4].weight is model[3].weight and model[3].bias.dtype == torch.float16
    model(torch.randn(2, 1, 4, 4)).float().sum().backward()
    opt = hs.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    opt.step()


def test_refusals_change_nothing():
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0] = 65520.0
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'3.weight' does not fit torch.float16: 1 of 64 elements .* \(largest 65520\)"):
        hs.cast_model(model)
    assert all(v.dtype == torch.float32 and torch.equal(v, before[k]) for k, v in model.state_dict().items())
    hs.cast_model(model, keep_fp32=["3"])
    assert model[3].weight.dtype == torch.float32 and model[1].weight.dtype == torch.float16
    late = net()
    opt = hs.optim.AdamW(late.parameters())
    with pytest.raises(RuntimeError, match="'0.weight' already belongs to an optimizer"):
        hs.cast_model(late)
    assert opt is not None
    with pytest.raises(ValueError, match="dtype is torch.float32"):
        hs.cast_model(net(), torch.float32)


def trained():
    model = net()
    hs.cast_model(model)
    opt, scaler = hs.optim.AdamW(model.named_parameters(), lr=0.01), hs.GradScaler("cpu")
    for _ in range(5):
        opt.zero_grad()
        with hs.autocast("cpu"):
            loss = model(torch.randn(4, 8)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(opt), scaler.update()
    return model, opt


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_evaluate_in(dtype):
    model, opt = trained()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    exact, x = opt.master_params(), torch.randn(3, 8)
    with hs.evaluate_in(model, opt, dtype):
        assert model(x).dtype == dtype and not model.training
        for p, m in zip(model.parameters(), exact):
            assert torch.equal(p, m.to(dtype))
    assert model.training and all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    with hs.autocast("cpu"):
        assert model(x).dtype == torch.float16
    with pytest.raises(KeyError):
        with hs.evaluate_in(model, opt, dtype):
            raise KeyError("inside")
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    before = opt.master_params()
    assert all(torch.equal(a, b) for a, b in zip(before, exact))


def test_export_and_load():
    model, opt = trained()
    state = hs.export_state_dict(model, opt)
    assert all(v.dtype == torch.float32 for v in state.values())
    plain = net()
    plain.load_state_dict(state)
    other = net()
    hs.cast_model(other)
    second = hs.optim.AdamW(other.named_parameters())
    hs.load_state_dict(other, second, state)
    assert all(torch.equal(a, b) for a, b in zip(second.master_params(), opt.master_params()))
    assert torch.equal(other[0].weight, model[0].weight)
    bad = dict(state)
    bad["0.weight"] = torch.full((16, 8), 1e6)
    before = second.master_params()
    for broken, message in [(bad, "'0.weight' does not fit"), ({k: v for k, v in state.items() if k != "3.bias"}, "missing \\['3.bias'\\]")]:
        with pytest.raises(ValueError, match=message):
            hs.load_state_dict(other, second, broken)
    assert all(torch.equal(a, b) for a, b in zip(second.master_params(), before))
