"""The GPT of examples/python/train_gpt.py: FP16 with exact masters follows FP32, and its layers are halfstep's."""

import sys
from pathlib import Path

import pytest
import torch

import halfstep as hs

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples/python"))
import train_gpt  # noqa: E402


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return train_gpt.Text(train_gpt.load_text(tmp_path_factory.mktemp("text") / "topics.txt")[:60_000], context=32)


def test_mixed_follows_fp32(text):
    runs = {arm: train_gpt.train(arm, 0, text, steps=12, batch=8, progress=lambda: None) for arm in ("fp32", "mixed")}
    assert runs["mixed"]["skipped"] == 0 and abs(runs["mixed"]["bits"] - runs["fp32"]["bits"]) < 0.02
    assert runs["fp32"]["bits"] < 6.5  # 7 bits a character before it learned anything


def test_the_held_out_text_is_not_trained_on_and_batches_depend_on_the_seed_only(text):
    assert len(text.train) + len(text.held_out) == 60_000 and len(text.held_out) == 6_000
    first, again, other = (next(text.batches(seed, 4, 1)) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert torch.equal(first[0][:, 1:], first[1][:, :-1])


def test_the_layers_are_halfsteps():
    model = train_gpt.GPT(50, layers=1, width=32, heads=2, context=16)
    assert not hs.swap_layers_(model).swapped and model.loss.weight is model.embedding.weight
