"""halfstep's layer ops in torch's own, for programs that run where halfstep is not loaded: torch.export and ONNX.

Each function has the arguments of its op and computes 16-bit inputs in FP32, as the op does, and rounds at the end; products and
convolutions are left to the device that runs the program, in their own dtype.
"""

import torch
import torch.nn.functional as F

from ._library import H


def _wide(x):
    return x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x


def _as(x, like):
    return x if x is None else x.to(like.dtype)


_ACTIVATION = {None: lambda x: x, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def linear(x, weight, bias=None, activation=None):
    y = F.linear(x, weight, _as(bias, weight))
    return _ACTIVATION[activation](_wide(y)).to(y.dtype)


def convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    return torch.ops.aten.convolution(input, weight, _as(bias, weight), stride, padding, dilation, transposed, output_padding, groups)


def _residual(x, residual):
    """(what is normed, the new residual)."""
    if residual is None:
        return _wide(x), x
    new = (_wide(x) + _wide(residual)).to(residual.dtype)
    return _wide(new).to(_wide(x).dtype), new


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5, residual=None):
    z, new = _residual(x, residual)
    y = F.layer_norm(z, normalized_shape, _as(weight, z), _as(bias, z), eps)
    nothing = z.new_empty(0)  # mean and rstd: the backward's
    return y.to(x.dtype), new, nothing, nothing


def rms_norm(x, normalized_shape, weight=None, eps=1e-5, weight_offset=0.0, residual=None):
    z, new = _residual(x, residual)
    y = z * torch.rsqrt(z.square().mean([-i - 1 for i in range(len(normalized_shape))], keepdim=True) + eps)
    factor = (1.0 if weight is None else _as(weight, z)) + weight_offset
    return (y * factor).to(x.dtype), new, z.new_empty(0)


def gelu(x, *, approximate="none"):
    return F.gelu(_wide(x), approximate=approximate).to(x.dtype)


def silu(x):
    return F.silu(_wide(x)).to(x.dtype)


def squared_relu(x):
    return F.relu(_wide(x)).square().to(x.dtype)


def _gated(activation, gate, up):
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return (activation(_wide(gate)) * _wide(up)).to(gate.dtype)


def swiglu(gate, up=None):
    return _gated(F.silu, gate, up)


def geglu(gate, up=None, *, approximate="none"):
    return _gated(lambda x: F.gelu(x, approximate=approximate), gate, up)


def bias_dropout_add(x, bias, residual, p, seed=None):
    if p:
        raise ValueError(f"bias_dropout_add: p is {p}; a program for other machines drops nothing: export the model in evaluation mode")
    return ((_wide(x) if bias is None else _wide(x) + _wide(bias)) + _wide(residual)).to(x.dtype)


def softmax(x, dim, scale, mask, causal):
    z, takes = _wide(x) * scale, None
    if mask is not None and mask.dtype == torch.bool:
        takes = mask
    elif mask is not None:
        z, takes = z + _wide(mask), mask != -torch.inf
    if causal:
        below = torch.ones(x.shape[-2], x.shape[-1], dtype=torch.bool, device=x.device).tril()
        takes = below if takes is None else takes & below
    if takes is None:
        return z.softmax(dim).to(x.dtype)
    return z.masked_fill(~takes, -torch.inf).softmax(dim).masked_fill(~takes, 0.0).to(x.dtype)  # the last: rows of which nothing takes part


def rope(x, cos, sin, interleaved, inverse):
    pairs = cos.shape[-1]
    turned, rest = _wide(x[..., : 2 * pairs]), x[..., 2 * pairs:]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :pairs], turned[..., pairs:])
    cos, sin = _as(cos, turned), _as(-sin if inverse else sin, turned)
    both = (a * cos - b * sin, b * cos + a * sin)
    y = (torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)).to(x.dtype)
    return torch.cat((y, rest), -1) if x.shape[-1] > 2 * pairs else y


def cross_entropy(logits, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0, grad_scale=None):
    z, weight = _wide(logits), None if weight is None else _as(weight, _wide(logits))
    if not z_loss:
        return F.cross_entropy(z, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
    taken = target != ignore_index
    rows = F.cross_entropy(z, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    rows = torch.where(taken, rows + z_loss * z.logsumexp(1 if z.dim() > 1 else 0).square(), 0.0)
    if reduction == "none":
        return rows
    shares = taken.to(z.dtype) if weight is None else torch.where(taken, weight[torch.where(taken, target, 0)], 0.0)
    return rows.sum() if reduction == "sum" else rows.sum() / shares.sum()


def linear_cross_entropy(x, weight, target, bias=None, class_weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0, grad_scale=None):
    logits = F.linear(_wide(x), _wide(weight), _wide(bias)).flatten(0, -2)
    loss = cross_entropy(logits, target.flatten(), class_weight, ignore_index, reduction, label_smoothing, z_loss)
    return loss.view(target.shape) if reduction == "none" else loss


def scale_gradient(x, scale):
    return x.clone()


_OPS = (linear, convolution, layer_norm, rms_norm, gelu, silu, squared_relu, swiglu, geglu, bias_dropout_add, softmax, rope, cross_entropy, linear_cross_entropy, scale_gradient)


def table():
    """{op: function}, for ExportedProgram.run_decompositions."""
    return {getattr(H, function.__name__).default: function for function in _OPS}
