"""A product with what stands behind it: bias and activation."""

from .._library import H


def linear(x, weight, bias=None, activation=None):
    """act(x weight^T + bias), accumulated in FP32 (FP64 for FP64) and rounded once.

    x: [..., K], weight: [N, K], of one dtype (FP16, BF16, FP32, FP64); bias: [N], of that dtype or FP32. activation: None, "relu",
    "gelu" (x Phi(x), arXiv 1606.08415) or "gelu_tanh" (its tanh form). For the backward ReLU keeps one bit an element, GELU the
    pre-activation. Gradients are x's dtype; where `weight.grad_dtype` is torch.float32 (an optimizer with grad_dtype="fp32") the weight's
    is FP32 and was never rounded to 16 bits. Raises for other dtypes and shapes, and names both.
    """
    return H.linear(x, weight, bias, activation)
