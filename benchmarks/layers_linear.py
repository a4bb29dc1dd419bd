"""Linear with its activation, and MLP, at the sizes of a small transformer."""

import torch
from layers import Case

import halfstep as hs

F = torch.nn.functional


def operands(rows, *widths):
    """x and, for each step from a width to the next, weight and bias; all are differentiated."""
    def inputs(dtype):
        tensors = [torch.randn(rows, widths[0])]
        for k, n in zip(widths, widths[1:]):
            tensors += [torch.randn(n, k) / k**0.5, torch.randn(n)]
        return [t.to(dtype).requires_grad_() for t in tensors]
    return inputs


def ours(activation):
    return lambda x, w, b: hs.functional.linear(x, w, b, activation)


def mlp(x, w1, b1, w2, b2):
    return hs.functional.linear(hs.functional.linear(x, w1, b1, "gelu"), w2, b2)


CASES = []
for rows, narrow, broad in ((2048, 256, 1024), (2048, 768, 3072)):
    for k, n in ((narrow, broad), (broad, narrow)):
        size = f"{rows}x{k} -> {n}"
        CASES += [Case(f"linear {size}", operands(rows, k, n), ours(None), F.linear),
                  Case(f"linear + relu {size}", operands(rows, k, n), ours("relu"), lambda x, w, b: F.relu(F.linear(x, w, b))),
                  Case(f"linear + gelu {size}", operands(rows, k, n), ours("gelu"), lambda x, w, b: F.gelu(F.linear(x, w, b)))]
    CASES.append(Case(f"MLP {rows}x{narrow} -> {broad} -> {narrow}", operands(rows, narrow, broad, narrow), mlp,
                      lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)))
