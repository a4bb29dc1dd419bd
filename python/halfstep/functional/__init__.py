"""Layer functions, with torch.nn.functional's names and conventions. Each is one op of torch.ops.halfstep, with one rounding."""

from ._conv import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from ._scale_gradient import scale_gradient

__all__ = ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "scale_gradient"]
