"""Cross entropy as modules."""

import torch

from .. import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss for class indices, computed by hs.functional.cross_entropy, with its z_loss.

    forward(logits, target, grad_scale=None); `weight` is a buffer, as in torch. The loss is FP32 (FP64 for FP64 logits).
    Targets that are class probabilities go to torch's own function, where there is neither z_loss nor grad_scale.
    """

    z_loss = 0.0  # of a stock module that became ours

    def __init__(self, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0, z_loss=0.0):
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss

    def forward(self, input, target, grad_scale=None):
        if target.is_floating_point() and not self.z_loss and grad_scale is None:
            return super().forward(input, target)
        return functional.cross_entropy(input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing, self.z_loss, grad_scale)


class LinearCrossEntropyLoss(torch.nn.Module):
    """A linear layer and its cross entropy in one, hs.functional.linear_cross_entropy: the logits are never in memory as a whole.

    in_features, num_classes and bias as in torch.nn.Linear, whose parameters' names and initialisation these are. weight: a Parameter
    [num_classes, in_features] to share instead, as an embedding's; the layer then adds a bias only if asked. forward(x, target,
    grad_scale=None) returns the loss; logits(x) returns x weightᵀ + bias for evaluation. class_weight is a buffer of [num_classes].
    """

    def __init__(self, in_features, num_classes, bias=False, weight=None, class_weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0,
                 device=None, dtype=None):
        super().__init__()
        self.in_features, self.num_classes = in_features, num_classes
        self.ignore_index, self.reduction, self.label_smoothing, self.z_loss = ignore_index, reduction, label_smoothing, z_loss
        fresh = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype) if weight is None else None
        if fresh is None:
            if not isinstance(weight, torch.nn.Parameter) or weight.shape != (num_classes, in_features):
                found = f"{type(weight).__name__} {tuple(getattr(weight, 'shape', ()))}"
                raise ValueError(f"LinearCrossEntropyLoss: weight is {found}; expected a Parameter of shape {(num_classes, in_features)}")
            self.weight = weight
            self.bias = torch.nn.Parameter(torch.zeros(num_classes, device=weight.device, dtype=weight.dtype)) if bias else None
        else:
            self.weight, self.bias = fresh.weight, fresh.bias
        self.register_buffer("class_weight", class_weight)

    def forward(self, x, target, grad_scale=None):
        return functional.linear_cross_entropy(x, self.weight, target, self.bias, self.class_weight, self.ignore_index, self.reduction, self.label_smoothing,
                                               self.z_loss, grad_scale)

    def logits(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self):
        return f"in_features={self.in_features}, num_classes={self.num_classes}, bias={self.bias is not None}, reduction={self.reduction!r}"
