"""This machine's table: optimizer steps, layers and products in FP16 beside FP32 and torch's FP16, and the width from which mixed precision is quicker (docs/bench.md)."""

import contextlib
import gc
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ._bench_cases import FLOATS, MODES, SIZES, STOCK_STEP, TENSORS, cases, layer_run, product_run, step_run
from ._compare import _device, environment
from ._file import replacing
from ._job import Arm
from ._library import _C
from ._progress import progress
from ._table import table

FORMAT, VERSION = "halfstep-bench", 1
SECTIONS = ("step", "layers", "products", "width")
DISTURBED = 0.25  # median over the arms of the interquartile range over the median
SLOW = 0.4  # seconds: such an arm runs in two rounds only
WIDTH_ARMS = ("fp32", "mixed", "autocast")
DEPTH, BATCH, CLASSES = 4, 128, 10  # of the net of the width sweep


def _clock(device):
    if device == "cpu":
        return time.perf_counter

    def now():
        torch.cuda.synchronize()
        return time.perf_counter()
    return now


@contextlib.contextmanager
def _overrides(on):
    before = _C.overrides_enabled()
    _C.set_overrides(on)
    try:
        yield
    finally:
        _C.set_overrides(before)


def interleaved(arms, rounds, now):
    """[{arm: seconds}] of the rounds, in each of which every arm runs once, the order rotating; {arm: why} for those that cannot run.

    arms: {name: function}, or {name: (function, whether halfstep's CPU kernels are on)}. The first run of each does not count: it allocates and loads libraries.
    """
    reasons, slow, found = {}, set(), []
    for number in range(-1, rounds):
        names = [n for n in arms if n not in reasons and not (n in slow and number >= 2)]
        times = {}
        for name in names[number % len(names):] + names[:number % len(names)] if names else []:
            function, on = arms[name] if isinstance(arms[name], tuple) else (arms[name], True)
            try:
                with _overrides(on):
                    start = now()
                    function()
                    times[name] = now() - start
            except RuntimeError as error:  # torch lacks some dtypes for some layers
                reasons[name] = str(error).strip().splitlines()[0]
        if number >= 0:
            slow |= {name for name, seconds in times.items() if seconds > SLOW}
            found.append(times)
    return found, reasons


