"""Layer functions, with torch.nn.functional's names and conventions. Each is one op of torch.ops.halfstep, with one rounding."""

from ._scale_gradient import scale_gradient

__all__ = ["scale_gradient"]
