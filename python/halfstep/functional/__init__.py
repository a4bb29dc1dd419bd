"""Layer functions, with torch.nn.functional's names and conventions. Each is one op of torch.ops.halfstep, with one rounding."""

from ._activation import bias_dropout_add, geglu, gelu, silu, squared_relu, swiglu
from ._conv import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from ._linear import linear
from ._loss import cross_entropy, linear_cross_entropy
from ._norm import layer_norm, rms_norm
from ._rope import rope
from ._scale_gradient import scale_gradient
from ._softmax import softmax

__all__ = ["bias_dropout_add", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "cross_entropy", "geglu", "gelu", "layer_norm", "linear",
           "linear_cross_entropy", "rms_norm", "rope", "scale_gradient", "silu", "softmax", "squared_relu", "swiglu"]
