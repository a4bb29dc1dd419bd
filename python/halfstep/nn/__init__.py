"""Layers under torch.nn's names: the same constructor, parameters and state dict, computed by torch.ops.halfstep."""

from ._norm import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "RMSNorm"]
