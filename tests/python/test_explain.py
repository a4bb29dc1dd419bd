"""halfstep explain, size and doctor: what they print is what was counted by hand, and wrong arguments give one line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep import _doctor
from halfstep._explain import Look

PYTHON = str(Path(hs.__file__).resolve().parents[1])
SCRIPT = """
import torch, halfstep as hs
from torch import nn
def make(arm, seed):
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 10))
    arm.apply(model)
    opt = arm.optimizer(torch.optim.AdamW, model.named_parameters())
    batch = (torch.randn(32, 64), torch.randint(10, (32,)))
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]).float(), b[1])
    return hs.Job(model, opt, [batch], loss, lambda m: {"accuracy": 0.0})
"""


def look(arm):
    scope = {}
    exec(SCRIPT, scope)
    arm = hs.Arm.parse(arm)
    torch.manual_seed(0)
    return Look(arm, scope["make"](arm, 0))


def command(*arguments):
    done = subprocess.run([sys.executable, "-m", "halfstep", *arguments], capture_output=True, text=True, env={**__import__("os").environ, "PYTHONPATH": PYTHON})
    return done.returncode, done.stdout, done.stderr


def test_layers_say_what_they_store_compute_sum_and_give():
    found = look("mixed").layers
    assert found["0"].stored == {torch.float16} and set(found["0"].flops) == {torch.float16} and found["0"].accumulates == {torch.float32} and found["0"].gives == {torch.float16}
    assert found["1"].stored == {torch.float32} and found["1"].gives == {torch.float16}
    assert found["0"].casts == 1 and found["0"].cast_bytes == 32 * 64 * 6  # the FP32 batch, read and written as FP16
    plain = look("fp32").layers
    assert set(plain["0"].flops) == {torch.float32} and not any(layer.casts for layer in plain.values())


def test_operations_are_those_counted_by_hand():
    forward = 2 * 32 * (64 * 128 + 128 * 10)
    backward = 2 * forward - 2 * 32 * 64 * 128  # no gradient for the batch
    assert look("fp32").flops() == {"FP32": (forward, backward)}
    assert look("mixed").flops()["FP16"] == (forward, backward)


def test_the_ledger_is_the_sum_of_distinct_storages():
    found = look("mixed")
    count16, count32 = 64 * 128 + 128 + 128 * 10 + 10, 2 * 128
    assert found.ledger["weights"] == 2 * count16 + 4 * count32 and found.ledger["gradients"] == found.ledger["weights"]
    assert found.ledger["masters"] == 2 * count16 and found.ledger["states"] >= 8 * (count16 + count32)
    assert found.activations >= 2 * 32 * (64 + 128)
    text = found.size()
    assert "9,866 parameters, arm mixed" in text and "activations of a batch" in text and "FP16: " in text


@pytest.mark.slow
def test_the_commands_print_tables_and_refuse_in_one_line(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    code, out, err = command("explain", f"{script}:make", "--arms", "fp32,mixed")
    assert code == 0 and "arm fp32" in out and "arm mixed" in out and "LayerNorm" in out, err
    code, out, err = command("size", f"{script}:make", "--arms", "mixed")
    assert code == 0 and "held between steps" in out, err
    for arguments, text in ((("size", "none.py:make"), "none.py: no such file"), (("explain", f"{script}:mak"), "has no 'mak'"), (("size", f"{script}:make", "--arms", "fp12"), "'fp12' is no preset")):
        code, out, err = command(*arguments)
        assert code == 1 and text in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err


def test_the_doctor_measures_and_ends_with_a_verdict():
    lines = dict(_doctor.probes())
    assert float(lines["bandwidth"].split()[0]) > 0 and all(name in lines["products"] for name in ("FP32", "FP16", "BF16"))
    assert lines["verdict"].startswith("mixed precision will help here: ") and "because" in lines["verdict"] and lines["energy"]


@pytest.mark.parametrize("gain, word", [(2.0, "yes, because FP16 products run at 2.0 times"), (1.0, "yes for memory"), (0.3, "no, because FP16 products run at 0.3 times")])
def test_the_verdict_follows_the_measurement(gain, word):
    assert word in _doctor.verdict({"FP32": 1.0, "FP16": gain}, "cpu")
