"""Layers under torch.nn's names: the same constructor, parameters and state dict, computed by torch.ops.halfstep."""

from ._linear import MLP, Linear

__all__ = ["MLP", "Linear"]
