"""The main job, small: mixed precision learns what FP32 learns, and the C++ program gives the same bits."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job():
    spec = importlib.util.spec_from_file_location("train_digits", ROOT / "examples/python/train_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_job_writes_its_report(tmp_path):
    subprocess.run([sys.executable, ROOT / "examples/python/train_digits.py", "--device", "cpu", "--seeds", "2", "--epochs", "12", "--lesson-seeds", "1",
                    "--lesson-steps", "800", "--out", tmp_path], check=True, capture_output=True)
    report = json.loads((tmp_path / "digits.json").read_text())
    fp32, mixed = report["arms"]["fp32"], report["arms"]["mixed"]
    assert min(fp32["accuracy"] + mixed["accuracy"]) >= 94
    assert abs(sum(mixed["accuracy"]) - sum(fp32["accuracy"])) / 2 <= 1.5
    assert mixed["bytes_per_param"] == pytest.approx([14.0, 14.0], abs=0.01) and fp32["bytes_per_param"] == pytest.approx([16.0, 16.0], abs=0.01)
    assert report["sigmoid"]["S=1"][0] <= 20 < 70 <= report["sigmoid"]["dynamic"][0]
    assert (tmp_path / "digits.png").stat().st_size > 1000


def test_cpp_program_gives_the_same_bits_after_50_steps(job, tmp_path):
    programs = sorted(ROOT.glob("build*/examples/cpp/train_digits"), key=lambda p: p.stat().st_mtime)
    if not programs:
        pytest.skip("examples/cpp is not built")
    import halfstep as hs

    data = job.digits("cpu")
    job.dump(tmp_path / "digits.pt", 0, data, 50)
    done = subprocess.run([programs[-1], tmp_path / "digits.pt", tmp_path / "weights.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arm, losses = job.train("mixed", 0, data, "cpu", 10, lambda: None, max_steps=50)
    ours = hs.export_state_dict(arm.model, arm.optimizer)
    theirs = dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert len(losses) == 50 and set(ours) == set(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), f"{name} differs in {int((value != theirs[name]).sum())} of {value.numel()} elements"
