"""A training job for `halfstep compare`, on real data: scikit-learn's handwritten digits.

    halfstep compare train.py:make --seeds 8 --arms fp32,mixed --delta 0.5pp --out r/

trains make() with every seed in FP32 and in mixed precision, each in a process of its own, and writes r/report.html.
Put your model, data and loss where the digits are; what must stay is said beside it.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import halfstep as hs


def make(arm, seed):
    """One training run. torch, numpy and random are seeded with `seed` before the call."""
    data = load_digits()  # 1,797 images of 8 x 8
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))  # the same split for every seed
    x = (torch.tensor(data.images, dtype=torch.float32)[order] / 16).to(arm.device)
    y = torch.tensor(data.target)[order].to(arm.device)
    train_x, train_y, test_x, test_y = x[:1400], y[:1400], x[1400:], y[1400:]

    # The model in FP32 first, its weights from the seed only; then arm.apply puts it into the arm's precision.
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).to(arm.device)
    arm.apply(model)

    # The optimizer by way of the arm: torch's in FP32, halfstep's with exact masters in 16 bits. named_parameters() gives names to the report.
    optimizer = arm.optimizer(torch.optim.AdamW, model.named_parameters(), lr=2e-3, weight_decay=1e-2)

    # Called once an epoch; the order must depend on the seed and the epoch only, so that the arms see the same batches.
    def batches(epoch):
        order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for rows in order.split(100):
            yield train_x[rows], train_y[rows]

    # Runs inside arm.autocast(). Losses belong in FP32.
    def loss(model, batch):
        images, labels = batch
        return nn.functional.cross_entropy(model(images).float(), labels)

    # Logits of the test set: how far FP16 and FP32 are from FP64. Optional.
    def predict(model):
        return model(test_x)

    # The first number is what the arms are compared by. "correct" (0 or 1 an item) and "labels" are optional: they add tests by item and class.
    def evaluate(model):
        correct = predict(model).argmax(1) == test_y
        return {"accuracy": correct.float().mean().item(), "correct": correct, "labels": test_y}

    return hs.Job(model, optimizer, batches, loss, evaluate, epochs=20, predict=predict)
