"""Layer functions, with torch.nn.functional's names and conventions. Each is one op of torch.ops.halfstep, with one rounding."""

from ._norm import layer_norm, rms_norm
from ._rope import rope
from ._loss import cross_entropy, linear_cross_entropy
from ._scale_gradient import scale_gradient
from ._softmax import softmax

__all__ = ["layer_norm", "rms_norm", "scale_gradient"]
from ._activation import bias_dropout_add, geglu, gelu, silu, squared_relu, swiglu
from ._scale_gradient import scale_gradient

__all__ = ["bias_dropout_add", "geglu", "gelu", "scale_gradient", "silu", "squared_relu", "swiglu"]
__all__ = ["rope", "scale_gradient", "softmax"]
__all__ = ["cross_entropy", "linear_cross_entropy", "scale_gradient"]
