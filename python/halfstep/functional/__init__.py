"""Layer functions, with torch.nn.functional's names and conventions. Each is one op of torch.ops.halfstep, with one rounding."""

from ._rope import rope
from ._scale_gradient import scale_gradient
from ._softmax import softmax

__all__ = ["rope", "scale_gradient", "softmax"]
