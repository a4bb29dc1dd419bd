"""Layers under torch.nn's names: the same constructor, parameters and state dict, computed by torch.ops.halfstep."""

from ._norm import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "RMSNorm"]
from ._activation import GELU, BiasDropoutAdd, GeGLU, SiLU, SquaredReLU, SwiGLU

__all__ = ["BiasDropoutAdd", "GELU", "GeGLU", "SiLU", "SquaredReLU", "SwiGLU"]
from ._rope import RotaryEmbedding
from ._softmax import Softmax

__all__ = ["RotaryEmbedding", "Softmax"]
from ._loss import CrossEntropyLoss, LinearCrossEntropyLoss

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss"]
