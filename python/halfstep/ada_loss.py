"""Ada-Loss: a scale of its own for the gradient at every product of a chain of layers, from the statistics of that product.

Zhao et al., "Adaptive Loss Scaling for Mixed Precision Training", arXiv 1910.12385 (IJCAI 2020). One scale for the whole network
fits one layer: gradients grow or shrink from layer to layer. Here each product of the backward pass multiplies its incoming
gradient by a power of two, so that what it sends on seldom falls below FP16 range; the scale travels with the gradient and is
divided out at every parameter and at the chain's input.
"""

import torch
from torch.func import functional_call

from .functional import scale_gradient

_PRODUCTS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
_LARGEST, _SMALLEST = 65504.0, 2.0**-24


def fan_in_of_backward(layer):
    """Terms of one element of the input's gradient: output features, times the kernel's elements for a convolution."""
    weight = layer.weight
    return weight.shape[0] // getattr(layer, "groups", 1) * weight[0, 0].numel() if weight.dim() > 2 else weight.shape[0]


def scale_bounds(grad, weight, fan_in, probability=1e-3):
    """Two 0-d float32 tensors: the scale that a product wants, and the most it can bear.

    Wanted: the share `probability` of the sums falls below FP16's smallest number, the sums taken as normal with the deviation
    that `grad` and `weight` give them. The most: the largest possible sum, fan_in max|grad| max|weight|, stays in FP16 range.
    """
    g, w = grad.detach().float(), weight.detach().float()
    square = lambda x: x.var(correction=0) + x.mean() ** 2  # E[x^2]
    sigma = (square(g) * square(w)).sqrt() * (0.5 * fan_in) ** 0.5
    # P(|o| < u) = erf(u / (sqrt(2) sigma)) for o ~ N(0, sigma)
    wanted = _SMALLEST / (2.0**0.5 * torch.erfinv(torch.tensor(probability, dtype=torch.float64)).item() * sigma)
    return wanted, _LARGEST / (fan_in * g.abs().max() * w.abs().max())


def choose_scale(wanted, most, limit):
    """The power of two at or below both, at least 1 and at most `limit`; 1 where the statistics were zero or not finite."""
    scale = torch.minimum(wanted, most)
    scale = torch.where(scale.isfinite(), scale, 1.0).clamp(min=1.0)
    return torch.exp2(torch.floor(torch.log2(torch.minimum(scale, torch.as_tensor(limit, dtype=torch.float32, device=scale.device)))))


class AdaLoss(torch.nn.Sequential):
    """A torch.nn.Sequential whose products scale their gradients; made by `ada_loss_`."""

    def __init__(self, *layers, every=100, probability=1e-3, limit=16.0, total=1024.0):
        super().__init__(*layers)  # of a slice, too
        self._setup(every, probability, limit, total)

    def _setup(self, every, probability, limit, total):
        self._every, self._probability, self._limit, self._total = every, probability, limit, total
        self._forwards, self._scales, self._seen = 0, {}, {}

    @property
    def scales(self):
        """{name of the product: its scale}, 0-d float32 tensors on the device, in the order of the layers."""
        return {name: self._scales[name] for name, _ in self._products() if name in self._scales}

    def _products(self):
        return [(name, layer) for name, layer in self.named_children() if isinstance(layer, _PRODUCTS)]

    def _refresh(self, device):
        """New scales from what the last watched backward saw. They replace the old ones, which a graph in flight may still read."""
        before = after = torch.ones((), device=device)  # what the gradient carried as it reached the product, and will carry
        for name, layer in reversed(self._products()):
            old = self._scales.get(name, torch.ones(())).to(device)
            if name in self._seen:
                wanted, most = (bound * (before / after) for bound in self._seen[name])
                self._scales[name] = choose_scale(wanted, most, torch.clamp(self._total / after, min=1.0, max=self._limit))
            else:
                self._scales[name] = old
            before, after = before * old, after * self._scales[name]
        self._seen = {}

    def _carried(self):
        """{name of each child: the scale of the gradient behind it}; None behind the last product."""
        carried, behind = None, {}
        for name, layer in reversed(list(self.named_children())):
            if isinstance(layer, _PRODUCTS):
                carried = self._scales[name] if carried is None else carried * self._scales[name]
            behind[name] = carried
        return behind, carried

    def _watch(self, y, name, layer):
        """Statistics of the gradient as it reaches the product, with whatever scale it carries then."""
        y.register_hook(lambda grad: self._seen.__setitem__(name, scale_bounds(grad, layer.weight, fan_in_of_backward(layer), self._probability)))

    def forward(self, x):
        """As torch.nn.Sequential, forward; the gradients are its too, but for what no longer falls below the range."""
        names = [name for name, _ in self._products()]
        if not torch.is_grad_enabled() or not names:
            return super().forward(x)
        if self._seen or any(name not in self._scales or self._scales[name].device != x.device for name in names):
            self._refresh(x.device)
        behind, carried = self._carried()
        watching = self._forwards % self._every == 0
        self._forwards += 1
        if x.requires_grad:
            x = scale_gradient(x, 1.0 / carried)
        for name, layer in self.named_children():
            scale = behind[name]
            parameters = {} if scale is None else {k: scale_gradient(p, 1.0 / scale) for k, p in layer.named_parameters() if p.requires_grad}
            x = functional_call(layer, parameters, (x,)) if parameters else layer(x)
            if name in self._scales and x.requires_grad:
                x = scale_gradient(x, self._scales[name])
                if watching:
                    self._watch(x, name, layer)
        return x


def ada_loss_(sequential, every=100, probability=1e-3, limit=16.0, total=1024.0):
    """Turns a torch.nn.Sequential into an AdaLoss in place, and returns it: parameters, names, hooks and state dict stay.

    every: iterations between two looks at the statistics; each costs a few passes over the gradients and weights, nothing waits.
    probability: share of a product's sums that may fall below FP16's smallest number. limit: largest scale of one product; total: of all together.

    Its direct children that are Linear or Conv1d/2d/3d get a scale; other children (norms, activations, whole blocks with branches inside)
    pass the gradient on with the scale it carries. The scale is divided out at every parameter, in the parameter's own dtype, and at the input, so a chain may
    stand anywhere in a network and beside branches. Used beside a GradScaler, whose scale it refines, or alone.
    """
    if type(sequential) is not torch.nn.Sequential:
        raise TypeError(f"ada_loss_: sequential is {type(sequential).__name__}; expected torch.nn.Sequential: only there the order of the layers is known")
    for name, value, least in (("every", every, 1), ("limit", limit, 1.0), ("total", total, 1.0)):
        if not value >= least:
            raise ValueError(f"ada_loss_: {name} is {value}; expected at least {least}")
    if not 0.0 < probability < 1.0:
        raise ValueError(f"ada_loss_: probability is {probability}; expected more than 0 and less than 1")
    if not any(isinstance(layer, _PRODUCTS) for layer in sequential):
        raise ValueError("ada_loss_: sequential has no Linear or Conv1d/2d/3d among its direct children")
    sequential.__class__ = AdaLoss
    sequential._setup(every, probability, limit, total)
    return sequential
