"""hs.tune: the planted layers are the ones it finds, its policy is what an arm, compare and islands_ take, and errors are one line."""

import contextlib
import io
import json
import re
import shlex
import sys

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep import _compare, _tune, _worker, cli
from halfstep._islands import Islands

SCRIPT = '''
import torch
from torch import nn
import halfstep as hs

G = torch.Generator().manual_seed(1)
X = torch.randn(512, 16, generator=G)
Y = (X @ torch.randn(16, 4, generator=G)).argmax(1)
BAD = {bad}

class Loud(nn.Linear):
    """Its hidden values leave FP16."""
    def forward(self, x):
        return super().forward(x) * 2.0**18 / 2.0**18

class Faint(nn.Linear):
    """Its gradients vanish in FP16, and it has everything to learn."""
    def __init__(self, *sizes):
        super().__init__(*sizes)
        nn.init.zeros_(self.weight)
    def forward(self, x):
        return hs.functional.scale_gradient(super().forward(x), 2.0**-34)

def make(arm, seed):
    kind = lambda i: dict(zip(("loud", "faint"), (Loud, Faint))).get(BAD.get(i), nn.Linear)
    sizes = [16, 32, 32, 32, 32]
    model = nn.Sequential(*[m for i in range(4) for m in (kind(i)(sizes[i], sizes[i + 1]), nn.ReLU())], nn.Linear(32, 4))
    arm.apply(model)
    optimizer = arm.optimizer("AdamW", model.named_parameters(), lr=1e-2, eps=1e-20)
    def batches(epoch):
        for rows in torch.randperm(512, generator=torch.Generator().manual_seed(seed + 100 * epoch)).split(64):
            yield X[rows], Y[rows]
    def evaluate(model):
        correct = model(X).argmax(1) == Y
        return {{"accuracy": correct.float().mean().item(), "correct": correct}}
    return hs.Job(model, optimizer, batches, lambda m, b: nn.functional.cross_entropy(m(b[0]).float(), b[1]), evaluate, epochs=6)
'''

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*steps in a row were skipped", "ignore:all gradients were exactly zero")]


@pytest.fixture
def here(monkeypatch):
    """Runs are made in this process, which is what takes their time otherwise; the specs of those that were made."""
    made = []

    def start(self, spec, bar):
        made.append(spec)
        kept = list(sys.path)
        try:
            result = {"key": spec["key"], **_worker.measure(spec, lambda done, total: None)}
        except Exception as error:
            return {"error": {"line": str(error), "load": isinstance(error, _worker.CannotLoad)}}
        finally:
            sys.path[:] = kept
        _worker.write(spec["result"], result)
        return result

    monkeypatch.setattr(_compare._Runs, "_start", start)
    monkeypatch.setattr(_worker.Meter, "idle", lambda self: None)
    return made


def write(folder, bad, text=SCRIPT):
    (folder / "job.py").write_text(text.format(bad=bad))
    return folder / "job.py"


