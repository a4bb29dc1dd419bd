"""The main job, small: mixed precision learns what FP32 learns, and the C++ program gives the same bits."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--device", "cpu", "--seeds", "2", "--epochs", "12", "--lesson-seeds", "1", "--lesson-steps", "800"]
# Waiting threads sleep: where other work shares the cores, threads that spin make a run ten times as long.
SLEEPY = dict(os.environ, OMP_WAIT_POLICY="passive", OMP_NUM_THREADS=str(torch.get_num_threads()))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job():
    spec = importlib.util.spec_from_file_location("train_digits", ROOT / "examples/python/train_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_python(*arguments):
    return subprocess.run([sys.executable, ROOT / "examples/python/train_digits.py", *arguments], capture_output=True, text=True, env=SLEEPY)


@pytest.fixture(scope="module")
def run_cpp():
    programs = sorted(ROOT.glob("build*/examples/cpp/train_digits"), key=lambda p: p.stat().st_mtime)
    if not programs:
        pytest.skip("examples/cpp is not built")
    return lambda *arguments: subprocess.run([programs[-1], *arguments], capture_output=True, text=True, env=SLEEPY)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("python")
    done = run_python(*SMALL, "--out", out)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "digits.json").read_text()), done.stdout, out


def test_job_learns_and_writes_its_report(report):
    values, text, out = report
    fp32, mixed = values["arms"]["fp32"], values["arms"]["mixed"]
    assert values["seeds"] == [0, 1] and values["device"] == "cpu" and values["versions"]["torch"] == torch.__version__
    assert min(fp32["accuracy"] + mixed["accuracy"]) >= 94
    assert abs(sum(mixed["accuracy"]) - sum(fp32["accuracy"])) / 2 <= 1.5
    assert mixed["bytes_per_param"] == pytest.approx([14.0, 14.0], abs=0.01) and fp32["bytes_per_param"] == pytest.approx([16.0, 16.0], abs=0.01)
    assert values["sigmoid"]["S=1"][0] <= 20 < 70 <= values["sigmoid"]["dynamic"][0]
    assert (out / "digits.png").stat().st_size > 1000
    assert "mixed - fp32, paired:" in text and f"{sum(mixed['accuracy']) / 2:.2f} ±" in text


def test_data_file_is_what_scikit_learn_ships():
    from sklearn.datasets import load_digits

    table = numpy.loadtxt(ROOT / "examples/data/digits.csv", delimiter=",", dtype=numpy.int64)
    data = load_digits()
    assert table.shape == (1797, 65)
    assert numpy.array_equal(table[:, :64], data.data) and numpy.array_equal(table[:, 64], data.target)


def test_cpp_job_gives_the_numbers_of_the_python_job(report, run_cpp, tmp_path):
    python = report[0]
    done = run_cpp(*SMALL, "--out", tmp_path / "made" / "out")
    assert done.returncode == 0, done.stderr
    assert "] 96/96 " in done.stderr.splitlines()[-1]  # 2 arms of 2 seeds of 12 epochs, and 3 lessons of 16 ticks
    cpp = json.loads((tmp_path / "made" / "out" / "digits_cpp.json").read_text())
    assert cpp.keys() == python.keys() and cpp["arms"].keys() == python["arms"].keys() and cpp["sigmoid"].keys() == python["sigmoid"].keys()
    for name, arm in cpp["arms"].items():
        assert arm.keys() == python["arms"][name].keys() and {len(values) for values in arm.values()} == {2}
        assert min(arm["step_ms"]) > 0
    for key in ("accuracy", "bytes_per_param", "final_scale", "skipped"):
        assert cpp["arms"]["mixed"][key] == python["arms"]["mixed"][key], key
    assert cpp["seeds"] == python["seeds"] and cpp["device"] == "cpu"
    assert cpp["versions"]["halfstep"] == python["versions"]["halfstep"] and cpp["versions"]["torch"] == python["versions"]["torch"].split("+")[0]
    # The FP32 arms run torch's own optimizers, which round differently in the two languages.
    assert cpp["arms"]["fp32"]["accuracy"] == pytest.approx(python["arms"]["fp32"]["accuracy"], abs=1.5)
    assert cpp["arms"]["fp32"]["bytes_per_param"] == [16.0, 16.0]
    for name in ("S=1", "dynamic"):
        assert cpp["sigmoid"][name] == python["sigmoid"][name], name
    assert cpp["sigmoid"]["fp32"] == pytest.approx(python["sigmoid"]["fp32"], abs=10)
    heads = [[line.split() for line in text.splitlines() if line.startswith(("mixed", "S=1", "dynamic"))] for text in (done.stdout, report[1])]
    assert heads[0][0][:4] == heads[1][0][:4] and heads[0][2:] == heads[1][2:]  # accuracy columns, then the lesson


@pytest.mark.parametrize("seed, steps", [(0, 0), (3, 0), (0, 50), (1, 50)])
def test_cpp_weights_are_the_same_bits(job, run_cpp, tmp_path, seed, steps):
    import halfstep as hs

    done = run_cpp("--device", "cpu", "--save-weights", tmp_path / "weights.pt", "--save-steps", str(steps), "--save-seed", str(seed))
    assert done.returncode == 0, done.stderr
    if steps:
        arm, losses = job.train("mixed", seed, job.digits("cpu"), "cpu", 10, lambda: None, max_steps=steps)
        assert len(losses) == steps
    else:
        torch.manual_seed(seed)
        arm = job.Arm("mixed", job.conv_net(), "cpu")
    ours = hs.export_state_dict(arm.model, arm.optimizer)
    theirs = dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert theirs[name].dtype == torch.float32
        assert torch.equal(value.view(torch.int32), theirs[name].view(torch.int32)), f"{name} differs in {int((value != theirs[name]).sum())} of {value.numel()} elements"


LINE = ",".join(["0"] * 65)


@pytest.mark.parametrize("arguments, text", [
    (["--device", "gpu"], "--device is 'gpu'; expected auto, cpu or cuda"),
    (["--data", "{tmp}/nowhere.csv"], "cannot read {tmp}/nowhere.csv"),
    (["--data", "{tmp}/short.csv"], "{tmp}/short.csv has 2 lines; expected more than 1400"),
    (["--data", "{tmp}/wide.csv"], "{tmp}/wide.csv, line 2: expected 64 pixels and a digit"),
    (["--data", "{tmp}/narrow.csv"], "{tmp}/narrow.csv, line 1: expected 64 pixels and a digit"),
    (["--data", "{tmp}/bright.csv"], "{tmp}/bright.csv, line 2: field 3 is '17'; expected 0 to 16"),
    (["--data", "{tmp}/label.csv"], "{tmp}/label.csv, line 1: field 65 is '10'; expected 0 to 9"),
    (["--seeds", "0"], "--seeds is '0'; expected a whole number from 1"),
    (["--epochs=ten"], "--epochs is 'ten'; expected a whole number from 1"),
    (["--lesson-steps"], "--lesson-steps needs a value"),
    (["--sseds", "2"], "unknown argument '--sseds'"),
    (["--out", "{tmp}/short.csv"], "--out {tmp}/short.csv is not a folder"),
    (["--save-weights", "{tmp}/nowhere/w.pt", "--save-steps", "0"], "cannot write {tmp}/nowhere/w.pt"),
])
def test_cpp_job_refuses_in_one_line(run_cpp, tmp_path, arguments, text):
    files = {"short": [LINE] * 2, "wide": [LINE, LINE + ",0"], "narrow": [LINE[:-2]], "bright": [LINE, "0,0,17" + LINE[5:]], "label": [LINE[:-1] + "10"]}
    for name, lines in files.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    done = run_cpp(*[a.format(tmp=tmp_path) for a in arguments])
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("train_digits: " + text.format(tmp=tmp_path)) and done.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_both_jobs_refuse_an_absent_gpu(run_cpp):
    import halfstep as hs

    done = run_cpp("--device", "cuda")
    assert done.returncode == 1 and done.stderr.startswith("train_digits: --device cuda: halfstep's CUDA side is no") and done.stderr.count("\n") == 1
    done = run_python("--device", "cuda")
    assert done.returncode == 2 and f"error: --device cuda: halfstep's CUDA side is {hs.cuda_status()}" in done.stderr


@pytest.mark.parametrize("arguments, text", [
    (["--device", "gpu"], "argument --device: invalid choice: 'gpu'"),
    (["--seeds", "0"], "argument --seeds: '0' is not a whole number from 1"),
    (["--out", __file__], f"--out {__file__}: "),
])
def test_python_job_names_a_wrong_argument(arguments, text):
    done = run_python(*arguments)
    assert done.returncode == 2 and done.stdout == "" and text in done.stderr.splitlines()[-1]
