import torch

from .. import functional as F


class Softmax(torch.nn.Softmax):
    """torch.nn.Softmax with a scale and masks: hs.functional.softmax.

    forward(x, mask=None). `dim=None` is torch's implicit choice: 0 for 0, 1 or 3 dimensions, else 1.
    """

    scale, causal = 1.0, False  # of a stock module that became ours

    def __init__(self, dim=None, scale=1.0, causal=False):
        super().__init__(dim)
        self.scale, self.causal = scale, causal

    def forward(self, input, mask=None):
        dim = self.dim if self.dim is not None else 0 if input.dim() in (0, 1, 3) else 1
        return F.softmax(input, dim, self.scale, mask, self.causal)

    def extra_repr(self):
        return f"{super().extra_repr()}, scale={self.scale}, causal={self.causal}"
