"""halfstep bench: what is measured computes the same thing, the arithmetic of rounds and break-even on made-up times, files and their merging. No test looks at a real time."""

import inspect
import itertools
import json
import os
import subprocess
import sys

import docs
import pytest
import torch

import halfstep as hs
from halfstep import _bench, _bench_cases, _merge
from halfstep._library import _C
from halfstep._job import Arm

TINY = dict(parameters=4000, product=32, rows=8, batch=2)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(_bench_cases.SIZES, "small", TINY)


class Clock:
    """A clock that moves only when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, *seconds):
        """A function that takes so long, call after call; the last for ever."""
        seconds = list(seconds)

        def run():
            self.now += seconds.pop(0) if len(seconds) > 1 else seconds[0]
        return run


# -- rounds ----------------------------------------------------------------------------------------
def test_every_arm_runs_in_every_round_and_ratios_are_of_one_round():
    clock = Clock()
    times, reasons = _bench.interleaved({"a": clock.takes(9.0, 0.1, 0.2, 0.3), "b": clock.takes(9.0, 0.05, 0.05, 0.3)}, 3, clock)  # the first calls do not count
    assert not reasons and [sorted(t) for t in times] == [["a", "b"]] * 3 and [round(t["a"], 9) for t in times] == [0.1, 0.2, 0.3]
    row = _bench._row("layers", "c", "b", times, "a", reasons)
    assert row["speed"] == pytest.approx(2.0) and row["ms"] == pytest.approx(50.0) and row["spread"] is None  # of 2, 4 and 1; of 50, 50 and 300
    assert _bench._row("layers", "c", "a", times, "a", reasons)["speed"] == 1.0


def test_an_arm_that_is_slow_runs_twice_only():
    clock = Clock()
    times, _ = _bench.interleaved({"a": clock.takes(0.1), "b": clock.takes(9.0, 0.41, 0.3), "c": clock.takes(9.0, 0.1, 0.1, 0.5)}, 4, clock)
    assert [sorted(t) for t in times] == [["a", "b", "c"], ["a", "b", "c"], ["a", "c"], ["a"]]


def test_the_order_rotates_and_an_arm_that_torch_refuses_is_named_and_left_out():
    order, clock = [], Clock()

    def broken():
        raise RuntimeError("not implemented for 'Half'\nmore")

    times, reasons = _bench.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b"), "x": broken}, 3, clock)
    assert reasons == {"x": "not implemented for 'Half'"} and "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert all(set(t) == {"a", "b"} for t in times)
    row = _bench._row("layers", "c", "x", times, "a", reasons)
    assert row["ms"] is None and row["speed"] is None and row["reason"] == "not implemented for 'Half'"


def test_arms_run_with_the_kernels_they_name_and_the_switch_is_put_back():
    seen = []
    for before in (True, False):
        hs.set_overrides(before)
        _bench.interleaved({"off": (lambda: seen.append(_C.overrides_enabled()), False), "on": (lambda: seen.append(_C.overrides_enabled()), True)}, 1, Clock())
        assert _C.overrides_enabled() is before
    hs.set_overrides(True)
    assert sorted(seen) == [False] * 4 + [True] * 4


@pytest.mark.parametrize("speeds, expected", [({64: 0.5, 128: 0.9, 256: 1.2, 512: 2.0}, 256), ({64: 0.5, 128: 1.5, 256: 0.9, 512: 2.0}, 512), ({64: 1.0, 128: 1.5}, 64),
                                              ({64: 2.0, 128: 0.99}, None), ({64: None, 128: 1.1}, 128), ({64: 1.1, 128: None}, None)])
def test_break_even_is_the_width_from_which_on_it_stays_quicker_or_never(speeds, expected):
    rows = [{"section": "width", "width": w, "arm": "mixed", "speed": s} for w, s in speeds.items()] + [{"section": "width", "width": 64, "arm": "autocast", "speed": 9.0}]
    assert _bench.break_even(rows) == expected


# -- what is measured ------------------------------------------------------------------------------
@pytest.mark.parametrize("number", range(len(_bench_cases.cases("small"))))
def test_ours_and_torchs_compute_the_same(tiny, number):
    case = _bench_cases.cases("small")[number]
    inputs = list(case.make(torch.float64, "cpu"))
    ours, stock = case.ours(*inputs), case.stock(*inputs)
    torch.testing.assert_close(ours.double(), stock.double(), rtol=1e-5, atol=1e-5)
    wanted = [t for t in inputs if t.requires_grad]
    up = torch.randn(ours.shape, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, wanted, up.to(ours.dtype)), torch.autograd.grad(stock, wanted, up.to(stock.dtype))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(_bench_cases.layer_run(case, case.ours, torch.float16, "cpu")()) == len(wanted)
    narrow = _bench_cases.layer_run(case, case.stock, torch.float32, "cpu")()
    assert all(int(((g != 0) & (g.abs() < torch.finfo(g.dtype).tiny)).sum()) == 0 for g in narrow)  # on subnormal numbers a CPU is slow, which would be no news of the layer


def test_steps_check_clip_and_update():
    """Both halves of every arm happen, each with ticks of the clock of its own, and every weight moves."""
    for arm in (_bench_cases.STOCK_STEP, *_bench_cases.MODES):
        ticks = itertools.count()
        run, moved = _bench_cases.step_run(arm, "cpu", 4000)
        opt = next(c.cell_contents for c in run.__closure__ if isinstance(c.cell_contents, torch.optim.Optimizer))
        made = opt.param_groups[0]["params"]
        before = [p.detach().clone() for p in made]
        check, update = run(lambda: next(ticks))
        assert check >= 1 and update >= 1 and 16 <= moved <= 48
        assert len(made) == 4 and all(not torch.equal(a, b) for a, b in zip(before, made))


def test_the_bytes_moved_of_torchs_chain_are_those_of_the_published_table():
    assert _bench_cases.step_run(_bench_cases.STOCK_STEP, "cpu", 40)[1] == 48 and _bench_cases.step_run("FP16, split16", "cpu", 40)[1] == 28


@pytest.mark.parametrize("name", _bench.WIDTH_ARMS)
def test_the_net_of_the_sweep_trains(name):
    run = _bench.train_run(Arm.parse(name), 16, "cpu")
    model = next(c.cell_contents for c in run.__closure__ if isinstance(c.cell_contents, torch.nn.Module))
    assert model[0].weight.dtype == (torch.float16 if name == "mixed" else torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        run()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


# -- the result ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def found():
    before = _bench_cases.SIZES["small"]
    _bench_cases.SIZES["small"] = TINY
    try:
        return hs.bench("cpu", rounds=2), hs.bench("cpu", widths=[32, 8, 8], rounds=2)
    finally:
        _bench_cases.SIZES["small"] = before


def test_the_table_has_every_arm_and_is_saved_as_it_is(found, tmp_path):
    whole, sweep = found
    rows = whole.rows
    assert [r["arm"] for r in rows if r["section"] == "step"] == [_bench_cases.STOCK_STEP, *_bench_cases.MODES]
    assert {r["arm"] for r in rows if r["section"] == "layers"} == {"FP32, torch", "FP16, torch", "FP16, halfstep"} and len([r for r in rows if r["section"] == "layers"]) == 24
    assert {"FP32", "FP16", "BF16", "FP64"} <= {r["arm"] for r in rows if r["section"] == "products"}
    assert all(r["ms"] > 0 and r["speed"] > 0 for r in rows if "reason" not in r) and whole.break_even is None
    base = next(r for r in rows if r["section"] == "step")
    assert base["speed"] == 1.0 and 0 < base["check_ms"]
    products = next(r for r in rows if r["section"] == "products")
    assert products["gflops"] == pytest.approx(2e-6 * 32**3 / products["ms"])
    whole.save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == whole.data
    text = str(whole)
    assert all(word in text for word in ("one optimizer step", "layers, forward + backward", "products of matrices", "FP16, split16, int8 states", "of a copy", "GFLOP/s"))
    assert sweep.data["config"]["widths"] == [8, 32] and set(sweep.break_even) == {"mixed", "autocast"} and [r["arm"] for r in sweep.rows] == list(_bench.WIDTH_ARMS) * 2


def test_the_sweep_says_where_it_breaks_even(found):
    data = json.loads(json.dumps(found[1].data))
    data["break_even"] = {"mixed": 8, "autocast": None}
    lines = str(hs.Bench(data)).splitlines()
    assert "mixed is quicker than fp32: at every width measured" in lines and "autocast is quicker than fp32: never, up to 32" in lines
    data["break_even"]["mixed"] = 32
    assert "mixed is quicker than fp32: from width 32 on" in str(hs.Bench(data))
    assert "disturbed" not in str(hs.Bench({**data, "spread": 0.1})) and "disturbed: half of the times of an arm lie 40% apart" in str(hs.Bench({**data, "spread": 0.4}))


def test_tables_of_several_machines_become_one(found, tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    found[0].save(a)
    other = json.loads(a.read_text())
    other["environment"].update(cpu="Another CPU")
    for row in other["rows"]:
        row["ms"] = None if row["ms"] is None else row["ms"] * 2
    b.write_text(json.dumps(other))
    rows = _merge.merge([a, b])
    assert len(rows) == 2 * len(other["rows"]) and {r["machine"] for r in rows} == {"Another CPU", found[0].data["environment"]["cpu"]}
    first, second = rows[0], rows[len(other["rows"])]
    assert (first["arm"], first["speed"]) == (second["arm"], second["speed"]) and second["ms"] == 2 * first["ms"]
    text = _merge.as_text(rows)
    assert text.splitlines()[1] == "[2] Another CPU, cpu" and len(text.splitlines()) == 5 + len(other["rows"])
    same = _merge.merge([a, a])
    assert len({r["machine"] for r in same}) == 2  # two tables of one machine keep apart


def command(*arguments, **env):
    return subprocess.run([sys.executable, "-m", "halfstep", *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **env})


def test_merge_refuses_unequal_configurations_and_other_files(found, tmp_path):
    a, b, c, broken = (tmp_path / name for name in ("a.json", "b.json", "c.json", "broken.json"))
    found[0].save(a)
    found[1].save(b)
    c.write_text(json.dumps({"format": "halfstep-report", "version": 1, "arms": []}))
    broken.write_text(json.dumps({**found[0].data, "rows": [{"section": "step", "case": "c", "arm": 3}]}))
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({**found[0].data, "rows": []}))
    later = tmp_path / "later.json"
    later.write_text(json.dumps({**found[0].data, "version": 2}))
    for files, message in [([a, b], f'size differs: "small" in {a}, null in {b}'), ([a, c], f"{a} is a table of bench and {c} is none"), ([broken], f"{broken}: rows[0]: 'arm' is int; expected text"),
                           ([empty], f"{empty}: 'rows' is empty"), ([later], f"{later} is a halfstep bench table of version 2; this halfstep reads version 1")]:
        with pytest.raises(ValueError) as error:
            _merge.merge(files)
        assert message in str(error.value)


@pytest.mark.parametrize("arguments, message", [
    (["bench", "--widths", "64,x"], "halfstep bench: --widths is '64,x'; expected whole numbers such as 64,128,256"), (["bench", "--widths", "0"], "halfstep bench: widths is [0]; expected whole numbers from 1"),
    (["bench", "--rounds", "0"], "halfstep bench: rounds is 0; expected a whole number from 1"), (["bench", "--json", "no/such/a.json"], "halfstep bench: --json is 'no/such/a.json', but there is no folder 'no/such'"),
    (["bench", "--widths", "8", "--size", "small"], "halfstep bench: --size is 'small', but with --widths"), (["bench", "--device", "tpu"], "halfstep bench: argument --device: invalid choice: 'tpu'")])
def test_mistakes_are_one_line_and_status_1(arguments, message, capsys):
    from halfstep import cli

    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    lines = capsys.readouterr().err.splitlines()
    assert status == 1 and len(lines) == 1 and lines[0].startswith(message)


def test_the_command_prints_and_writes_and_merge_reads_it(tmp_path):
    done = command("bench", "--widths", "8,16", "--rounds", "1", "--device", "cpu", "--json", tmp_path / "a.json")
    assert done.returncode == 0 and "a training step by width" in done.stdout and f"wrote {tmp_path / 'a.json'}" in done.stdout, done.stderr
    merged = command("merge", tmp_path / "a.json", tmp_path / "a.json", "--json", tmp_path / "rows.json")
    assert merged.returncode == 0 and "width 16" in merged.stdout and len(json.loads((tmp_path / "rows.json").read_text())) == 12, merged.stderr


def test_the_page_states_what_is_measured():
    page, sizes = (docs.DOCS / "bench.md").read_text(), _bench_cases.SIZES["small"]
    for figure in (f"{sizes['parameters']:,} parameters in {_bench_cases.TENSORS} tensors", f"more than {_bench.SLOW} s", f"{_bench.BATCH} rows", "four linear layers", "eight layers", "five modes", "a quarter apart"):
        assert figure in page
    assert (_bench.DEPTH, len(_bench_cases.cases("small")), len(_bench_cases.MODES), _bench.DISTURBED) == (4, 8, 5, 0.25)
    assert f"`--rounds` ({inspect.signature(hs.bench).parameters['rounds'].default})" in page
