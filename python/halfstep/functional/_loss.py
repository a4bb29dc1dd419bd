"""Cross entropy, and a linear layer with its cross entropy in one."""

from .._library import H


def cross_entropy(logits, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0, grad_scale=None):
    """torch.nn.functional.cross_entropy for class indices, with a z-loss; the gradient is rounded once, with the loss scale in it.

    logits: [V], [N, V] or [N, V, d1, …] in FP16, BF16, FP32 or FP64. target: int64 class indices, shaped as logits without V.
    weight: [V] class weights, or None. Returns the loss, shaped as target for reduction "none" and one number else, in FP32
    (FP64 for FP64 logits): an FP16 loss times a loss scale of 65,536 would leave FP16's range. All is computed in FP32 and each
    result rounded once. Smoothing and the weighted mean are torch's; z_loss adds z_loss · logsumexp² to each row (PaLM,
    arXiv 2204.02311), and "mean" divides that, too, by the sum of the labels' weights. Rows whose label is ignore_index have
    loss 0 and a gradient of exact zeros, whatever they hold; if all are ignored the mean is NaN, as in torch.

    grad_scale: a rounding hint, one floating-point element on the device such as scaler.scale_tensor. The gradient is the same
    with it, but formed in the forward, as round(gradient · grad_scale), and multiplied by grad_output / grad_scale in the
    backward: nothing is read or written where they are equal, which they are when the loss goes through that scaler and nothing else.

    ValueError or RuntimeError name the argument: targets that are no int64 class indices, shapes, a weight that requires grad. A label out
    of range raises on the CPU; on CUDA, where nothing waits for the device, the loss and the gradient of its row are NaN. Differentiable once.
    """
    return H.cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, grad_scale)


def linear_cross_entropy(x, weight, target, bias=None, class_weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0, grad_scale=None):
    """cross_entropy(x weightᵀ + bias, target, class_weight, …) without the logits in memory: rows in chunks.

    x: [H] or [..., H]; weight: [V, H]; bias: [V] or None, all of one dtype (under autocast they are cast); target: int64, shaped as
    x without H. The logits of a chunk are FP32 for 16-bit inputs too, and the gradient of weight is summed in FP32 and rounded once.
    For "mean" and "sum" the gradients are formed in the forward, in FP32 (with grad_scale rounded there, in x's dtype, already scaled);
    for "none" the backward computes the logits again. Everything else is as in cross_entropy.
    """
    return H.linear_cross_entropy(x, weight, target, bias, class_weight, ignore_index, reduction, label_smoothing, z_loss, grad_scale)
