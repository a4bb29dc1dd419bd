"""Activations, gated units, and bias + dropout + residual add as modules without parameters."""

import torch

from .. import functional


class GELU(torch.nn.GELU):
    """torch.nn.GELU, computed by hs.functional.gelu."""

    def forward(self, input):
        return functional.gelu(input, self.approximate)


class SiLU(torch.nn.SiLU):
    """torch.nn.SiLU, computed by hs.functional.silu. With inplace=True the result is also written to x, as torch does."""

    def forward(self, input):
        if not self.inplace:
            return functional.silu(input)
        return input.copy_(functional.silu(input.clone()))


class SquaredReLU(torch.nn.Module):
    """max(x, 0)²: hs.functional.squared_relu."""

    def forward(self, x):
        return functional.squared_relu(x)


class _Gated(torch.nn.Module):
    """`count_overflow`: the buffer `overflowed`, int64 on the module's device and not in the state dict, counts results that left
    the dtype's range although gate and up are finite. Reading it waits for the device."""

    def __init__(self, count_overflow=False):
        super().__init__()
        self.register_buffer("overflowed", torch.zeros((), dtype=torch.int64) if count_overflow else None, persistent=False)

    def extra_repr(self):
        return "" if self.overflowed is None else "count_overflow=True"


class SwiGLU(_Gated):
    __doc__ = f"hs.functional.swiglu of (gate, up), or of one tensor [..., 2F] that holds both.\n\n    {_Gated.__doc__}\n    "

    def forward(self, gate, up=None):
        return functional.swiglu(gate, up, self.overflowed)


class GeGLU(_Gated):
    __doc__ = f"hs.functional.geglu of (gate, up), or of one tensor [..., 2F] that holds both; approximate: \"none\" or \"tanh\".\n\n    {_Gated.__doc__}\n    "

    def __init__(self, approximate="none", count_overflow=False):
        super().__init__(count_overflow)
        if approximate not in ("none", "tanh"):
            raise ValueError(f"GeGLU: approximate is {approximate!r}; expected 'none' or 'tanh'")
        self.approximate = approximate

    def forward(self, gate, up=None):
        return functional.geglu(gate, up, self.approximate, self.overflowed)

    def extra_repr(self):
        return ", ".join(filter(None, (f"approximate={self.approximate!r}", super().extra_repr())))


class BiasDropoutAdd(torch.nn.Module):
    """residual + dropout(x + bias): hs.functional.bias_dropout_add; in evaluation mode nothing is dropped. bias may be None."""

    def __init__(self, p=0.5):
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"BiasDropoutAdd: p is {p}; expected a probability between 0 and 1")
        self.p = p

    def forward(self, x, bias, residual, seed=None):
        return functional.bias_dropout_add(x, bias, residual, self.p, self.training, seed)

    def extra_repr(self):
        return f"p={self.p}"
