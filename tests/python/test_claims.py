"""The claims of examples/python/claims.py hold for one seed (the loss scale's is tests/python/test_digits.py's)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples/python"))
pytest.importorskip("sklearn")
import claims  # noqa: E402


def arms(run, names):
    data = claims.digits("cpu")
    return {name: run(0, data, name, lambda: None) for name in names}


@pytest.mark.slow
def test_ada_loss_trains_where_one_fixed_scale_does_not():
    assert arms(claims.scale, ("Ada-Loss, S = 1",))["Ada-Loss, S = 1"] > 80  # S = 1 alone: chance


def test_updates_need_an_exact_weight():
    loss = arms(claims.master, ("FP32", "none", "split16"))
    assert loss["none"] > loss["FP32"] + 0.01  # most of its updates round to nothing
    assert abs(loss["split16"] - loss["FP32"]) < 1e-3


def test_sums_need_fp32():
    error = arms(claims.accumulation, ("FP32", "summed in FP16", "summed in FP32"))
    assert error["summed in FP16"] > 1e-3
    assert error["summed in FP32"] < 1e-6 and error["FP32"] < 1e-6
