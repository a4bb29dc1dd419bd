"""Layer functions, with torch.nn.functional's names and conventions. Each is one op of torch.ops.halfstep, with one rounding."""

from ._linear import linear
from ._scale_gradient import scale_gradient

__all__ = ["linear", "scale_gradient"]
