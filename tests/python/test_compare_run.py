"""hs.compare end to end: what a run measures, processes that fail or were there already, and what the command line says."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep import _compare, _compare_cli, _job, _report, _schema, _worker, cli
from test_compare_tensorboard import scalars

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = '''
import torch
from torch import nn
import halfstep as hs

X = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()

def make(arm, seed):
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    arm.apply(model)
    optimizer = arm.optimizer("AdamW", model.named_parameters(), lr=1e-2)
    def batches(epoch):
        for rows in torch.randperm(80, generator=torch.Generator().manual_seed(seed + epoch)).split(20):
            yield X[rows], Y[rows]
    def evaluate(model):
        correct = model(X).argmax(1) == Y
        return {"accuracy": correct.float().mean().item(), "correct": correct, "labels": Y}
    return hs.Job(model, optimizer, batches, lambda m, b: nn.functional.cross_entropy(m(b[0]).float(), b[1]), evaluate, epochs=8, predict=lambda m: m(X))
'''


def write(folder, text=SCRIPT, name="job.py"):
    (folder / name).write_text(text)
    return folder / name


def measured(path, arm="mixed", seed=0, every=10, look=True, name="make"):
    """A run in this process."""
    arm = hs.Arm.parse(arm)
    spec = {"file": str(path), "make": name, "arm": {"name": arm.name, **arm.options()}, "seed": seed, "device": "cpu", "every": every, "look": look, "trace": str(path.with_suffix(".trace"))}
    kept = list(sys.path)
    try:
        return _worker.measure(spec, lambda done, total: None)
    finally:
        sys.path[:] = kept
        sys.modules.pop(path.stem, None)


def command(*words):
    """(status, output, errors) of the command line."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = cli.main([str(w) for w in words])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), errors.getvalue()


def test_what_a_run_measures(tmp_path):
    run = measured(write(tmp_path))
    json.dumps(run, allow_nan=False)
    assert run["steps"] == 32 and run["examples"] == 640 and run["metric"] == "accuracy" and len(run["correct"]) == 80 and run["metrics"]["accuracy"] == pytest.approx(run["correct"].count("1") / 80)
    time = run["time"]
    assert time["timed_steps"] == 32 - 5 - 3 and all(time[p]["q1"] <= time[p]["median"] <= time[p]["q3"] for p in ("data", "forward", "backward", "check", "optimizer", "step"))
    # The phases are most of a step and no more than it; other work on the machine stretches either.
    phases = ("forward", "backward", "check", "optimizer")
    assert time["check"]["median"] > 0 and sum(time[p]["q1"] for p in phases) < 1.5 * time["step"]["q3"] and sum(time[p]["q3"] for p in phases) > 0.2 * time["step"]["q1"]
    assert run["memory"]["peak_bytes"] >= run["memory"]["before_bytes"] > 0 and run["memory"]["cuda_peak_bytes"] is None
    n = sum(p.numel() for p in nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 2)).parameters())
    assert [run["ledger"][r] for r in ("weights", "gradients", "masters")] == [2 * n] * 3 and 8 * n <= run["ledger"]["states"] <= 8 * n + 64
    assert run["energy"]["joules"] is None and run["energy"]["reason"] or run["energy"]["method"]
    scale = run["scale"]
    assert scale["steps"] == 32 and scale["points"][0] == [1, 2.0**16] and scale["longest"] == 0 and scale["skipped"] == []
    assert [s["step"] for s in run["shares"]["samples"]] == [10, 20, 30] and {t["kind"] for t in run["shares"]["tensors"]} == {"weight", "activation", "activation gradient", "weight gradient"}
    matrix = run["matrix"]
    assert matrix["float64"]["max_error"] == 0 < matrix["float32"]["max_error"] < 1e-4 < matrix["float16"]["max_error"] < 1e-1


