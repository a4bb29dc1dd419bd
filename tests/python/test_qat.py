"""Arms with qat=: what a layer computes with, against torch's own fake quantization; what stays as it is; that it trains."""

import copy

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep import _qat

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_grid_is_that_of_torch(bits, dtype):
    w = torch.randn(6, 5, 3).to(dtype)
    w[1], w[2, 0, 0] = 0, 1e-7
    top = 2 ** (bits - 1) - 1
    scale = (w.float().abs().flatten(1).amax(1) / top).clamp_min(2.0**-126)
    theirs = torch.fake_quantize_per_channel_affine(w.float(), scale, torch.zeros(6, dtype=torch.int32), 0, -top, top).double()
    ours = _qat.fake_quantize(w, bits)
    assert ours.dtype == dtype and ours.shape == w.shape and (ours[1] == 0).all()
    codes = w.double() / scale.double()[:, None, None]
    tie = ((codes - codes.floor()) - 0.5).abs() < 1e-4  # FP32 and FP64 may round them to either side
    same = (ours.double() - theirs).abs() <= max(torch.finfo(dtype).eps, 1e-6) * theirs.abs() + 2.0**-25 * (dtype == torch.float16)
    assert (same | tie).all() and tie.sum() < 5
    largest = w.double().abs().flatten(1).amax(1)  # which is a code: nothing is clipped
    assert ((ours.double().abs().flatten(1).amax(1) - largest).abs() <= max(torch.finfo(dtype).eps, 1e-6) * largest).all()


def test_groups_follow_memory_and_the_last_may_be_short():
    w = torch.randn(3, 70)
    parts = [torch.cat([_qat.fake_quantize(row[i:i + 32][None], 4)[0] for i in (0, 32, 64)]) for row in w]
    assert torch.equal(_qat.fake_quantize(w, 4, 32), torch.stack(parts))
    conv = torch.randn(4, 3, 5, 5)
    assert torch.equal(_qat.fake_quantize(conv, 4, 32), _qat.fake_quantize(conv.flatten(1), 4, 32).reshape(conv.shape))
    assert _qat.fake_quantize(torch.empty(0, 4), 8).shape == (0, 4)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_not_made_finite(bad):
    w = torch.randn(3, 8).half()
    w[1, 2] = bad
    ours = _qat.fake_quantize(w, 8)
    assert ours[1].isnan().all() and ours[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", list(_qat.KINDS))
@pytest.mark.parametrize("layer, x", [(nn.Linear(40, 6), torch.randn(5, 7, 40)), (nn.Conv2d(3, 4, 3, groups=1), torch.randn(2, 3, 6, 6)), (hs.nn.Linear(40, 6, activation="relu"), torch.randn(5, 40))])
def test_a_layer_computes_with_the_rounded_weight_and_its_gradient_passes(layer, x, kind):
    model = nn.Sequential(copy.deepcopy(layer))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert _qat.quantize_(model, kind) == ["0"]
    twin, x = copy.deepcopy(layer), x.clone().requires_grad_()
    bits, inputs = _qat.KINDS[kind]
    with torch.no_grad():
        twin.weight.copy_(_qat.fake_quantize(twin.weight, bits, None if bits == 8 else 32))
        given = x.detach()
        if inputs:
            given = torch.stack([_qat.fake_quantize(v.reshape(1, -1), 8)[0].reshape(v.shape) for v in given.reshape(-1, 40)]).reshape(x.shape) if x.shape[-1] == 40 else _qat.fake_quantize(given, 8)
    given.requires_grad_()
    y, z = model(x), twin(given)
    assert torch.equal(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close((model[0].weight.grad, x.grad), (twin.weight.grad, given.grad), rtol=1e-5, atol=1e-5)  # straight through
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and list(before) == list(model.state_dict())
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(copy.deepcopy(model)(x), y)


def test_a_forward_that_fails_leaves_the_parameter():
    model = nn.Sequential(nn.Linear(4, 4))
    weight = model[0].weight
    _qat.quantize_(model, "w8")
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 3))
    assert model[0].weight is weight
    with pytest.raises(ValueError, match="qat=w4: the model has no Linear and no convolution"):
        _qat.quantize_(nn.ReLU(), "w4")


@pytest.mark.parametrize("text", ["fp32:qat=w8", "mixed:qat=w8a8", "autocast:qat=w4", "bf16:qat=w8", "mixed:qat=w8,islands=2"])
def test_arms_train_and_are_evaluated_as_quantized(text):
    torch.manual_seed(0)
    arm = hs.Arm.parse(text)
    x = torch.randn(256, 16)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = arm.apply(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2)))
    opt, scaler, losses = arm.optimizer("AdamW", model.named_parameters(), lr=1e-2), arm.scaler(), []
    for _ in range(60):
        opt.zero_grad()
        with arm.autocast():
            loss = nn.functional.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert arm.options()["qat"] == text.partition("qat=")[2].partition(",")[0]
    ours = [opt] if isinstance(opt, hs.optim.AdamW) else []
    with torch.no_grad(), hs.evaluate_in(model, ours, torch.float32):
        wide = model(x)
        first = model[0]
        weight = _qat.fake_quantize(first.weight, 4 if "w4" in text else 8, 32 if "w4" in text else None)
        given = _qat.fake_quantize(x, 8) if "a8" in text else x
        hidden = torch.relu(nn.functional.linear(given, weight, first.bias))
        last = model[2]
        given = _qat.fake_quantize(hidden, 8) if "a8" in text else hidden
        assert torch.equal(wide, nn.functional.linear(given, _qat.fake_quantize(last.weight, 4 if "w4" in text else 8, 32 if "w4" in text else None), last.bias))
