"""halfstep explain, size and doctor: what they print is what was counted by hand, and wrong arguments give one line."""

import os
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
    done = subprocess.run([sys.executable, "-m", "halfstep", *arguments], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PYTHON})
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


def counted(model, batch, loss, arm="fp32"):
    arm = hs.Arm.parse(arm)
    arm.apply(model)
    return Look(arm, hs.Job(model, arm.optimizer(torch.optim.SGD, model.named_parameters(), lr=0.1), [batch], loss, lambda m: {"accuracy": 0.0})).flops()


@pytest.mark.parametrize("arm", ["fp32", "mixed"])
def test_halfsteps_layers_are_counted_as_torchs(arm):
    class Heads(nn.Module):
        def forward(self, x):
            q = x.flatten(2).unflatten(1, (2, 4))
            return nn.functional.scaled_dot_product_attention(q, q, q).flatten(1)

    make = lambda: nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, stride=2), Heads(), nn.Linear(8 * 144, 20))
    batch, loss = torch.randn(2, 3, 8, 8), lambda m, b: m(b).float().sum()
    stock, ours = make(), make()
    assert len(hs.swap_layers_(ours).swapped) == 3
    assert counted(stock, batch, loss, arm) == counted(ours, batch, loss, arm)


def test_a_linear_layer_with_its_loss_is_counted_by_its_products():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(6, 16), hs.nn.LinearCrossEntropyLoss(16, 50)

        def forward(self, x, y):
            return self.head(self.first(x), y)

    one, first = 2 * 32 * 16 * 50, 2 * 32 * 6 * 16
    found = counted(Net(), (torch.randn(32, 6), torch.randint(50, (32,))), lambda m, b: m(*b))
    assert found == {"FP32": (first + 3 * one, first)}  # the logits and both gradients in the forward


def test_the_ledger_is_the_sum_of_distinct_storages():
    found = look("mixed")
    count16, count32 = 64 * 128 + 128 + 128 * 10 + 10, 2 * 128
    assert found.ledger["weights"] == 2 * count16 + 4 * count32 and found.ledger["gradients"] == found.ledger["weights"]
    assert found.ledger["masters"] == 2 * count16 and found.ledger["states"] >= 8 * (count16 + count32)
    assert found.activations >= 2 * 32 * (64 + 128)
    text = found.size()
    assert "9,866 parameters, arm mixed" in text and "activations of a batch" in text and "FP16: " in text


GROWTH = """
import re, sys, torch
import halfstep as hs
from halfstep._ledger import ledger

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024

def train(width, layers):
    model = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(layers)])
    if {cast}:
        hs.cast_model(model)
    opt, scaler = hs.optim.AdamW(model.named_parameters(), {options}), hs.GradScaler("cpu")
    with hs.autocast("cpu"):
        loss = model(torch.randn(4, width)).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(opt)
    scaler.update()
    return model, opt

train(8, 2)  # what a first use brings with it
before = resident()
model, opt = train(1600, 18)
if not {cast}:
    hs._library._C.release_freed_memory()  # the 16-bit copies of the weights that autocast made, which glibc keeps
print(resident() - before, sum(ledger(model, [opt]).values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
@pytest.mark.parametrize("cast, options", [(True, ""), (True, "master='fp32'"), (True, "states='bf16'"), (False, "")])
def test_the_process_grows_by_what_the_ledger_says(cast, options):
    """At 400 MB and more, within 5 %: what was freed while the model was cast and the optimizer made has gone back to the system."""
    done = subprocess.run([sys.executable, "-c", GROWTH.replace("{cast}", str(cast)).replace("{options}", options)], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": PYTHON})
    grown, held = map(int, done.stdout.split())
    assert held > 400e6 and abs(grown - held) < 0.05 * held, (grown, held)


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
