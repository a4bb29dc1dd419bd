"""Cross entropy, and a linear layer with its cross entropy, beside what a user writes in torch."""

import torch
import torch.nn.functional as F

import halfstep as hs
from layers import Case


def logits(rows, classes):
    return lambda dtype: [torch.randn(rows, classes).to(dtype).requires_grad_(), torch.randint(0, classes, (rows,))]


def head(rows, features, classes):
    def inputs(dtype):
        x, weight = torch.randn(rows, features), torch.randn(classes, features) * features**-0.5
        return [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.randint(0, classes, (rows,))]

    return inputs


HINT = torch.tensor(1024.0)  # the gradient that benchmarks/layers.py sends
SIZES = [(2048, 8192), (512, 50257)]
HEADS = [(2048, 256, 8192), (1024, 768, 50257)]
CASES = [Case(f"cross entropy {n} x {v}", logits(n, v), hs.functional.cross_entropy, F.cross_entropy) for n, v in SIZES]
CASES += [Case(f"cross entropy {n} x {v}, grad_scale", logits(n, v), lambda x, t: hs.functional.cross_entropy(x, t, grad_scale=HINT), F.cross_entropy) for n, v in SIZES]
CASES += [Case(f"linear + cross entropy {n} x {h} to {v}", head(n, h, v), hs.functional.linear_cross_entropy,
               lambda x, w, t: F.cross_entropy(F.linear(x, w), t)) for n, h, v in HEADS]