def command(*words):
    """(status, output, errors) of the command line."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = cli.main([str(w) for w in words])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), errors.getvalue()


@pytest.mark.parametrize("arm", ["mixed", "autocast"])
def test_the_planted_layers_are_the_ones_it_finds(tmp_path, here, arm):
    found = hs.tune(f"{write(tmp_path, {1: 'loud', 0: 'faint'})}:make", "10pp", 3, arm=arm, out=tmp_path / "out", every=5)
    assert set(found.islands) == {"0", "2"} and found.verdict in ("equivalent", "better") and found.exit_status == 0
    trials = {tuple(sorted(t["islands"])): t["verdict"] for t in found.data["trials"]}
    assert trials[()] == "worse" and trials[("0",)] == "worse" and trials[("2",)] == "worse"  # neither alone is enough
    assert {entry["layer"] for entry in found.data["layers"][:2]} == {"0", "2"} and len(found.data["trials"]) == 5  # looked at first, so few were asked
    assert re.search("with 2 of 5 layers in FP32: [02], [02]$", str(found))
    # again: nothing is trained twice
    count = len(here)
    again = hs.tune(f"{tmp_path / 'job.py'}:make", "10pp", 3, arm=arm, out=tmp_path / "out", every=5)
    assert len(here) == count and again.islands == found.islands


def test_a_healthy_job_needs_no_layer_in_fp32(tmp_path, here):
    status, out, _ = command("tune", f"{write(tmp_path, {})}:make", "--margin", "10pp", "--seeds", "3", "--out", tmp_path / "out", "--every", "5")
    assert status == 0 and "mixed is as good as fp32 within 10 pp with no layer in FP32" in out
    policy = json.loads((tmp_path / "out/policy.json").read_text())
    assert policy["islands"] == [] and [len(t["islands"]) for t in policy["trials"]] == [0] and len(here) == 6


def test_its_policy_is_what_arms_and_islands_take(tmp_path, here):
    found = hs.tune(f"{write(tmp_path, {1: 'loud'})}:make", "10pp", 3, out=tmp_path / "out", every=5)
    assert found.islands == ["2"]
    policy = tmp_path / "out/policy.json"
    arm = hs.Arm.parse(f"@{policy}")
    assert arm.options() == found.arm.options() == hs.Arm.parse("mixed:islands=2").options() and arm.name == f"@{policy}"
    compared = hs.compare(f"{tmp_path / 'job.py'}:make", ["fp32", f"@{policy}"], 3, "10pp", tmp_path / "compared", every=5)
    assert compared.verdicts == {arm.name: found.verdict} and compared.exit_status == 0
    assert shlex.split(compared.data["command"])[-1] == arm.name  # the command that runs it again
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    hs.cast_model(model)
    assert hs.islands_(model, policy) == ["2"] == Islands(model).names
    assert hs.islands_(model, ["0"]) == ["0"] and Islands(model).names == ["0", "2"]
    with pytest.raises(ValueError, match="islands_: names has 'x', which fits no module"):
        hs.islands_(model, "x")


def test_where_no_set_is_enough_it_says_so(tmp_path, here):
    text = SCRIPT.replace("    arm.apply(model)", "    arm.apply(model)\n    if arm.compute != 'fp32':\n        model[8].weight.requires_grad_(False).zero_()")
    status, out, _ = command("tune", f"{write(tmp_path, {}, text)}:make", "--margin", "10pp", "--seeds", "3", "--out", tmp_path / "out")
    assert status == 2 and "with all of them in FP32 the verdict is worse" in out and "wrote no policy" in out and not (tmp_path / "out/policy.json").exists()
    status, out, _ = command("tune", f"{tmp_path / 'job.py'}:make", "--margin", "10pp", "--seeds", "0,", "--out", tmp_path / "one")
    assert status == 3 and "the verdict is cannot tell; run 2 more seeds" in out


def test_an_arm_with_islands(tmp_path):
    arm = hs.Arm.parse("autocast:islands=0|2")
    model = arm.apply(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    assert Islands(model).names == ["0", "2"] and model[0].weight.dtype == torch.float32
    with pytest.raises(ValueError, match="islands is 0, but compute is fp32"):
        hs.Arm.parse("fp32:islands=0")
    with pytest.raises(ValueError, match="'9', which fits no module"):
        hs.Arm.parse("mixed:islands=9").apply(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("words, message", [
    (["nope.py:make"], "make: nope.py: no such file"), (["JOB:other"], "has no 'other'"), (["JOB:make", "--margin", "x"], "margin is 'x'"), (["JOB:make", "--seeds", "a"], "--seeds is 'a'"),
    (["JOB:make", "--arm", "fp32"], "arm: 'fp32' computes in FP32"), (["JOB:make", "--arm", "mixed:islands=0"], "has islands already"), (["JOB:make", "--arm", "half"], "'half' is no preset"),
    (["JOB:make", "--against", "mixed"], "arm and against are both 'mixed'"), (["JOB:make", "--every", "0"], "every is 0"), (["JOB:make", "--layers", "conv*"], "'conv*', which fits no module"),
    (["JOB:make", "--against", "@nope.json"], "policy: nope.json: No such file"), (["JOB:make", "--against", "@BAD"], "is not JSON"), ([], "the following arguments are required: make"),
    (["JOB:make", "--device", "tpu"], "invalid choice: 'tpu'"),
])
def test_errors_are_one_line_and_status_1(tmp_path, words, message):
    job = write(tmp_path, {})
    (tmp_path / "bad.json").write_text("{")
    status, out, errors = command("tune", *[w.replace("JOB", str(job)).replace("BAD", str(tmp_path / "bad.json")) for w in words], "--out", tmp_path / "out")
    assert status == 1 and out == "" and len(errors.strip().splitlines()) == 1 and message in errors, errors


def test_an_error_in_the_script_is_one_line(tmp_path):
    job = write(tmp_path, {}, SCRIPT.replace("    arm.apply(model)", "    1 / 0"))
    status, _, errors = command("tune", f"{job}:make", "--out", tmp_path / "out")
    assert status == 1 and errors.strip().splitlines() == [f"halfstep tune: {job.resolve()}: make(): ZeroDivisionError: division by zero"]


@pytest.mark.parametrize("text, message", [
    ('{"format": "halfstep-policy", "version": 1, "islands": []}', "'arm' is NoneType; expected dict"),
    ('{"format": "halfstep-policy", "version": 1, "islands": [], "arm": {"options": {}}}', "no options with islands"),
    ('{"format": "halfstep-policy", "version": 1, "islands": [], "arm": {"options": {"islands": null, "speed": "9"}}}', "speed='9' is no option of an arm"),
    ('{"format": "halfstep-guard", "version": 1}', "is not a halfstep-policy file"),
])
def test_a_file_that_is_no_policy_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=f"p.json.*{re.escape(message)}"):
        hs.Arm.parse(f"@{tmp_path / 'p.json'}")


def test_the_search_halves_and_then_leaves_out():
    """Against every pair of needed layers among eight, by an oracle that knows them."""
    for a in range(8):
        for b in range(a, 8):
            asked, needed = [], {str(a), str(b)}

            class Oracle:
                def enough(self, names):
                    asked.append(tuple(names))
                    return needed <= set(names)

            assert set(_tune._fewest(Oracle(), list("01234567"))) == needed
            assert len(set(asked)) <= 2 + 3 + b  # none and all, halving, leaving out


@pytest.mark.slow
def test_the_command_trains_in_processes_of_their_own(tmp_path):
    status, out, errors = command("tune", f"{write(tmp_path, {2: 'loud'})}:make", "--margin", "15pp", "--seeds", "3", "--layers", "4", "--out", tmp_path / "out")
    assert status == 0 and "with 1 of 1 layers in FP32: 4" in out and "1 in FP32: " in errors
    assert len(list((tmp_path / "out/runs").glob("*.json"))) == 9
