"""report.png: four panels of a report."""

import math

from ._extras import need
from ._report import peak, points

COLORS = ("#4269d0", "#e8740c", "#3c9a5f", "#a463f2", "#c7473a", "#8c6d31", "#0f8b8d", "#7f7f7f")


def draw(report, path):
    """Differences with their intervals; time, memory and energy relative to the first arm; scale and skips; lost gradients by layer and step."""
    need("matplotlib.pyplot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.2), layout="constrained")
    FigureCanvasAgg(figure)
    (accuracy, costs), (scales, heat) = figure.subplots(2, 2)
    _differences(accuracy, report)
    _costs(costs, report)
    _scales(scales, report)
    _heat(figure, heat, report)
    figure.savefig(path, dpi=100)


def _nothing(axes, text):
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="#666")
    axes.set(xticks=[], yticks=[])


def short(name, most=24):
    """A name that fits beside a bar."""
    return name if len(name) <= most else name[: most - 1] + "…"


def _differences(axes, report):
    metric, found = report["metric"], report["comparisons"]
    axes.set_title(f"{metric['name']}: difference from {short(report['arms'][0]['name'])}{',' * bool(points(report))}{points(report)}, 90 % interval")
    delta = report["delta"]
    axes.axvspan(-delta, delta, color="#3c9a5f", alpha=0.15, label=f"within delta = {delta:g}")
    axes.axvline(0, color="#666", linewidth=0.8)
    for row, c in enumerate(found):
        for value in c.get("differences") or ():
            axes.plot(value, row + 0.18, ".", color="#888", markersize=5)
        if c.get("interval90"):
            axes.plot(c["interval90"], [row, row], color=COLORS[(row + 1) % len(COLORS)], linewidth=3, solid_capstyle="butt")
            axes.plot(c["mean"], row, "o", color=COLORS[(row + 1) % len(COLORS)])
    axes.set(yticks=range(len(found)), yticklabels=[f"{short(c['arm'])}\n{c['verdict']}" for c in found], ylim=(len(found) - 0.4, -0.6))
    axes.legend(loc="upper right", fontsize=8)
    axes.grid(axis="x", alpha=0.3)


def _costs(axes, report):
    arms = [arm for arm in report["arms"] if arm["summary"]]
    ratios = {c["arm"]: c.get("time_ratio") for c in report["comparisons"]}
    kinds = (("step time", lambda s: s["time_ratio"]), ("peak memory", peak),
             ("training state", lambda s: sum(s["ledger"].values()) if s["ledger"] else None), ("energy", lambda s: s["energy"]["joules_per_step"]))
    kinds = [(name, values) for name, of in kinds for values in [[of({**arm["summary"], "time_ratio": ratios.get(arm["name"], 1.0)}) for arm in arms]] if values[0] and all(values)]
    axes.set_title(f"relative to {short(arms[0]['name'])}")
    if not kinds:
        return _nothing(axes, "no times or sizes in these reports")
    width = 0.8 / len(arms)
    for i, arm in enumerate(arms):
        at = [k - 0.4 + (i + 0.5) * width for k in range(len(kinds))]
        bars = axes.bar(at, [values[i] / values[0] for _, values in kinds], width * 0.92, color=COLORS[i % len(COLORS)], label=short(arm["name"]))
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set(xticks=range(len(kinds)), xticklabels=[name for name, _ in kinds])
    axes.margins(y=0.18)
    axes.axhline(1, color="#666", linewidth=0.8)
    axes.legend(fontsize=8)


def _scales(axes, report):
    shown = [(i, arm) for i, arm in enumerate(report["arms"]) if arm["summary"] and arm["summary"]["scale"]]
    axes.set_title("loss scale (log2) and skipped steps, first seed")
    if not shown:
        return _nothing(axes, "no arm scales its loss")
    for i, arm in shown:
        scale = arm["summary"]["scale"]
        steps, values = zip(*[*scale["points"], [scale["steps"], scale["points"][-1][1]]])
        axes.step(steps, [math.log2(v) for v in values], where="post", color=COLORS[i % len(COLORS)], label=f"{short(arm['name'])}, {len(scale['skipped'])} skipped")
        axes.plot(scale["skipped"], [math.log2(_at(scale["points"], s)) for s in scale["skipped"]], "x", color=COLORS[i % len(COLORS)])
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.margins(y=0.25)
    axes.legend(fontsize=8)


def _at(change_points, step):
    return next(value for begin, value in reversed(change_points) if begin <= step)


def worst_arm(report):
    """The arm whose weight gradients lose most, with its samples; None where no arm was compared with FP32."""
    with_shares = [(arm, next(r["shares"] for r in arm["runs"] if r.get("shares"))) for arm in report["arms"] if any(r.get("shares") for r in arm["runs"])]
    lost = lambda arm: max([layer["lost"] for layer in arm["summary"]["layers"] if layer["kind"] == "weight gradient"] or [0])
    return max(with_shares, key=lambda pair: lost(pair[0]), default=None)


def lost_table(shares):
    """(layers, steps, [[share or None]]) of the non-zero weight gradients that the 16-bit run had as 0."""
    tensors = [i for i, t in enumerate(shares["tensors"]) if t["kind"] == "weight gradient"]
    rows = {i: [None] * len(shares["samples"]) for i in tensors}
    for column, sample in enumerate(shares["samples"]):
        for entry in sample["rows"]:
            if entry[0] in rows and entry[2]:
                rows[entry[0]][column] = entry[7] / entry[2]
    return [shares["tensors"][i]["name"] for i in tensors], [s["step"] for s in shares["samples"]], [rows[i] for i in tensors]


def _heat(figure, axes, report):
    chosen = worst_arm(report)
    if chosen is None:
        axes.set_title("weight gradients lost against FP32")
        return _nothing(axes, "no FP16 arm was compared with FP32")
    names, steps, rows = lost_table(chosen[1])
    axes.set_title(f"{short(chosen[0]['name'])}: non-zero weight gradients that FP16 has as 0, %")
    image = axes.imshow([[math.nan if v is None else 100 * v for v in row] for row in rows], aspect="auto", vmin=0, vmax=100, cmap="magma_r", interpolation="nearest")
    every = max(1, math.ceil(len(names) / 20))
    axes.set(yticks=range(0, len(names), every), yticklabels=[n if len(n) < 25 else "…" + n[-23:] for n in names[::every]], xlabel="step")
    skip = max(1, math.ceil(len(steps) / 8))
    axes.set(xticks=range(0, len(steps), skip), xticklabels=steps[::skip])
    axes.tick_params(axis="y", labelsize=8)
    figure.colorbar(image, ax=axes)