@pytest.mark.parametrize("text", ["fp32:qat=w8a8", "mixed:qat=w4", "autocast:qat=w8"])
def test_a_run_with_quantized_layers(tmp_path, text):
    path = write(tmp_path)
    plain, run = (measured(path, arm) for arm in (text.partition(":")[0], text))
    json.dumps(run, allow_nan=False)
    assert run["weights_fingerprint"] == plain["weights_fingerprint"] and run["data_fingerprint"] == plain["data_fingerprint"]
    assert run["losses"] != plain["losses"] and run["metrics"]["accuracy"] > 0.7
    assert {t["kind"] for t in (run["shares"] or {"tensors": []})["tensors"]} == {t["kind"] for t in (plain["shares"] or {"tensors": []})["tensors"]}
    assert 0 <= run["matrix"]["float32"]["max_error"] < 0.1 and run["ledger"] == plain["ledger"]


def test_looking_changes_no_weight(tmp_path):
    path = write(tmp_path)
    a, b = measured(path, look=True), measured(path, look=False)
    assert [at for at, _ in b["losses"]] == [10, 20, 30] and [loss for at, loss in a["losses"] if at % 10 == 0] == [loss for _, loss in b["losses"]]
    assert (a["correct"], a["final_scale"], a["data_fingerprint"]) == (b["correct"], b["final_scale"], b["data_fingerprint"]) and b["shares"] is None and b["scale"] is None


def test_arms_of_one_seed_see_the_same_weights_and_data(tmp_path):
    path = write(tmp_path)
    runs = [measured(path, arm, seed, look=False) for arm in ("fp32", "mixed", "bf16") for seed in (0, 1)]
    for key in ("weights_fingerprint", "data_fingerprint"):
        values = [run[key] for run in runs]
        assert values == values[:2] * 3 and values[0] != values[1], key
    assert [run["optimizers"] for run in runs[::2]] == [["torch AdamW"], ["halfstep AdamW"], ["halfstep AdamW"]]


@pytest.mark.filterwarnings("ignore:20 steps in a row were skipped")
def test_scale_steps_and_skips_come_from_the_trace(tmp_path):
    run = measured(write(tmp_path), "mixed:policy=dynamic(init_scale=1.7014118346046923e+38,backoff_factor=0.0625)")
    scale = run["scale"]
    assert run["skipped"] == len(scale["skipped"]) >= 10 and scale["skipped"][:3] == [1, 2, 3] and scale["longest"] >= 10
    assert [value for _, value in scale["points"][:3]] == [2.0**127, 2.0**123, 2.0**119]


