"""Layers under torch.nn's names: the same constructor, parameters and state dict, computed by torch.ops.halfstep."""

from ._rope import RotaryEmbedding
from ._softmax import Softmax

__all__ = ["RotaryEmbedding", "Softmax"]
