"""LayerNorm and RMSNorm under torch.nn's names."""

import torch

from ..functional import layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm computed by halfstep. `forward(x, residual)` returns (y, x + residual); see hs.functional.layer_norm.

    A stock module becomes ours by `module.__class__ = hs.nn.LayerNorm`: parameters, hooks and names stay.
    """

    def forward(self, input, residual=None):
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, residual)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm computed by halfstep, with `weight_offset`: the factor is weight + weight_offset, and the weight begins at 1 - weight_offset.

    `forward(x, residual)` returns (y, x + residual); see hs.functional.rms_norm. A stock module becomes ours by `module.__class__ = hs.nn.RMSNorm`.
    """

    weight_offset = 0.0

    def __init__(self, normalized_shape, eps=None, elementwise_affine=True, device=None, dtype=None, *, weight_offset=0.0):
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.weight_offset = float(weight_offset)
        self.reset_parameters()

    def reset_parameters(self):
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x, residual=None):
        return rms_norm(x, self.normalized_shape, self.weight, self.eps, residual, self.weight_offset)

    def extra_repr(self):
        return super().extra_repr() + (f", weight_offset={self.weight_offset}" if self.weight_offset else "")
