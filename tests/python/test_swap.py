"""hs.swap_layers_: every stock layer becomes ours in place; what is left says why; nothing else changes."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep._swap import _ours


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.act = nn.GELU()
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 8, bias=False), nn.RMSNorm(8, eps=1e-5))
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.softmax = nn.Softmax(dim=-1)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x, target):
        y = self.up(self.blocks(self.act(self.conv(x))))
        return self.loss(self.softmax(y).mean((1, 3)), target)


def grads(model, x, target):
    model.zero_grad()
    loss = model(x, target)
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in model.parameters()]


def test_every_layer_is_swapped_and_computes_the_same():
    torch.manual_seed(0)
    stock = Net()
    ours = copy.deepcopy(stock)
    identities = {name: (id(m), [id(p) for p in m.parameters()]) for name, m in ours.named_modules()}
    report = hs.swap_layers_(ours)
    assert report.swapped == {"conv": "Conv2d", "act": "GELU", "blocks.0": "Linear", "blocks.1": "LayerNorm", "blocks.2": "SiLU", "blocks.3": "Linear", "blocks.4": "RMSNorm",
                              "up": "ConvTranspose2d", "softmax": "Softmax", "loss": "CrossEntropyLoss"} and not report.left
    assert str(report).startswith("swapped 10 layers: ") and "2 Linear" in str(report)
    assert {name: (id(m), [id(p) for p in m.parameters()]) for name, m in ours.named_modules()} == identities
    assert all(isinstance(ours.get_submodule(name), getattr(hs.nn, kind)) for name, kind in report.swapped.items())
    assert list(ours.state_dict()) == list(stock.state_dict())
    x, target = torch.randn(3, 1, 8, 8), torch.randint(16, (3,))
    for a, b in zip(grads(stock, x, target), grads(ours, x, target)):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7)
    assert not hs.swap_layers_(ours).swapped  # twice changes nothing
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert all(torch.equal(a, b) for a, b in zip(grads(again, x, target), grads(ours, x, target)))


def test_a_cast_model_trains_with_swapped_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))
    hs.swap_layers_(model)
    hs.cast_model(model)
    assert model[1].weight.dtype == torch.float32  # norms stay FP32 as before
    opt, scaler = hs.optim.AdamW(model.named_parameters(), lr=1e-2), hs.GradScaler()
    x, y = torch.randn(64, 16), torch.randint(4, (64,))
    losses = []
    for _ in range(60):
        opt.zero_grad()
        with hs.autocast("cpu"):
            loss = hs.nn.CrossEntropyLoss()(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_what_is_not_known_is_left_and_says_why():
    class Mine(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.ModuleDict({"mine": Mine(2, 2), "tied": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "head": nn.Linear(2, 2), "norms": nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(2)]), "plain": nn.Linear(2, 2)})
    report = hs.swap_layers_(model, exclude=["head", "norms.*", nn.Conv2d])
    assert report.swapped == {"plain": "Linear"}
    assert report.left == {"mine": "Mine derives from Linear", "tied": "Linear with a parametrization", "head": "excluded by head", "norms.0": "excluded by norms.*", "norms.1": "excluded by norms.*"}
    assert "left 'mine': Mine derives from Linear" in str(report) and type(model["head"]) is nn.Linear
    assert hs.swap_layers_(model, exclude=["norms", "head"]).left["norms.1"] == "excluded by norms"  # with all that is in it
    assert hs.swap_layers_(model, exclude=nn.LayerNorm).left["norms.0"] == "excluded by LayerNorm"
    root = nn.Linear(2, 2)
    assert hs.swap_layers_(root).swapped == {"": "Linear"} and type(root) is hs.nn.Linear


def test_hooks_and_tied_weights_stay():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    hs.swap_layers_(model)
    model(torch.tensor([1, 2])).sum().backward()
    assert calls == [1] and model[1].weight is model[0].weight


@pytest.mark.parametrize("stock", sorted(_ours(), key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_arguments_have_torchs_names(stock):
    assert list(inspect.signature(_ours()[stock].forward).parameters)[1] == list(inspect.signature(stock.forward).parameters)[1]


def test_probabilities_as_targets_still_go_to_torch():
    loss = nn.CrossEntropyLoss()
    hs.swap_layers_(loss)
    x, p = torch.randn(3, 5), torch.rand(3, 5).softmax(-1)
    assert torch.equal(loss(x, p), nn.CrossEntropyLoss()(x, p))


def test_refusals_name_what_was_given():
    with pytest.raises(TypeError, match="swap_layers_: model is Tensor; expected torch.nn.Module"):
        hs.swap_layers_(torch.ones(2))
    with pytest.raises(ValueError, match="swap_layers_: exclude 'haed' matches no module; the model has '', '0'"):
        hs.swap_layers_(nn.Sequential(nn.Linear(2, 2)), exclude=["haed"])
    with pytest.raises(TypeError, match="swap_layers_: exclude holds 3; expected a path, a glob or a class"):
        hs.swap_layers_(nn.Linear(2, 2), exclude=[3])
