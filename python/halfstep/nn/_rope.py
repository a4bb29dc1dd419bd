import torch

from .. import functional as F


class RotaryEmbedding(torch.nn.Module):
    """Rotary position embedding (Su et al., arXiv 2104.09864) of queries and keys: pair i of position p turns by p * base^(-2i/dim).

    dim: how many elements of a head turn, even; heads may be wider, the rest passes. The angles are computed in FP64 and their cosines
    and sines held in FP32, [max_seq_len, dim/2] each, outside the state dict; casting the module leaves them FP32.

    forward(x, positions=None, seq_dim=-2): x [..., seq, head_dim], or with seq_dim=-3 [..., seq, heads, head_dim]. positions: integers
    [seq], or [batch…, seq] where the leading dimensions are x's; None is 0, 1, 2, …. Positions beyond max_seq_len are an error.
    """

    def __init__(self, dim, base=10000.0, max_seq_len=2048, interleaved=False, device=None):
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"RotaryEmbedding: dim is {dim}; expected a positive even number")
        self.dim, self.base, self.max_seq_len, self.interleaved = dim, float(base), max_seq_len, interleaved
        for name, table in zip(("cos", "sin"), self._tables(device)):
            self.register_buffer(name, table, persistent=False)

    def _tables(self, device):
        frequencies = self.base ** (-torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)
        angles = torch.outer(torch.arange(self.max_seq_len, dtype=torch.float64), frequencies)
        return angles.cos().to(device, torch.float32), angles.sin().to(device, torch.float32)

    def _apply(self, fn, recurse=True):
        unwritten = self.cos.is_meta
        super()._apply(fn, recurse)
        # .half() and its like: a rounded angle is a wrong position. And to_empty() of a module made on meta leaves what was in memory.
        if self.cos.dtype != torch.float32 or unwritten and not self.cos.is_meta:
            self.cos, self.sin = self._tables(self.cos.device)
        return self

    def forward(self, x, positions=None, seq_dim=-2):
        if seq_dim not in (-2, -3) or x.dim() < -seq_dim:
            raise ValueError(f"RotaryEmbedding: seq_dim is {seq_dim} and x is {list(x.shape)}; expected -2 or -3 and as many dimensions")
        if positions is None:
            seq = x.shape[seq_dim]
            if seq > self.max_seq_len:
                raise ValueError(f"RotaryEmbedding: x has {seq} positions but max_seq_len is {self.max_seq_len}")
            cos, sin = self.cos[:seq], self.sin[:seq]
        else:
            if positions.device.type == "cpu" and not torch.compiler.is_compiling() and positions.numel() and positions.min() < 0:
                raise IndexError(f"RotaryEmbedding: positions hold {int(positions.min())}; expected 0 to {self.max_seq_len - 1}")
            cos, sin = self.cos[positions], self.sin[positions]
            # Leading dimensions of positions are x's from the left; in between every head turns alike.
            between = [1] * (x.dim() - positions.dim() + seq_dim + 1) if positions.dim() > 1 else []
            shape = [*positions.shape[:-1], *between, positions.shape[-1], cos.shape[-1]]
            cos, sin = cos.view(shape), sin.view(shape)
        if seq_dim == -3:
            cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return F.rope(x, cos, sin, self.interleaved)

    def extra_repr(self):
        return f"dim={self.dim}, base={self.base}, max_seq_len={self.max_seq_len}, interleaved={self.interleaved}"
