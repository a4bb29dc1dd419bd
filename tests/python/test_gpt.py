"""The GPT of examples/python/train_gpt.py: FP16 with exact masters follows FP32, its layers are halfstep's, and the C++ program gives the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import halfstep as hs

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples/python"))
import train_gpt  # noqa: E402


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """60,000 characters of the example's text, with some of two, three and four bytes and an end of a line of each kind."""
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    text = train_gpt.load_text(path)[:59_992]
    path.write_bytes(("é€😀\r\nx\ry\n" + text).encode())
    return path


@pytest.fixture(scope="module")
def text(path):
    return train_gpt.Text(train_gpt.load_text(path), context=32)


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


@pytest.fixture(scope="module")
def run_cpp():
    programs = sorted(ROOT.glob("build*/examples/cpp/train_gpt"), key=lambda p: p.stat().st_mtime)
    if not programs:
        pytest.skip("examples/cpp is not built")
    # Waiting threads sleep: where other work shares the cores, threads that spin make a run ten times as long.
    sleepy = dict(os.environ, OMP_WAIT_POLICY="passive", OMP_NUM_THREADS=str(torch.get_num_threads()))
    return lambda *arguments: subprocess.run([programs[-1], *arguments], capture_output=True, text=True, env=sleepy)


def test_the_cpp_program_gives_the_same_bits(text, path, run_cpp, tmp_path):
    done = run_cpp("--text", path, "--seeds", "1", "--steps", "12", "--batch", "8", "--context", "32", "--out", tmp_path / "out", "--save-weights", tmp_path / "weights.pt")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "gpt_cpp.json").read_text())
    weights = dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert report["steps"] == 12 and report["versions"]["halfstep"] == hs.__version__
    for arm in ("fp32", "mixed"):
        (run,) = report["arms"][arm]
        model, opt, _, _ = train_gpt.fit(arm, 0, text, steps=12, batch=8, progress=lambda: None)
        ours = hs.export_state_dict(model, opt)
        assert {name.removeprefix(f"{arm}.") for name in weights if name.startswith(arm)} == set(ours)
        for name, value in ours.items():
            theirs = weights[f"{arm}.{name}"]
            assert theirs.dtype == torch.float32 and torch.equal(value.view(torch.int32), theirs.view(torch.int32)), f"{arm}: {name} differs in {int((value != theirs).sum())} of {value.numel()} elements"
        with hs.autocast("cpu", enabled=arm == "mixed"):
            assert run["bits"] == text.bits(model)
        assert run["bits"] < 6.5 and run["skipped"] == 0 and run["step_ms"] > 0
    assert report["difference"] == [report["arms"]["mixed"][0]["bits"] - report["arms"]["fp32"][0]["bits"]] and abs(report["difference"][0]) < 0.02
    assert f"mixed - fp32, paired: {report['difference'][0]:+.4f} bits" in done.stdout and "] 24/24 " in done.stderr


@pytest.mark.parametrize("arguments, message", [
    (["--text", "{tmp}/nowhere.txt"], "cannot read {tmp}/nowhere.txt; --text FILE names a text"),
    (["--text", "{tmp}/short.txt", "--context", "8"], "{tmp}/short.txt has 89 characters; expected at least 90, ten windows of --context 8"),
    (["--text", "{tmp}/latin.txt"], "{tmp}/latin.txt, byte 3: not UTF-8"),
    (["--text", "{tmp}/cut.txt"], "{tmp}/cut.txt, byte 1: not UTF-8"),
    (["--steps", "0"], "--steps is '0'; expected a whole number from 1"),
    (["--stepps", "2"], "unknown argument '--stepps'"),
])
def test_the_cpp_program_refuses_in_one_line(run_cpp, tmp_path, arguments, message):
    for name, content in {"short": b"a" * 89, "latin": b"caf\xe9 au lait", "cut": b"a\xe2\x82"}.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    done = run_cpp(*[a.format(tmp=tmp_path) for a in arguments])
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train_gpt: " + message.format(tmp=tmp_path))
