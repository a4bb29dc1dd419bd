"""report.json, what is read into it and made of it; the page, measured in a browser."""

import copy
import functools
import html
import json
import math
import re
import shutil
import subprocess

import pytest
import torch

from halfstep import _compare, _merge, _report, _report_html, _schema
from halfstep._shares import packed_samples, shares

LAYERS = ["encoder.layers.%d.%s" % (i, name) for i in range(6) for name in ("self_attention.output_projection.weight", "norm.bias", "mlp.weight")] + ["head.weight"]
QUARTILES = lambda median: {"median": median, "q1": 0.9 * median, "q3": 1.2 * median}


@functools.cache
def samples(lost):
    """Shares of many layers at a few steps; `lost`: how small the first ones are."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for step in range(50, 501, 50):
        found = {}
        for i, name in enumerate(LAYERS):
            x = torch.randn(200, generator=g) * 2.0 ** (-lost * max(0, 12 - i))
            found[name, "weight gradient"] = shares(x, 1.0, x.half())
            found[name, "weight"] = shares(torch.randn(200, generator=g))
            found[name.rpartition(".")[0], "activation"] = shares(torch.randn(200, generator=g) * 1e4)
            found[name.rpartition(".")[0], "activation gradient"] = shares(x)
        rows.append((step, 2.0**16, found))
    return packed_samples(rows, 50)


def run(seed, accuracy, full=True, scaled=True, lost=0.0):
    """A run of a program, with everything or with the least."""
    if not full:
        return {"seed": seed, "metrics": {"accuracy": accuracy}}
    bits = "".join("1" if i < round(400 * accuracy) else "0" for i in range(400))
    return {"seed": seed, "metrics": {"accuracy": accuracy, "loss": 0.1}, "metric": "accuracy", "better": "higher", "correct": bits, "labels": [i % 10 for i in range(400)], "steps": 500, "examples": 50_000, "seconds": 12.5,
            "time": {**{p: QUARTILES(t) for p, t in zip((*_report.PHASES, "step"), (1e-4, 2.5e-3, 5e-3, 1e-5, 6e-4, 8.2e-3))}, "first_step": 0.05, "timed_steps": 480, "warm_up_steps": 5},
            "memory": {"peak_bytes": 7 * 10**8, "before_bytes": 5 * 10**8, "cuda_peak_bytes": None, "method": "VmHWM"},
            "ledger": {"weights": 4_000_000, "gradients": 4_000_000, "masters": 4_000_000 * scaled, "states": 16_000_000, "buffers": 4096},
            "energy": {"joules": 40.0 if scaled else None, "net_joules": 25.0 if scaled else None, "idle_watts": 12.0, "seconds": 12.5, "method": "powercap" if scaled else None,
                       "reason": None if scaled else "/sys/class/powercap/intel-rapl:0/energy_uj: permission denied (only root reads it on current kernels)", "notes": []},
            "losses": [[s, 2.0 / s] for s in range(1, 500, 25)], "skipped": 3 * scaled, "final_scale": 2.0**17 if scaled else None, "diagnosis": None,
            "scale": {"steps": 500, "points": [[1, 2.0**16], [2, 2.0**15], [400, 2.0**17]], "skipped": [1, 2, 300], "longest": 2, "stable_from": 3} if scaled else None,
            "matrix": {"float16": {"reason": "ValueError: 'head.weight' does not fit torch.float16: 1 of 200 elements are at or beyond 65520"},
                       "float32": {"metrics": {"accuracy": accuracy}, "max_error": 1e-5, "mean_error": 1e-6}, "float64": {"metrics": {"accuracy": accuracy}, "max_error": 0.0, "mean_error": 0.0}},
            "shares": samples(lost) if scaled else None, "options": {}}


def arm(name, accuracies, failed=None, **kw):
    return {"name": name, "options": {"compute": "fp16", "policy": None}, "runs": [run(seed, a, **kw) for seed, a in enumerate(accuracies)], "failed": failed}


FP32 = (0.955, 0.960, 0.9575, 0.9625, 0.9550, 0.9600)


def report():
    """A report with one of everything, and names that are long."""
    return copy.deepcopy(made_report())


@functools.cache
def made_report():
    arms = [arm("fp32", FP32, scaled=False), arm("mixed:master=fp32,states=bf16,policy=dynamic(init_scale=4294967296,growth_interval=100)", [a + d for a, d in zip(FP32, (0, 0.0025, -0.0025, 0, 0, 0.0025))]),
            arm("fp16-s1", [0.1] * 6, lost=2.5), arm("narrow", [a + d for a, d in zip(FP32, (0.02, -0.02, 0.01, -0.015, 0.02, -0.01))], scaled=False),
            arm("broken", [], failed={"seed": 0, "line": "RuntimeError: mat1 and mat2 shapes cannot be multiplied (100x1024 and 1000x128)", "log": "r/runs/broken-with-a-long-name-123456-seed0.log"})]
    return _report.build(arms, "0.5pp", {"halfstep": "1.0", "cpu": "Intel(R) Xeon(R) Processor", "device": "cpu"}, {"make": "train.py:make", "seeds": [0, 1]},
                         "halfstep compare train.py:make --seeds 6 --delta 0.5pp --arms 'mixed:master=fp32,states=bf16,policy=dynamic(init_scale=4294967296,growth_interval=100)'", ["something to know"])


def test_a_report_is_read_as_it_was_written(tmp_path):
    made = report()
    (tmp_path / "report.json").write_text(json.dumps(made, allow_nan=False))
    assert _schema.read(tmp_path / "report.json") == json.loads(json.dumps(made)) and made["exit_status"] == 1
    assert [c["verdict"] for c in made["comparisons"]] == ["equivalent", "worse", "cannot tell"]
    text = _report.text(made)
    assert "fp16-s1: underflow: weight gradients that FP32 has and FP16 loses: encoder.layers.0.self_attention.output_projection.weight" in text and "note: something to know" in text
    assert [made["arms"][1]["summary"]["energy"][k] for k in ("joules_per_step", "net_joules_per_step", "joules_per_example")] == [0.08, 0.05, 0.0008]
    assert "broken failed with seed 0: RuntimeError: mat1" in text and "permission denied" in text


@pytest.mark.parametrize("change, message", [
    (lambda r: r.pop("arms"), "has no 'arms'"), (lambda r: r.update(arms=[]), "'arms' is empty"), (lambda r: r.update(arms={}), "'arms' is dict; expected list"), (lambda r: r.update(version="1"), "of version '1'"),
    (lambda r: r["arms"][0].pop("name"), "arms[0] has no 'name'"), (lambda r: r["arms"][0].update(runs=[1]), "runs[0] is int; expected an object"),
    (lambda r: r["arms"][0]["runs"][1].update(seed=True), "runs[1]: 'seed' is bool; expected int"), (lambda r: r["arms"][0]["runs"][0].update(metrics={}), "'metrics' is empty"),
    (lambda r: r["arms"][0]["runs"][0].update(metrics={"accuracy": "good"}), "metrics.accuracy is 'good'; expected a number"), (lambda r: r["arms"][0]["runs"][0].update(correct="012"), "'correct' holds other letters"),
    (lambda r: r["arms"][0]["runs"][0]["time"]["step"].update(median=[1]), "time.step.median is [1]; expected a number"),
    (lambda r: r["arms"][1]["runs"][0]["scale"].pop("points"), "scale has no 'points'"), (lambda r: r["arms"][1]["runs"][0]["scale"].update(points=[[1]]), "scale.points[0] is [1]; expected a list of 2 numbers"),
    (lambda r: r["arms"][1]["runs"][0]["scale"].update(points=[[1, 0]]), "a scale that is no positive number"), (lambda r: r["arms"][1]["runs"][0]["scale"].update(skipped=["x"]), "scale.skipped[0] is 'x'"),
    (lambda r: r["arms"][0]["runs"][0]["matrix"].update(float16={}), "matrix.float16 has no 'metrics'"), (lambda r: r["arms"][0]["runs"][0]["matrix"].update(float16=1), "matrix.float16 is int"),
    (lambda r: r["arms"][0]["runs"][0]["energy"].update(joules="much"), "energy: 'joules' is str"), (lambda r: r["arms"][0]["runs"][0]["memory"].update(peak_bytes="x"), "memory.peak_bytes is 'x'"),
    (lambda r: r["arms"][1]["runs"][0]["shares"]["samples"][0]["rows"][0].pop(), "expected a list of 9 numbers"), (lambda r: r["arms"][1]["runs"][0]["shares"]["samples"][0]["rows"][0].__setitem__(0, 999), "names a tensor that is not in 'tensors'"),
    (lambda r: r["arms"][1]["runs"][0]["shares"]["samples"][0]["rows"][0].__setitem__(3, "nan"), "holds a count that is no whole number"), (lambda r: r["arms"][4].update(failed={"seed": 1}), "failed has no 'line'"),
    (lambda r: r["arms"][0]["runs"][0]["ledger"].update(weights="nan"), "ledger.weights is 'nan'"), (lambda r: r["arms"][0]["runs"][0]["time"].update(first_step="nan"), "time.first_step is 'nan'"),
    (lambda r: r["arms"][0]["runs"][0].update(losses=[1]), "losses[0] is 1; expected a list of 2 numbers"),
])
def test_what_is_no_report_is_refused_by_field(change, message):
    made = copy.deepcopy(report())
    change(made)
    with pytest.raises(ValueError, match=re.escape(message)):
        _schema.validate(made, "r.json")


def test_delta_and_units():
    assert _report.parse_delta("0.5pp") == (0.5, True) and _report.parse_delta(0.25) == (0.25, False)
    for wrong in ("pp", "0", "-1pp", "nan", "inf", "1%"):
        with pytest.raises(ValueError, match=re.escape(repr(wrong))):
            _report.parse_delta(wrong)
    assert _report.unit_of("accuracy", [0.9, 0.95], True) == (100.0, "%") and _report.unit_of("accuracy", [0.9, 0.95], False) == (100.0, "%")
    assert _report.unit_of("accuracy", [90.0, 9.5], True) == (1.0, "%") and _report.unit_of("loss", [0.3, 2.0], False) == (1.0, "")
    with pytest.raises(ValueError, match="loss runs from -3 to 2, which is no share"):
        _report.unit_of("loss", [-3.0, 2.0], True)


def test_less_is_better_where_the_job_says_so():
    arms = [arm(name, [], scaled=False) for name in ("a", "b")]
    for entry, values in zip(arms, ([1.0, 1.1, 0.9, 1.05], [2.0, 2.1, 1.9, 2.05])):
        entry["runs"] = [{"seed": s, "metrics": {"perplexity": v}, "better": "lower"} for s, v in enumerate(values)]
    made = _report.build(arms, 0.1)
    assert made["comparisons"][0]["verdict"] == "worse" and made["comparisons"][0]["mean"] == pytest.approx(-1.0) and made["exit_status"] == 2
    arms[1]["runs"][2]["metrics"]["perplexity"] = "nan"
    made = _report.build(arms, 0.1)
    assert made["comparisons"][0]["verdict"] == "worse" and made["comparisons"][0]["note"] == "perplexity of b is not finite with seed 2"
    assert "not finite" in _report_html.page(made)


def test_a_first_arm_that_is_broken_too_condemns_nobody():
    arms = [arm(name, FP32) for name in ("a", "b")]
    for entry in arms:
        for each in entry["runs"]:
            each["metrics"]["accuracy"] = "nan"
    made = _report.build(arms, 1.0)
    assert made["comparisons"][0]["verdict"] == "cannot tell" and "accuracy of a is not finite" in made["comparisons"][0]["note"] and made["exit_status"] == 3


def test_test_sets_of_different_length_are_not_pooled():
    arms = [arm("a", FP32), arm("b", FP32)]
    for entry in arms:
        entry["runs"][1]["correct"] = entry["runs"][1]["correct"][:300]
    made = _report.build(arms, 1.0)
    assert "mcnemar" not in made["comparisons"][0] and "differ in length from seed to seed" in made["comparisons"][0]["note"]
    assert "differ in length" in _report.text(made) and _report_html.page(made)


def test_runs_that_were_not_paired_are_told():
    arms = [arm("a", FP32), arm("b", FP32)]
    for entry, prints in zip(arms, ("x", "y")):
        for r in entry["runs"]:
            r.update(weights_fingerprint=prints, data_fingerprint="z")
    assert [note.partition(":")[0] for note in _report.build(arms, "1pp")["notes"]] == ["b began with other weights than a (seed 0)"]


def test_exit_status():
    status = lambda *verdicts, failed=None: _report.exit_status([{"failed": failed}], [{"verdict": v} for v in verdicts])
    assert [status("equivalent"), status("better", "equivalent"), status("equivalent", "cannot tell"), status("cannot tell", "worse"), status("worse", failed={"seed": 0})] == [0, 0, 3, 2, 1]


# -- of other programs -----------------------------------------------------------------------------
def written(folder, name, arms, **more):
    (folder / name).write_text(json.dumps({"format": "halfstep-report", "version": 1, "arms": arms, **more}))
    return folder / name


def test_reports_of_other_programs_with_the_least_in_them(tmp_path):
    a = written(tmp_path, "wide.json", [{"name": "train", "runs": [run(s, v, full=False) for s, v in enumerate(FP32)]}])
    b = written(tmp_path, "half.json", [{"name": "train", "runs": [run(s, v - 0.001 * (s % 2), full=False) for s, v in enumerate(FP32)]}, {"name": "other", "runs": [run(s, v - 0.2, full=False) for s, v in enumerate(FP32)]}])
    found = _compare.from_reports([a, b], "1pp", tmp_path / "r")
    assert found.verdicts == {"half:train": "equivalent", "other": "worse"} and found.exit_status == 2
    assert {p.name for p in (tmp_path / "r").iterdir()} == {"report.json", "report.html", "report.png", "events"}
    again = _compare.from_reports([tmp_path / "r/report.json"], "1pp")  # a report can be judged again, by another delta
    assert again.verdicts == found.verdicts and again.data["comparisons"] == found.data["comparisons"]
    assert _compare.from_reports([tmp_path / "r/report.json"], "30pp").exit_status == 0


def test_a_cpp_report_may_have_times_and_a_metric_of_its_own(tmp_path):
    runs = [{"seed": s, "metrics": {"epochs": 3, "loss": 0.2 + s / 1000}, "time": {"step": {"median": 0.002}}, "steps": 100} for s in range(4)]
    a = written(tmp_path, "a.json", [{"name": "a", "runs": runs}], metric={"name": "loss", "better": "lower"})
    b = written(tmp_path, "b.json", [{"name": "b", "runs": [{**r, "time": {"step": {"median": 0.001}}} for r in runs]}])
    found = _compare.from_reports([a, b], "0.1", tmp_path / "r")
    assert found.verdicts == {"b": "equivalent"} and found.data["comparisons"][0]["time_ratio"] == 0.5 and found.data["metric"]["name"] == "loss"


def test_machines_in_one_table(tmp_path):
    arms = lambda factor: [arm("fp32", FP32, scaled=False), {**arm("mixed", FP32), "runs": [{**r, "time": {**r["time"], "step": QUARTILES(8.2e-3 * factor)}} for r in arm("mixed", FP32)["runs"]]}]
    config = {"make": "train.py:make", "source": "abc", "every": 50}
    a = written(tmp_path, "a.json", arms(0.5), environment={"cpu": "one", "device": "cpu"}, config=config)
    b = written(tmp_path, "b.json", arms(2.0), environment={"gpu": "card", "device": "cuda"}, config=config)
    rows = _merge.merge([a, b])
    assert [(r["machine"], r["arm"], r["time_ratio"]) for r in rows] == [("one", "fp32", 1.0), ("one", "mixed", 0.5), ("card", "fp32", 1.0), ("card", "mixed", 2.0)]
    assert rows[1]["difference"] == pytest.approx(0) and rows[1]["joules_per_step"] == pytest.approx(0.08) and rows[0]["joules_per_step"] is None
    lines = _merge.as_text(rows).splitlines()
    assert len(lines) == 5 and lines[0].split()[:3] == ["machine", "device", "arm"] and "–" in lines[1]


@pytest.mark.parametrize("change, message", [
    (lambda r: r["config"].update(source="other"), 'source differs: "abc" in {a}, "other" in {b}'), (lambda r: r["arms"].pop(), 'arms differs: [{{"name": "mixed"'),
    (lambda r: [x["runs"].pop() for x in r["arms"]], "seeds differs: [5] in {a}, [0, 1, 2, 3, 4] in {b}"), (lambda r: r["arms"][0]["runs"][0].update(steps=7), "steps differs: [500] in {a}, [7] in {b}"),
    (lambda r: r["arms"][1]["options"].update(policy="megatron"), "arms differs: "),
])
def test_machines_that_ran_something_else_are_refused_by_name(tmp_path, change, message):
    arms, config = [arm("fp32", FP32, scaled=False), arm("mixed", FP32)], {"make": "train.py:make", "source": "abc", "every": 50}
    other = copy.deepcopy({"arms": arms, "config": config})
    change(other)
    a, b = written(tmp_path, "a.json", arms, config=config), written(tmp_path, "b.json", **other)
    with pytest.raises(ValueError, match=re.escape(message.format(a=a, b=b))):
        _merge.merge([a, b])


# -- the page --------------------------------------------------------------------------------------
MEASURE = """
<iframe id="f" style="border:0;width:WIDTHpx;height:6000px" srcdoc="PAGE"></iframe><pre id="result"></pre><script>
document.getElementById('f').addEventListener('load', () => {
  const page = document.getElementById('f').contentDocument, boxes = [];
  page.querySelectorAll('details').forEach(d => d.open = OPEN);
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (!node.textContent.trim() || !node.parentElement.checkVisibility()) continue;
    const range = page.createRange();
    range.selectNodeContents(node);
    let clip = null;
    for (let e = node.parentElement; e; e = e.parentElement) if (page.defaultView.getComputedStyle(e).overflowX === 'hidden') { clip = e.getBoundingClientRect(); break; }
    for (const r of range.getClientRects()) {
      const left = clip ? Math.max(r.left, clip.left) : r.left, right = clip ? Math.min(r.right, clip.right) : r.right;
      if (right > left && r.height > 0) boxes.push({node, text: node.textContent.trim().slice(0, 40), left, right, top: r.top, bottom: r.bottom});
    }
  }
  const wrong = [];
  boxes.forEach((a, i) => {
    if (a.left < -0.5 || a.right > WIDTH + 0.5) wrong.push(['leaves the page', a.text, a.left, a.right]);
    for (const b of boxes.slice(i + 1))
      if (a.node !== b.node && Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2) wrong.push(['meet', a.text, b.text]);
  });
  document.getElementById('result').textContent = JSON.stringify({boxes: boxes.length, wrong, width: page.documentElement.scrollWidth});
});
</script>"""


def in_browser(tmp_path, page, width, details=False):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    (tmp_path / "measure.html").write_text("<!DOCTYPE html><meta charset=utf-8>" + MEASURE.replace("WIDTH", str(width)).replace("OPEN", str(details).lower()).replace("PAGE", html.escape(page)))
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path / 'measure.html'}"],
                          capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="result">(.+?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("details", [False, True])
def test_no_two_texts_meet_and_none_leaves_the_page(tmp_path, width, details):
    found = in_browser(tmp_path, _report_html.page(report()), width, details)
    assert found["boxes"] > 200 and found["wrong"] == [] and found["width"] <= width


def test_the_measure_sees_texts_that_meet_and_leave(tmp_path):
    page = '<body style="margin:0"><p style="position:absolute;top:0;left:0">one text</p><p style="position:absolute;top:3px;left:5px">another text</p><p style="position:absolute;top:80px;left:390px">far out</p></body>'
    found = in_browser(tmp_path, page, 400)
    assert sorted(kind for kind, *_ in found["wrong"]) == ["leaves the page", "leaves the page", "meet"] or sorted(kind for kind, *_ in found["wrong"]) == ["leaves the page", "meet"]


def test_the_page_escapes_what_it_is_given():
    arms = [arm("<b>fp32</b>", FP32), arm("a&b<script>", FP32)]
    page = _report_html.page(_report.build(arms, "1pp", {"cpu": "<i>"}, {}, "x <y>"))
    assert "<script" not in page and "<b>fp32" not in page and "a&amp;b&lt;script&gt;" in page and "<i>" not in page.replace("<i></i>", "").replace("<i style", "")


def test_a_page_of_the_least_report_has_no_empty_sections():
    arms = [{"name": n, "runs": [run(s, v, full=False) for s, v in enumerate(FP32)], "failed": None} for n in ("a", "b")]
    page = _report_html.page(_report.build(arms, "1pp"))
    assert re.findall("<h2>(.*?)</h2>", page) == ["Verdict", "At a glance", "Made by"] and math.isclose(page.count("equivalent"), 1)
