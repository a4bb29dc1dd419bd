"""hs.ada_loss_: the paper's rule restated in FP64, gradients that are those of the plain chain, and what it brings where activations' gradients vanish."""

import copy
import math
import pickle

import pytest
import scipy.stats
import torch
from torch import nn

import halfstep as hs
from halfstep.ada_loss import choose_scale, scale_bounds


def chain(widths=(8, 16, 16, 4), activation=nn.Tanh):
    torch.manual_seed(0)
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def grads(model, x, y, factor=1.0):
    for p in model.parameters():
        p.grad = None
    leaf = x.clone().requires_grad_()
    (nn.functional.mse_loss(model(leaf), y) * factor).backward()
    return [p.grad.clone() for p in model.parameters()] + [leaf.grad]


@pytest.mark.parametrize("seed", range(4))
def test_the_bounds_are_the_papers_restated_in_fp64(seed):
    random = torch.Generator().manual_seed(seed)
    g = torch.randn(32, 24, generator=random) * 10.0 ** -(seed + 3) + 1e-6
    w = torch.randn(24, 40, generator=random) * 0.1 + 0.02
    a, b = g.double(), w.double()
    sigma = math.sqrt((a.std(correction=0) ** 2 + a.mean() ** 2) * (b.std(correction=0) ** 2 + b.mean() ** 2)) * math.sqrt(0.5 * 24)
    wanted, most = scale_bounds(g, w, 24)
    # Of a normal sum with that deviation, times the scale, one in a thousand is below 2^-24.
    share = 1 - 2 * scipy.stats.norm.sf(2.0**-24 / (sigma * wanted.item()))
    assert abs(share - 1e-3) < 1e-6
    assert abs(most.item() / (65504 / (24 * a.abs().max() * b.abs().max()).item()) - 1) < 1e-6
    chosen = choose_scale(wanted, most, 16.0).item()
    assert chosen == 2.0 ** math.floor(math.log2(min(max(min(wanted.item(), most.item()), 1.0), 16.0)))


def test_statistics_that_are_zero_or_not_finite_leave_the_scale_at_one():
    w = torch.ones(4, 4)
    for g in (torch.zeros(3, 4), torch.full((3, 4), float("inf")), torch.full((3, 4), float("nan"))):
        assert choose_scale(*scale_bounds(g, w, 4), 16.0) == 1
    assert choose_scale(*scale_bounds(torch.full((3, 4), 6e4), w, 4), 16.0) == 1  # no room above


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradients_are_those_of_the_plain_chain(dtype):
    model, x, y = chain().to(dtype), torch.randn(12, 8, dtype=dtype), torch.randn(12, 4, dtype=dtype)
    want = grads(model, x, y, 2.0**-18)
    ours = hs.ada_loss_(copy.deepcopy(model), every=1)
    for _ in range(3):
        got = grads(ours, x, y, 2.0**-18)
        assert all(torch.equal(a, b) for a, b in zip(want, got))  # powers of two are exact
    assert any(s > 1 for s in ours.scales.values()) and list(ours.scales) == ["0", "2", "4"]


def test_convolutions_norms_and_whole_blocks_inside_the_chain():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return x + self.f(x).relu()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), Block(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(144, 4)).double()
    x, y = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    want = grads(model, x, y, 2.0**-18)
    ours = hs.ada_loss_(copy.deepcopy(model), every=1)
    for _ in range(2):
        got = grads(ours, x, y, 2.0**-18)
    assert any(s > 1 for s in ours.scales.values())
    for a, b in zip(want, got):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_limits_on_one_product_and_on_all_together():
    model = hs.ada_loss_(chain((8,) * 9), every=1, limit=8.0, total=64.0)
    for _ in range(2):
        grads(model, torch.randn(4, 8), torch.randn(4, 8), 1e-7)
    model(torch.randn(4, 8))  # takes over what the last backward saw
    scales = torch.stack(list(model.scales.values()))
    assert scales.max() <= 8 and scales.prod() <= 64 and scales.min() >= 1