def _row(section, case, arm, times, base, reasons, **more):
    """The median time of an arm, its interquartile range over it, and how many times quicker than `base` the arm is: the median of the ratios of one round each."""
    own = sorted(t[arm] for t in times if arm in t)
    both = [t[base] / t[arm] for t in times if arm in t and base in t]
    return {"section": section, "case": case, "arm": arm, "ms": 1e3 * statistics.median(own) if own else None, "speed": statistics.median(both) if both else None,
            "spread": (own[3 * len(own) // 4] - own[len(own) // 4]) / statistics.median(own) if len(own) > 3 else None,
            **({"reason": reasons[arm]} if arm in reasons else {}), **more}


# -- what is measured ------------------------------------------------------------------------------
def _steps(size, device, rounds, now, tell):
    parameters = SIZES[size]["parameters"]
    runs, moved, parts = {}, {}, {}
    for arm in (STOCK_STEP, *MODES):
        run, moved[arm] = step_run(arm, device, parameters)
        parts[arm] = []
        runs[arm] = lambda run=run, arm=arm: parts[arm].append(run(now))
    tell(f"step of {parameters:,} parameters")
    source = torch.ones(4 * parameters, device=device)  # a copy of 16 bytes a parameter and back: beyond any cache, and in the same rounds
    target = torch.empty_like(source)
    times, reasons = interleaved({**runs, "copy": lambda: target.copy_(source)}, rounds, now)
    for arm in runs:
        check = 1e3 * statistics.median(p[0] for p in parts[arm][1:])
        share = statistics.median(moved[arm] / t[arm] / (32 / t["copy"]) for t in times if arm in t)
        yield _row("step", f"{parameters:,} parameters", arm, times, STOCK_STEP, reasons, check_ms=check, moved_bytes=moved[arm], bandwidth_share=share)


def _layers(size, device, rounds, now, tell):
    for case in cases(size):
        tell(case.name)
        arms, reasons = {}, {}
        for name, function, dtype, on in (("FP32, torch", case.stock, torch.float32, False), ("FP16, torch", case.stock, torch.float16, False), ("FP16, halfstep", case.ours, torch.float16, True)):
            try:
                with _overrides(on):
                    arms[name] = layer_run(case, function, dtype, device), on
            except RuntimeError as error:
                reasons[name] = str(error).strip().splitlines()[0]
        times, more = interleaved(arms, rounds, now)
        for name in (*arms, *reasons):
            yield _row("layers", case.name, name, times, "FP32, torch", {**reasons, **more})


def _products(size, device, rounds, now, tell):
    n = SIZES[size]["product"]
    tell(f"products {n} x {n}")
    arms = {name: (product_run(dtype, device, n), True) for name, dtype in FLOATS.items()}
    if device == "cpu":
        arms |= {f"{name}, torch alone": (arms[name][0], False) for name in ("FP16", "BF16")}
    times, reasons = interleaved(arms, rounds, now)
    for name in arms:
        row = _row("products", f"{n} x {n} x {n}", name, times, "FP32", reasons)
        yield {**row, "gflops": None if row["ms"] is None else 2e-6 * n**3 / row["ms"]}


def train_run(arm, width, device):
    """A function: one training step of a net of DEPTH linear layers of width x width on BATCH rows, in an Arm's precision."""
    torch.manual_seed(0)
    layers = [part for _ in range(DEPTH) for part in (torch.nn.Linear(width, width), torch.nn.ReLU())]
    model = arm.apply(torch.nn.Sequential(*layers, torch.nn.Linear(width, CLASSES)).to(device))
    optimizer, scaler = arm.optimizer(torch.optim.AdamW, model.named_parameters(), lr=1e-4), arm.scaler()
    x, y = torch.randn(BATCH, width, device=device), torch.randint(0, CLASSES, (BATCH,), device=device)

    def step():
        with arm.autocast():
            loss = torch.nn.functional.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return step


def _widths(widths, device, rounds, now, tell):
    for width in widths:
        tell(f"width {width}")
        steps = {name: train_run(Arm.parse(name, device), width, device) for name in WIDTH_ARMS}
        start = now()
        steps["fp32"]()
        steps["fp32"]()
        repeats = max(1, min(50, int(0.01 / max((now() - start) / 2, 1e-6))))  # 10 ms are enough for the clock
        times, reasons = interleaved({name: lambda step=step: [step() for _ in range(repeats)] for name, step in steps.items()}, rounds, now)
        times = [{name: seconds / repeats for name, seconds in t.items()} for t in times]
        for name in WIDTH_ARMS:
            yield _row("width", f"width {width}", name, times, "fp32", reasons, width=width)
        gc.collect()


def break_even(rows, arm="mixed"):
    """The smallest measured width from which on `arm` is as quick as fp32 at every larger one; None: at no width that was measured."""
    found = None
    for row in sorted((r for r in rows if r["section"] == "width" and r["arm"] == arm), key=lambda r: -r["width"]):
        if row["speed"] is None or row["speed"] < 1.0:
            break
        found = row["width"]
    return found


# -- the result ------------------------------------------------------------------------------------
@dataclass
class Bench:
    """What hs.bench measured. data: as in the JSON file (docs/bench.md)."""

    data: dict

    @property
    def rows(self):
        return self.data["rows"]

    @property
    def break_even(self):
        """{arm: the smallest width from which on it is as quick as fp32, or None for never}; None without a sweep."""
        return self.data["break_even"]

    def save(self, path):
        """Writes the JSON file, whole or not at all."""
        with replacing(path, text=True) as file:
            json.dump(self.data, file, indent=1, allow_nan=False)
            file.write("\n")

    def __str__(self):
        where = self.data["environment"]
        lines = [f"{where.get('gpu') or where['cpu']}, {where['device']}, {where['threads']} threads, {where['cpu_path']}; halfstep {where['halfstep']}, torch {where['torch']}",
                 "medians of interleaved rounds; x is how many times quicker than the first arm of its kind in the same round"]
        titles = {"step": "one optimizer step: finite check, clip norm, AdamW", "layers": "layers, forward + backward", "products": "products of matrices", "width": "a training step by width"}
        for section in SECTIONS:
            rows = [r for r in self.rows if r["section"] == section]
            if rows:
                lines += ["", titles[section], _section(section, rows)]
        if self.break_even is not None:
            widths = self.data["config"]["widths"]
            for arm, width in self.break_even.items():
                at = f"never, up to {widths[-1]}" if width is None else "at every width measured" if width == widths[0] else f"from width {width} on"
                lines.append(f"{arm} is quicker than fp32: {at}")
        if (self.data["spread"] or 0.0) > DISTURBED:
            lines.append(f"disturbed: half of the times of an arm lie {self.data['spread']:.0%} apart; run it again when nothing else runs here")
        return "\n".join(lines)

    __repr__ = __str__


def _form(value, form):
    return "–" if value is None else form.format(value)


def _section(section, rows):
    extra = {"step": (("check", "check_ms", "{:.2f} ms"), ("moves", "moved_bytes", "{:g} B"), ("bandwidth", "bandwidth_share", "{:.0%} of a copy")), "products": (("rate", "gflops", "{:.0f} GFLOP/s"),)}.get(section, ())
    lines = [[rows[0]["case"] if section in ("step", "products") else "", "arm", "time", "x", *(name for name, _, _ in extra)]]
    for i, r in enumerate(rows):
        case = "" if section in ("step", "products") or i and rows[i - 1]["case"] == r["case"] else r["case"]
        lines.append([case, r["arm"], _form(r["ms"], "{:.2f} ms") if "reason" not in r else r["reason"][:40], _form(r["speed"], "{:.2f}"), *(_form(r[key], form) for _, key, form in extra)])
    return table(lines, left=(0, 1))


def bench(device="auto", widths=None, size=None, rounds=7):
    """Measures this machine in about a minute and returns a Bench, which prints as a table.

    Without `widths`: an AdamW step in several modes beside torch's GradScaler + clip + AdamW, eight layers, products by dtype. With `widths`, whole numbers: a
    training step of an MLP of each width in FP32, mixed precision and autocast, and the width from which on they are quicker than FP32, "never" included.
    device: "auto", "cpu" or "cuda". size: "small" or "large"; None: small on a CPU, large on a GPU. Tables of unequal sizes are not merged.
    """
    device = _device(device)
    size = ("large" if device == "cuda" else "small") if size is None else size
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds is {rounds!r}; expected a whole number from 1")
    if widths is not None:
        widths = [widths] if isinstance(widths, int) else list(widths)
        if not widths or any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in widths):
            raise ValueError(f"widths is {widths}; expected whole numbers from 1")
        widths = sorted(set(widths))
    now, rows = _clock(device), []
    count = len(widths) if widths else 2 + len(cases(size))
    with progress(count) as bar:
        running = []

        def tell(label):
            if running:
                bar.end()
            running[:] = [label]
            bar.begin(label)

        parts = [_widths(widths, device, rounds, now, tell)] if widths else [part(size, device, rounds, now, tell) for part in (_steps, _layers, _products)]
        for part in parts:
            rows += part
            gc.collect()
        bar.end()
    config = {"size": None if widths else size, "rounds": rounds, "widths": widths, "cases": list(dict.fromkeys(r["case"] for r in rows)),
              "net": {"depth": DEPTH, "batch": BATCH, "classes": CLASSES} if widths else None, "tensors": None if widths else TENSORS}
    spreads = [r["spread"] for r in rows if r["spread"] is not None]
    return Bench({"format": FORMAT, "version": VERSION, "environment": environment(device), "config": config, "rows": rows, "spread": statistics.median(spreads) if spreads else None,
                  "break_even": {arm: break_even(rows, arm) for arm in WIDTH_ARMS[1:]} if widths else None})


# -- files of several machines ---------------------------------------------------------------------
_ROW = {"section": str, "case": str, "arm": str, "ms": (int, float, type(None)), "speed": (int, float, type(None))}


def validate(data, where):
    """`data` if it is a table of `halfstep bench` that this version reads; else a ValueError that names the field."""
    if data.get("version") != VERSION:
        raise ValueError(f"{where} is a halfstep bench table of version {data.get('version')!r}; this halfstep reads version {VERSION}")
    for key, kind in (("environment", dict), ("config", dict), ("rows", list)):
        if not isinstance(data.get(key), kind):
            raise ValueError(f"{where}: {key!r} is {type(data.get(key)).__name__}; expected {'an object' if kind is dict else 'a list'}")
    if not data["rows"]:
        raise ValueError(f"{where}: 'rows' is empty")
    for i, row in enumerate(data["rows"]):
        for key, kind in _ROW.items():
            if not isinstance(row, dict) or not isinstance(row.get(key), kind) or isinstance(row.get(key), bool):
                found = type(row.get(key)).__name__ if isinstance(row, dict) else type(row).__name__
                raise ValueError(f"{where}: rows[{i}]: {key!r} is {found}; expected {'text' if kind is str else 'a number'}")
    return data


def merge(tables):
    """Rows [{machine, device, section, case, arm, ms, speed}] of [(path, table)]; ValueError where two were not made with the same configuration."""
    path, first = tables[0]
    for other, data in tables[1:]:
        for key in dict.fromkeys((*first["config"], *data["config"])):
            mine, theirs = first["config"].get(key), data["config"].get(key)
            if mine != theirs:
                raise ValueError(f"{key} differs: {json.dumps(mine)} in {path}, {json.dumps(theirs)} in {other}")
    rows, names = [], []
    for path, data in tables:
        where = data["environment"]
        name = str(where.get("gpu") or where.get("cpu") or Path(path).stem)
        name = f"{name} ({Path(path).stem})" if name in names else name
        names.append(name)
        rows += [{"machine": name, "device": where.get("device", "?"), **{key: row[key] for key in _ROW}} for row in data["rows"]]
    return rows


def as_text(rows):
    """One line an arm, one pair of columns a machine: its time, and how many times quicker it is than that machine's first arm."""
    machines = list(dict.fromkeys(r["machine"] for r in rows))
    cells = [["", ""] + [cell for i in range(len(machines)) for cell in (f"[{i + 1}] ms", "x")]]
    for case, arm in dict.fromkeys((r["case"], r["arm"]) for r in rows):
        found = {r["machine"]: r for r in rows if (r["case"], r["arm"]) == (case, arm)}
        shown = case if not cells[1:] or all(row[0] != case for row in cells) else ""
        cells.append([shown, arm] + [cell for m in machines for cell in ((_form(found[m]["ms"], "{:.2f}"), _form(found[m]["speed"], "{:.2f}")) if m in found else ("–", "–"))])
    legend = [f"[{i + 1}] {m}, {next(r['device'] for r in rows if r['machine'] == m)}" for i, m in enumerate(machines)]
    return "\n".join([*legend, "x: how many times quicker than the first arm of its kind on the same machine", "", table(cells, left=(0, 1))])
