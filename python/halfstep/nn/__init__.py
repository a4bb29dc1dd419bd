"""Layers under torch.nn's names: the same constructor, parameters and state dict, computed by torch.ops.halfstep."""

from ._activation import BiasDropoutAdd, GELU, GeGLU, SiLU, SquaredReLU, SwiGLU
from ._conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from ._linear import Linear, MLP
from ._loss import CrossEntropyLoss, LinearCrossEntropyLoss
from ._norm import LayerNorm, RMSNorm
from ._rope import RotaryEmbedding
from ._softmax import Softmax

__all__ = ["BiasDropoutAdd", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "CrossEntropyLoss", "GELU", "GeGLU", "LayerNorm", "Linear",
           "LinearCrossEntropyLoss", "MLP", "RMSNorm", "RotaryEmbedding", "SiLU", "Softmax", "SquaredReLU", "SwiGLU"]