def test_statistics_are_taken_every_so_often_and_only_then():
    model = hs.ada_loss_(chain(), every=3)
    x, y = torch.randn(4, 8), torch.randn(4, 4)
    seen = []
    for _ in range(7):
        grads(model, x, y)
        seen.append(bool(model._seen))
    assert seen == [True, False, False, True, False, False, True]


def test_fewer_activation_gradients_vanish_in_a_deep_fp16_chain():
    def vanished(model):
        zeros = []
        x = torch.randn(64, 8).half()
        hooks = [layer.register_full_backward_hook(lambda m, gi, go: zeros.append((go[0] == 0).float().mean())) for layer in model if isinstance(layer, nn.Tanh)]
        for _ in range(3):
            zeros.clear()
            model(x).float().pow(2).mean().mul(1e-3).backward()
        for h in hooks:
            h.remove()
        return torch.stack(zeros).max().item()

    torch.manual_seed(0)
    model = chain((8,) + (64,) * 8)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    model.half()
    plain, ours = vanished(copy.deepcopy(model)), vanished(hs.ada_loss_(copy.deepcopy(model), every=1, total=2.0**20))
    assert plain > 0.3 and ours < 0.3 * plain, (plain, ours)


def test_it_trains_beside_a_scaler_and_in_another_model_without_grad():
    torch.manual_seed(0)
    model = nn.ModuleDict({"front": nn.Linear(4, 8), "chain": hs.ada_loss_(chain(), every=2)}).half()
    opt, scaler = hs.optim.AdamW(model.parameters(), lr=1e-2), hs.GradScaler()
    x, y = torch.randn(64, 4).half(), torch.randn(64, 4)
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(model["chain"](model["front"](x)).float(), y)
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and scaler.stats().steps_skipped <= 2
    with torch.no_grad():
        assert torch.equal(model["chain"](model["front"](x)), nn.Sequential(*model["chain"])(model["front"](x)))


def test_parameters_hooks_state_dict_and_copies_stay():
    model = chain()
    names, calls = list(model.state_dict()), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    same = hs.ada_loss_(model)
    assert same is model and list(model.state_dict()) == names and isinstance(model, nn.Sequential)
    grads(model, torch.randn(4, 8), torch.randn(4, 4))
    assert calls == [1]
    again = pickle.loads(pickle.dumps(copy.deepcopy(chain())))
    hs.ada_loss_(again, every=1)
    grads(again, torch.randn(4, 8), torch.randn(4, 4))
    twice = pickle.loads(pickle.dumps(copy.deepcopy(again)))
    assert all(torch.equal(a, b) for a, b in zip(grads(again, torch.ones(4, 8), torch.ones(4, 4)), grads(twice, torch.ones(4, 8), torch.ones(4, 4))))


def test_the_chain_may_be_edited_and_sliced():
    model = hs.ada_loss_(chain(), every=1)
    x, y = torch.randn(4, 8), torch.randn(4, 4)
    grads(model, x, y)
    model.append(nn.Linear(4, 4))
    grads(model, x, y)
    assert list(model.scales) == ["0", "2", "4", "5"]
    leaf = torch.randn(4, 16, requires_grad=True)
    model[1:2](leaf).sum().backward()  # no product in it
    torch.testing.assert_close(leaf.grad, 1 - leaf.detach().tanh() ** 2)


def test_refusals_name_what_was_given():
    with pytest.raises(TypeError, match="ada_loss_: sequential is Linear; expected torch.nn.Sequential"):
        hs.ada_loss_(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="ada_loss_: sequential is AdaLoss"):
        hs.ada_loss_(hs.ada_loss_(chain()))
    with pytest.raises(ValueError, match="ada_loss_: every is 0; expected at least 1"):
        hs.ada_loss_(chain(), every=0)
    with pytest.raises(ValueError, match="ada_loss_: probability is 1.0; expected more than 0"):
        hs.ada_loss_(chain(), probability=1.0)
    with pytest.raises(ValueError, match="ada_loss_: sequential has no Linear"):
        hs.ada_loss_(nn.Sequential(nn.ReLU()))