@pytest.mark.parametrize("text, message", [
    ("nope", "arm 'nope': 'nope' is no preset; expected one of fp32, mixed"), ("mixed:mastr=fp32", "'mastr=fp32' is no option; expected key=value with one of"),
    ("mixed:master=fp31", "master is 'fp31'; expected one of auto, fp32"), ("mixed:policy=statik(scale=1)", "policy preset 'statik' is unknown"),
    ("mixed:policy=static(scale", "policy is 'static(scale'; expected a name, or name(key=value,…)"), ("mixed:policy=recorded", "for replays only"),
    ("mixed:qat=int8", "qat is 'int8'; expected one of w8, w8a8, w4"), ("fp32:compute=fp8", "compute is 'fp8'"),
    ("bf16:policy=static(scale=8)", "policy is static(scale=8), but only FP16 losses are scaled and compute is bf16"),
])
def test_an_arm_that_cannot_be_is_refused_by_name(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        hs.Arm.parse(text)


def test_arms_by_text():
    arms = _job.parse_arms("fp32,mixed:master=fp32,states=bf16,autocast:policy=static(scale=1024,),name=fixed,fp16-s1,bf16")
    assert [a.name for a in arms] == ["fp32", "mixed:master=fp32,states=bf16", "fixed", "fp16-s1", "bf16"]
    assert (arms[1].master, arms[1].states, arms[2].weights, arms[2].policy) == ("fp32", "bf16", "autocast", "static(scale=1024,)")
    assert arms[3].scaler().policy == hs.policies.Static(1.0) and not arms[0].scaler().is_enabled() and not arms[4].scaler().is_enabled()
    with pytest.raises(ValueError, match="'mixed' is there twice"):
        _job.parse_arms("mixed,mixed")
    with pytest.raises(ValueError, match="'a=b' belongs to no arm"):
        _job.parse_arms("a=b")


def test_optimizers_of_arms():
    params = lambda: list(nn.Linear(2, 2).named_parameters())
    fp32, mixed = hs.Arm.parse("fp32"), hs.Arm.parse("mixed:master=fp32,states=bf16")
    assert type(fp32.optimizer(torch.optim.SGD, params(), lr=0.1)) is torch.optim.SGD
    assert type(fp32.optimizer("AdamW", params(), max_grad_norm=1.0)) is hs.optim.AdamW  # torch's takes no max_grad_norm
    assert type(fp32.optimizer(hs.optim.Lion, params())) is hs.optim.Lion and type(fp32.optimizer(hs.optim.AdamW, params())) is torch.optim.AdamW
    model = mixed.apply(nn.Linear(2, 2))
    made = mixed.optimizer(torch.optim.AdamW, model.named_parameters())
    assert type(made) is hs.optim.AdamW and made.defaults["master"] == "fp32" and made.defaults["states"] == "bf16" and model.weight.dtype == torch.float16
    wide = hs.Arm.parse("mixed:master=fp64")
    other = wide.optimizer(torch.optim.RMSprop, wide.apply(nn.Linear(2, 2)).named_parameters(), lr=0.1)
    assert isinstance(other, hs.optim.Masters) and all(p.dtype == torch.float64 for p in other.master_params())
    with pytest.raises(ValueError, match="states=bf16 is for classes of hs.optim, and RMSprop is none of them"):
        mixed.optimizer(torch.optim.RMSprop, mixed.apply(nn.Linear(2, 2)).named_parameters())
    # What an arm asks for is never left out.
    asked = hs.Arm.parse("fp32:states=int8,master=fp64").optimizer("AdamW", params())
    assert type(asked) is hs.optim.AdamW and asked.defaults["states"] == "int8" and asked.defaults["master"] == "fp64"
    with pytest.raises(ValueError, match="optimizer=torch, but torch's AdamW knows no states"):
        hs.Arm.parse("fp32:states=int8,optimizer=torch").optimizer("AdamW", params())
    with pytest.raises(ValueError, match="'Nope' is neither in torch.optim nor in halfstep.optim"):
        fp32.optimizer("Nope", params())
    with pytest.raises(ValueError, match="optimizer=torch, but torch's AdamW cannot step 16-bit weights"):
        hs.Arm.parse("mixed:optimizer=torch").optimizer("AdamW", params())
    with pytest.raises(ValueError, match="keep_fp32 keeps weights of a cast model"):
        hs.Arm.parse("autocast:keep_fp32=0").apply(nn.Linear(2, 2))


@pytest.mark.parametrize("change, message", [
    (dict(model=1), "Job: model is int"), (dict(loss=1), "Job: loss is int"), (dict(epochs=0), "Job: epochs is 0"), (dict(better="up"), "Job: better is 'up'"),
    (dict(batches=iter([1]), epochs=2), "batches is an iterator, which is empty after the first of 2 epochs"),
])
def test_a_job_that_cannot_be_is_refused_by_name(change, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        hs.Job(**{"model": nn.Linear(1, 1), "optimizer": None, "batches": [], "loss": len, "evaluate": len, **change})


# -- processes -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Three arms of two seeds, of which one fails; then the same again."""
    folder = tmp_path_factory.mktemp("compare")
    text = SCRIPT.replace("    optimizer = ", "    if arm.name == 'broken':\n        raise RuntimeError('the data is gone')\n    optimizer = ")
    write(folder, text)
    words = ("compare", f"{folder / 'job.py'}:make", "--seeds", "2", "--arms", "fp32,mixed,bf16:name=broken", "--delta", "0.1pp", "--every", "10", "--out", folder / "r")
    first = command(*words)
    before = {p: p.stat().st_mtime_ns for p in (folder / "r/runs").glob("*.json")}
    report = json.loads((folder / "r/report.json").read_text())
    again = command(*words)
    return folder, first, report, again, before


def test_the_others_go_on_when_an_arm_fails(compared):
    folder, (status, out, errors), report, _, _ = compared
    assert status == 1 and "Traceback" not in out + errors
    assert f"broken failed with seed 0: RuntimeError: the data is gone (log: {folder}/r/runs/" in out
    log = Path(report["arms"][2]["failed"]["log"]).read_text()
    assert "Traceback" in log and log.rstrip().endswith("RuntimeError: the data is gone")
    assert [len(arm["runs"]) for arm in report["arms"]] == [2, 2, 0] and "mixed vs fp32: " in out
    assert "broken, seed 0: failed" in errors and "broken, seed 1" not in errors  # one failure is enough


def test_few_seeds_and_a_small_delta_cannot_tell(compared):
    _, (_, out, _), report, _, _ = compared
    (found,) = report["comparisons"]
    assert found["verdict"] == "cannot tell" and found["more"] > 0 and f"run {found['more']} more" in out and report["notes"] == []
    assert _report.exit_status([{"failed": None}], report["comparisons"]) == 3


def test_an_interrupted_compare_goes_on(compared):
    _, _, _, (status, _, errors), before = compared
    assert status == 1 and errors.count("there already") == 4
    for path, then in before.items():
        assert (path.stat().st_mtime_ns == then) == ("broken" not in path.name), path.name  # what failed is tried again


def test_the_files_of_a_comparison(compared):
    folder, _, report, _, _ = compared
    assert _schema.read(folder / "r/report.json")["version"] == 1 and (folder / "r/report.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "r/report.html").read_text()
    assert "<script" not in page and not re.search(r"(src|href)=|url\(|@import", page) and "cannot tell" in page and "the data is gone" in page
    assert sorted(p.name for p in (folder / "r/events").iterdir()) == ["fp32", "mixed"]
    found = scalars(next((folder / "r/events/mixed").iterdir()))
    tags = {tag for tag, _, _ in found}
    assert {"amp/loss_scale", "train/loss", "eval/accuracy", "amp/underflow_share/0.weight/weight_gradient", "amp/underflow_share/0/activation", "amp/headroom_bits/0.weight"} <= tags
    assert [(s, v) for tag, s, v in found if tag == "eval/accuracy"] == [(r["seed"], pytest.approx(r["metrics"]["accuracy"])) for r in report["arms"][1]["runs"]]
    assert not list(folder.rglob("*.tmp.*")) and not list(folder.rglob("*.spec"))


def test_a_changed_script_is_run_again(compared, tmp_path):
    folder, _, _, _, _ = compared
    from halfstep._compare import _Runs

    earlier = lambda: _Runs(str(folder / "job.py"), "make", "cpu", 10, folder / "r")
    runs = earlier()
    spec = runs._spec(hs.Arm.parse("mixed"), 0, True)
    assert runs._earlier(spec) is not None
    text = (folder / "job.py").read_text()
    try:
        write(folder, text + "\n# changed\n")
        assert earlier()._earlier(earlier()._spec(hs.Arm.parse("mixed"), 0, True)) is None
    finally:
        write(folder, text)
    assert runs._earlier({**spec, "key": "another"}) is None
    Path(spec["result"] + ".x").write_text("{")
    assert runs._earlier({**spec, "result": spec["result"] + ".x"}) is None


def test_a_process_that_dies_without_a_word(tmp_path):
    path = write(tmp_path, SCRIPT.replace("    return hs.Job", "    import os, signal\n    os.kill(os.getpid(), signal.SIGKILL)\n    return hs.Job"))
    with pytest.raises(RuntimeError, match="arm 'fp32', with which the others are compared, failed: the process was killed by signal 9"):
        hs.compare(f"{path}:make", "fp32,mixed", 1, "1pp", tmp_path / "r")


def test_the_bar_on_a_terminal_and_in_a_file():
    from halfstep._progress import Plain

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, expected in ((io.StringIO(), ["1/2 a, seed 0: failed  0 s", "2/2 b, seed 0  0 s"]),
                             (Terminal(), ["[..............................] 0/2 runs  a, seed 0  0 s", "[#######.......................] 0/2 runs  a, seed 0, step 5 of 10  0 s", "[###############...............] 1/2 runs  b, seed 0  0 s", "[###############...............] 1/2 runs  b, seed 0, step 7  0 s"])):
        with Plain(2, stream) as bar:
            bar.begin("a, seed 0"), bar.at(5, 10), bar.end(": failed"), bar.begin("b, seed 0"), bar.at(7, 0), bar.end()
        assert [line for line in re.split(r"[\r\n]+", stream.getvalue().replace("\033[K", "")) if line] == expected


def test_without_the_first_arm_nothing_goes_on(tmp_path, monkeypatch):
    from halfstep import _compare

    started = []

    def run(self, arm, seed, look, bar):
        started.append((arm.name, seed))
        return {"error": {"line": "E", "load": False, "seed": seed, "log": "l"}} if (arm.name, seed) == ("fp32", 1) else {"seed": seed, "metrics": {"accuracy": 0.5}}

    monkeypatch.setattr(_compare._Runs, "run", run)
    found = hs.compare(f"{write(tmp_path)}:make", "fp32,mixed", 4, "1pp", tmp_path / "r")
    assert started == [("fp32", 0), ("mixed", 0), ("fp32", 1)] and found.exit_status == 1 and found.data["comparisons"][0]["n"] == 1


def test_an_interrupt_ends_the_run_and_says_how_to_go_on(tmp_path, monkeypatch):
    from halfstep import _compare

    started = []

    class Child(subprocess.Popen):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            started.append(self)

    def interrupted(read, bar):
        raise KeyboardInterrupt

    monkeypatch.setattr(_compare.subprocess, "Popen", Child)
    monkeypatch.setattr(_compare._Runs, "_listen", staticmethod(interrupted))
    status, out, errors = command("compare", f"{write(tmp_path)}:make", "--out", tmp_path / "r")
    assert status == 130 and out == "" and errors == "halfstep compare: interrupted; the same command goes on from here\n"
    assert started[0].returncode == -9 and not list((tmp_path / "r/runs").glob("*.json"))


def test_a_script_that_compares_when_it_is_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(_worker, "running", True)
    with pytest.raises(_worker.CannotLoad, match="put the call under `if __name__ == \"__main__\":`"):
        measured(write(tmp_path, SCRIPT + "\nhs.compare(make)\n"))


# -- the command line ------------------------------------------------------------------------------
def report_file(folder, name, data):
    (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return folder / name


MINIMAL = {"format": "halfstep-report", "version": 1, "arms": [{"name": "fp32", "runs": [{"seed": s, "metrics": {"accuracy": 0.9 + s / 1000}} for s in range(4)]}]}


@pytest.mark.parametrize("words, message", [
    (["compare"], "halfstep compare: no script; expected script.py:make"),
    (["compare", "nowhere.py:make"], "halfstep compare: make: nowhere.py: no such file"),
    (["compare", "{job}:1x"], "halfstep compare: make: '1x' is no name of a function"),
    (["compare", "{job}:make", "--seeds", "many"], "halfstep compare: --seeds is 'many'"),
    (["compare", "{job}:make", "--seeds", "0"], "halfstep compare: seeds is 0"),
    (["compare", "{job}:make", "--seeds", "1,1"], "halfstep compare: seeds is [1, 1]"),
    (["compare", "{job}:make", "--delta", "half"], "halfstep compare: delta is 'half'"),
    (["compare", "{job}:make", "--delta", "-1"], "halfstep compare: "),
    (["compare", "{job}:make", "--arms", "fp32"], "halfstep compare: arms: there is 1"),
    (["compare", "{job}:make", "--arms", "fp32,nope"], "halfstep compare: arm 'nope'"),
    (["compare", "{job}:make", "--every", "0"], "halfstep compare: every is 0"),
    (["compare", "{job}:make", "--every", "x"], "halfstep compare: argument --every: invalid int value: 'x'"),
    (["compare", "{job}:make", "--device", "tpu"], "halfstep compare: argument --device: invalid choice: 'tpu'"),
    (["compare", "{job}:make", "--out", "{job}"], "halfstep compare: out: {job}: "),
    (["compare", "{job}:make", "--nonsense"], "halfstep: unrecognized arguments: --nonsense"),
    (["compare", "--from", "{nowhere}"], "halfstep compare: {nowhere}: No such file or directory"),
    (["compare", "--from", "{broken}"], "halfstep compare: {broken} is not JSON: "),
    (["compare", "--from", "{other}"], "halfstep compare: {other} is not a halfstep report: 'format' is None"),
    (["compare", "--from", "{newer}"], "halfstep compare: {newer} is a halfstep report of version 9; this halfstep reads version 1"),
    (["compare", "--from", "{seedless}"], "halfstep compare: {seedless}, arms[0] 'a', runs[0] has no 'seed'"),
    (["compare", "--from", "{minimal}"], "halfstep compare: {minimal} holds one arm; expected two or more in all"),
    (["compare", "{job}:make", "--from", "{minimal}"], "halfstep compare: both "),
    (["merge", "{nowhere}"], "halfstep merge: {nowhere}: No such file or directory"),
    (["merge", "{broken}"], "halfstep merge: {broken} is not JSON: "),
    (["merge"], "halfstep merge: the following arguments are required: REPORT"),
    (["init", "{job}"], "halfstep init: {job} is there already; name another file"),
    (["init", "{nowhere}/x.py"], "halfstep init: {nowhere}/x.py: No such file or directory"),
    (["nonsense"], "halfstep: argument command: invalid choice: 'nonsense'"),
    ([], "halfstep: the following arguments are required: command"),
    (["simulate"], "halfstep simulate: the following arguments are required: trace"),
    (["simulate", "{nowhere}"], "halfstep simulate: "),
    (["simulate", "{broken}"], "halfstep simulate: {broken} is not a halfstep trace"),
    (["doctor", "x"], "halfstep: unrecognized arguments: x"),
])
def test_what_is_wrong_is_one_line(tmp_path, words, message):
    names = {"job": write(tmp_path), "nowhere": tmp_path / "nowhere.json", "broken": report_file(tmp_path, "broken.json", '{"format": "halfstep'), "other": report_file(tmp_path, "other.json", {}),
             "newer": report_file(tmp_path, "newer.json", {**MINIMAL, "version": 9}), "minimal": report_file(tmp_path, "minimal.json", MINIMAL),
             "seedless": report_file(tmp_path, "seedless.json", {**MINIMAL, "arms": [{"name": "a", "runs": [{"metrics": {"x": 1}}]}]})}
    status, out, errors = command(*[w.format(**names) for w in words])
    assert status == 1 and out == "" and errors.count("\n") == 1 and errors.startswith(message.format(**names)), errors


@pytest.mark.parametrize("text, name, message", [
    (SCRIPT, "mak", "has no 'mak'"), (SCRIPT, "X", "X is Tensor; expected a function make(arm, seed)"), ("import nothing_of_this_name\n", "make", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    ("def make(:\n", "make", "SyntaxError: invalid syntax"), ("def make(arm, seed):\n    return 1\n", "make", "make() returned int; expected a halfstep.Job"),
    (SCRIPT.replace("arm.apply(model)", "pass"), "make", "make() did not call arm.apply(model)"),
    (SCRIPT.replace("epochs=8", "metric='f1'"), "make", "Job.metric is 'f1', but evaluate() returned accuracy"),
])
def test_a_script_that_cannot_be_used_is_named(tmp_path, text, name, message):
    with pytest.raises(_worker.CannotLoad, match=re.escape(message)):
        measured(write(tmp_path, text), name=name)


def test_a_script_that_cannot_be_used_ends_the_command_with_one_line(tmp_path):
    status, out, errors = command("compare", f"{write(tmp_path)}:mak", "--seeds", "2", "--out", tmp_path / "r")
    last = errors.splitlines()[-1]
    assert status == 1 and out == "" and last == f"halfstep compare: {tmp_path / 'job.py'} has no 'mak'" and "Traceback" not in errors


def test_a_function_that_another_process_cannot_find(tmp_path):
    for make in (lambda arm, seed: None, len, 3):
        with pytest.raises((ValueError, TypeError), match="make"):
            hs.compare(make, out=tmp_path)


def test_a_missing_package_is_one_line_with_the_command(tmp_path, monkeypatch):
    a = report_file(tmp_path, "a.json", MINIMAL)
    b = report_file(tmp_path, "b.json", {**MINIMAL, "arms": [{**MINIMAL["arms"][0], "name": "mixed"}]})
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    for words in (("--from", a, b), (f"{write(tmp_path)}:make",)):  # the second before anything is trained
        status, out, errors = command("compare", *words, "--out", tmp_path / "r")
    assert status == 1 and out == "" and errors.count("\n") == 1 and errors.startswith("halfstep compare: scipy is needed and cannot be imported") and "pip install 'halfstep[report]' or scipy" in errors


def test_init_writes_a_script_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, errors = command("init")
    assert status == 0 and errors == "" and "halfstep compare train.py:make" in out
    text = (tmp_path / "train.py").read_text().replace("epochs=20", "epochs=2")
    run = measured(write(tmp_path, text, "train.py"))
    assert run["steps"] == 28 and run["metrics"]["accuracy"] > 0.5 and len(run["labels"]) == 397


# -- the claims, on real data ----------------------------------------------------------------------
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(Path(hs.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))


def halfstep(*words):
    return subprocess.run([sys.executable, "-m", "halfstep", *map(str, words)], capture_output=True, text=True, env=ENVIRONMENT)


@pytest.mark.slow
def test_mixed_precision_is_equivalent_on_digits(tmp_path):
    shorter = f"import sys\nsys.path.insert(0, {str(ROOT / 'examples/python')!r})\nfrom compare_digits import conv_net, job\n\ndef make(arm, seed):\n" \
        "    return job(arm, seed, conv_net(), 'AdamW', 100, 10, lr=2e-3, weight_decay=1e-2)\n"  # the example trains 30 epochs
    job = write(tmp_path, shorter)
    done = halfstep("compare", f"{job}:make", "--seeds", "8", "--arms", "fp32,mixed", "--delta", "1.0pp", "--out", tmp_path)
    assert done.returncode == 0 and "mixed vs fp32: equivalent" in done.stdout, done.stdout + done.stderr
    fewer = halfstep("compare", f"{job}:make", "--seeds", "2", "--arms", "fp32,mixed", "--delta", "0.1", "--out", tmp_path)  # of runs that are there
    assert fewer.returncode == 3 and re.search(r"mixed vs fp32: cannot tell .*; run \d+ more", fewer.stdout), fewer.stdout + fewer.stderr


@pytest.mark.slow
def test_fp16_without_a_scale_is_worse_on_the_sigmoid_net_and_the_first_layers_underflow(tmp_path):
    done = halfstep("compare", f"{ROOT / 'examples/python/compare_digits.py'}:sigmoid", "--seeds", "2", "--arms", "fp32,fp16-s1", "--delta", "1.0pp", "--out", tmp_path)
    assert done.returncode == 2 and "fp16-s1 vs fp32: worse" in done.stdout, done.stdout + done.stderr
    assert "fp16-s1: underflow: weight gradients that FP32 has and FP16 loses: 1.weight 100 %" in done.stdout


@pytest.mark.parametrize("seeds", [[0, 1, 2], [3, 4], [3]])
def test_the_recorded_command_means_the_same_run(seeds):
    arms = _job.parse_arms("fp32,mixed:policy=static(scale=1024),name=a b")
    words = shlex.split(_compare._command("train.py:make", arms, seeds, "0.5pp", 50))
    found = words[words.index("--seeds") + 1]
    assert _compare._seeds(_compare_cli._seeds(found)) == seeds
    assert [a.name for a in arms] == [words[i + 1] for i, word in enumerate(words) if word == "--arms"]
