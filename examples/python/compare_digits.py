"""The digits jobs of train_digits.py for `halfstep compare`.

    halfstep compare examples/python/compare_digits.py:make --seeds 8 --arms fp32,mixed --delta 1.0pp --out r/
    halfstep compare examples/python/compare_digits.py:sigmoid --seeds 3 --arms fp32,fp16-s1,mixed --delta 1.0pp --out s/

make: the convolutional net, on which mixed precision is as good as FP32. sigmoid: seven sigmoid layers, which FP16 without a loss
scale cannot train, since the gradients of the first layers vanish. docs/compare.md shows what both say.
"""

import torch
from torch import nn

import halfstep as hs
from train_digits import conv_net, digits, sigmoid_net


def job(arm, seed, model, name, batch, epochs, **kw):
    x, y, test_x, test_y = digits(arm.device)
    model = arm.apply(model.to(arm.device))
    optimizer = arm.optimizer(name, model.named_parameters(), **kw)

    def batches(epoch):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for rows in order.split(batch):
            yield x[rows.to(arm.device)], y[rows.to(arm.device)]

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

    def evaluate(model):
        correct = model(test_x).argmax(1) == test_y
        return {"accuracy": correct.float().mean().item(), "correct": correct, "labels": test_y}

    return hs.Job(model, optimizer, batches, loss, evaluate, epochs=epochs, predict=lambda model: model(test_x))


def make(arm, seed):
    """30 epochs of batches of 100."""
    return job(arm, seed, conv_net(), "AdamW", 100, 30, lr=2e-3, weight_decay=1e-2)


def sigmoid(arm, seed):
    """800 steps of the whole training set."""
    return job(arm, seed, sigmoid_net(), "Adam", 1400, 800, lr=5e-3)
