"""report.html: one file without a script or anything to fetch. Text is HTML, so that it keeps its size on a small screen; only lines and areas are drawn."""

import math
from html import escape

from ._report import percent, points, warnings
from ._report_png import COLORS, lost_table, short
from ._statistics import BETTER, EQUIVALENT, UNDECIDED, WORSE

MOST_LAYERS = 40  # of a heat map; more are cut to those that lose most
_MARK = {EQUIVALENT: ("good", "✓"), BETTER: ("good", "▲"), WORSE: ("bad", "✗"), UNDECIDED: ("open", "?")}
_PHASES = (("data", "data", "#9aa5b1"), ("forward", "forward", "#4269d0"), ("backward", "backward", "#a463f2"), ("check", "unscale + check", "#e8740c"), ("optimizer", "optimizer", "#3c9a5f"))
_ROLES = (("weights", "#4269d0"), ("gradients", "#a463f2"), ("masters", "#e8740c"), ("states", "#3c9a5f"), ("buffers", "#9aa5b1"))
_DTYPE = {"float16": "FP16", "float32": "FP32", "float64": "FP64"}
_STYLE = """
*{box-sizing:border-box}body{margin:0;background:#f4f5f7;color:#1d2530;font:15px/1.45 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1160px;margin:0 auto;padding:20px 16px 40px}h1{font-size:22px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}h2{font-size:17px;margin:28px 0 8px}h3{font-size:15px;margin:0 0 6px;overflow-wrap:anywhere}
p{margin:4px 0}.dim{color:#5b6673;font-size:13px;overflow-wrap:anywhere}.grid{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(340px,100%),1fr))}
.card{background:#fff;border:1px solid #dde1e6;border-radius:8px;padding:12px 14px;min-width:0}.card.good{border-left:6px solid #2e8b57}.card.bad{border-left:6px solid #c0392b}.card.open{border-left:6px solid #c98a00}
.verdict{font-size:20px;font-weight:650;margin:0 0 2px}.good .verdict{color:#1f6e43}.bad .verdict{color:#a93226}.open .verdict{color:#8a5f00}
.warn{background:#fdf0ee;border:1px solid #eec4bd;border-radius:8px;padding:8px 12px;margin:8px 0;overflow-wrap:anywhere}.note{background:#fff8e6;border-color:#ead9a6}
.track{position:relative;height:34px;margin:10px 0 2px;background:#eef0f3;border-radius:4px;overflow:hidden}.track i{position:absolute;display:block}
.ends{display:flex;justify-content:space-between;gap:8px;font-size:12px;color:#5b6673}.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(116px,1fr));gap:8px 12px;margin:8px 0 0}
.facts b{display:block;font-size:17px;font-weight:600;overflow-wrap:anywhere}.facts span{display:block;font-size:12px;color:#5b6673}
.bar{display:flex;height:20px;border-radius:4px;overflow:hidden;background:#eef0f3;margin:2px 0 4px}.bar i{display:block;height:100%}.row{margin:0 0 12px}.row .ends{font-size:13px;color:#1d2530}.row .ends span{overflow-wrap:anywhere;min-width:0}.row .ends b{white-space:nowrap}
.legend{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:13px;margin:0 0 10px}.legend i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:5px}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}th,td{padding:3px 6px 3px 0;text-align:right;border-bottom:1px solid #eceef1;vertical-align:top}
th{font-weight:600;color:#5b6673}th:first-child,td:first-child{text-align:left;overflow-wrap:anywhere}td.whole{white-space:nowrap}td.hot{color:#a93226;font-weight:600}
.plot{display:grid;grid-template-columns:auto 1fr;gap:0 8px;font-size:12px;color:#5b6673}.plot .y{display:flex;flex-direction:column;justify-content:space-between;text-align:right}.plot svg{width:100%;height:130px;background:#f7f8fa;display:block}
.heat{display:grid;grid-template-columns:minmax(60px,30%) 1fr;gap:2px 8px;font-size:12px;align-items:center}.heat .name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;direction:rtl;text-align:left}
.cells{display:flex;height:15px}.cells i{flex:1 1 0;min-width:0}.scale{height:8px;border-radius:4px;margin-top:6px}
details{margin:8px 0}summary{cursor:pointer;font-weight:600;font-size:14px}code{font:12.5px/1.5 ui-monospace,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere;white-space:pre-wrap}
@media(max-width:520px){main{padding:14px 10px 30px}th,td{padding-right:4px;font-size:12px}}
"""


def page(report):
    """The page as text."""
    metric, arms = report["metric"], report["arms"]
    others = ", ".join(short(arm["name"]) for arm in arms[1:]) or "nothing"
    head = f"{others} against {short(arms[0]['name'])}"
    runs = max(len(arm["runs"]) for arm in arms)
    what = (report["config"] or {}).get("make") or ", ".join(map(str, (report["config"] or {}).get("from", ())))
    body = [f"<h1>{escape(head)}</h1>", f'<p class="dim">{escape(what)} · {runs} paired run{"s" * (runs != 1)} · {escape(metric["name"])} ({metric["better"]} is better) · delta {report["delta"]:g}{points(report)}</p>',
            *_warnings(report), _section("Verdict", _grid(_verdict(c, report) for c in report["comparisons"])),
            _section("At a glance", _grid(_glance(arm, report) for arm in arms), _no_energy(report)), _times(report), _ledgers(report), _matrices(report), _scales(report), _losses(report),
            _runs(report), _origin(report)]
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(head)}</title>'
            f"<style>{_STYLE}</style></head>\n<body><main>\n" + "\n".join(part for part in body if part) + "\n</main></body></html>\n")


def _section(title, inside, lead=""):
    return f"<section><h2>{escape(title)}</h2>{f'<p class=dim>{lead}</p>' if lead else ''}{inside}</section>" if inside else ""


def _grid(parts):
    inside = "".join(parts)
    return f'<div class="grid">{inside}</div>' if inside else ""


def _warnings(report):
    for arm in report["arms"]:
        if arm.get("failed"):
            f = arm["failed"]
            yield f'<div class="warn"><b>{escape(arm["name"])} failed</b> with seed {f["seed"]}: {escape(f["line"])}<br><span class="dim">log: {escape(f["log"])}</span></div>'
        for line in warnings(arm):
            yield f'<div class="warn"><b>{escape(arm["name"])}</b>: {escape(line)}</div>'
    for note in report["notes"]:
        yield f'<div class="warn note">{escape(note)}</div>'


# -- the verdict -----------------------------------------------------------------------------------
def _verdict(c, report):
    kind, mark = _MARK[c["verdict"]]
    unit, lines = points(report), []
    if c.get("interval90"):
        lines.append(f"difference <b>{c['mean']:+.2f}{unit}</b>, 90 % interval {c['interval90'][0]:+.2f} to {c['interval90'][1]:+.2f}{unit}")
    if c["verdict"] == UNDECIDED and c.get("more"):
        lines.append(f"<b>run {c['more']} more</b> ({c['needed']} pairs in all)")
    if c.get("note"):
        lines.append(escape(c["note"]))
    small = []
    if c.get("bootstrap95"):
        small.append(f"bootstrap 95 %: {c['bootstrap95'][0]:+.2f} to {c['bootstrap95'][1]:+.2f}{unit}")
    if c.get("sd") is not None:
        small.append(f"sd of the paired difference {c['sd']:.2f}{unit}")
    if c.get("mcnemar"):
        m = c["mcnemar"]
        p = "&lt; 1e-12" if m["p"] < 1e-12 else f"= {m['p']:.2g}"
        small.append(f"items lost {m['lost']}, won {m['won']} over {m['items']} items and {c['n']} seeds (p {p})")
    if c.get("worst_class"):
        w = c["worst_class"]
        small.append(f"worst class {escape(str(w['label']))}: {100 * w['change']:+.1f} points of its {w['items']} items")
    return (f'<div class="card {kind}"><h3>{escape(c["arm"])}</h3><p class="verdict">{mark} {c["verdict"]}</p>' + "".join(f"<p>{line}</p>" for line in lines) + _track(c, report)
            + "".join(f'<p class="dim">{line}</p>' for line in small) + "</div>")


def _track(c, report):
    """The interval against the band of delta; a dot a pair."""
    if not c.get("differences"):
        return ""
    delta, unit = report["delta"], points(report)
    reach = 1.15 * max([1.2 * delta, *map(abs, c["differences"]), *(map(abs, c["interval90"]) if c.get("interval90") and c["n"] > 2 else ())])
    at = lambda x: 50 + 50 * max(-1.0, min(1.0, x / reach))
    marks = [f'<i style="left:{at(-delta):.2f}%;width:{max(at(delta) - at(-delta), 0.4):.2f}%;top:0;bottom:0;background:#cfe8d8"></i>', '<i style="left:50%;width:1px;top:0;bottom:0;background:#8893a0"></i>']
    marks += [f'<i style="left:calc({at(d):.2f}% - 3px);width:6px;height:6px;border-radius:3px;top:5px;background:#8893a0"></i>' for d in c["differences"]]
    if c.get("interval90"):
        low, high = map(at, c["interval90"])
        marks += [f'<i style="left:{low:.2f}%;width:{max(high - low, 0.5):.2f}%;top:19px;height:6px;background:#1d2530"></i>',
                  f'<i style="left:calc({at(c["mean"]):.2f}% - 5px);width:10px;height:10px;border-radius:5px;top:17px;background:#1d2530"></i>']
    return (f'<div class="track">{"".join(marks)}</div><div class="ends"><span>{-reach:.3g}{unit}</span><span>0</span><span>+{reach:.3g}{unit}</span></div>'
            f'<p class="dim">green: within delta; bar: 90 % interval; dots: one a seed</p>')


# -- cost ------------------------------------------------------------------------------------------
def _bytes(value):
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f} B"


def _ms(seconds):
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _glance(arm, report):
    s = arm["summary"]
    if s is None:
        return f'<div class="card"><h3>{escape(arm["name"])}</h3><p>no finished run</p></div>'
    found = next((c for c in report["comparisons"] if c["arm"] == arm["name"]), {})
    facts = [(report["metric"]["name"], "not finite" if s["mean"] is None else f"{s['mean']:.2f}{'' if s['sd'] is None else ' ± ' + format(s['sd'], '.2f')}{' %' * (report['metric']['unit'] == '%')}")]
    time = ((s["time"] or {}).get("step") or {}).get("median")
    if time is not None:
        facts.append(("a step" + (f", × {found['time_ratio']:.2f}" if found.get("time_ratio") else ""), _ms(time)))
    if s["cuda_peak_bytes"] is not None:
        facts.append(("peak memory of the card", _bytes(s["cuda_peak_bytes"])))
    if s["peak_bytes"] is not None:
        facts.append(("peak memory" + (f", × {found['memory_ratio']:.2f}" if found.get("memory_ratio") else ""), _bytes(s["peak_bytes"])))
    if s["peak_growth_bytes"] is not None:
        facts.append(("of it since make()", _bytes(max(s["peak_growth_bytes"], 0))))
    if s["ledger"]:
        facts.append(("training state", _bytes(sum(s["ledger"].values()))))
    joules = s["energy"]["joules_per_step"]
    facts.append(("energy a step" + (f", {s['energy']['method']}" if joules is not None else ""), "null" if joules is None else f"{joules:.3g} J"))
    if s["steps"]:
        facts.append((f"steps skipped of {s['steps']:,}", f"{s['skipped']:,}"))
    if s["scale"]:
        facts.append(("scale at the end", f"2^{math.log2(s['scale']['points'][-1][1]):g}"))
        facts.append(("stable from step", "–" if s["scale"]["stable_from"] is None else f"{s['scale']['stable_from']:,}"))
    return f'<div class="card"><h3>{escape(arm["name"])}</h3>{_facts(facts)}</div>'


def _facts(facts):
    return f'<div class="facts">{"".join(f"<div><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in facts)}</div>'


def _no_energy(report):
    """Why there is no energy, once a reason."""
    reasons = sorted({arm["summary"]["energy"]["reason"] for arm in report["arms"] if arm["summary"]} - {None})
    return " ".join(f"Energy is null: {escape(reason)}." for reason in reasons)


def _between(quartiles):
    """The quartiles in milliseconds, with no more digits than they need."""
    return "" if quartiles["q1"] is None or quartiles["q3"] is None else f", {1e3 * quartiles['q1']:.2g} to {1e3 * quartiles['q3']:.2g}"


def _legend(entries):
    return '<div class="legend">' + "".join(f'<span><i style="background:{color}"></i>{escape(text)}</span>' for text, color in entries) + "</div>"


def _bars(rows, legend):
    """rows: (name, text at the right, [(value, color)], HTML below); all on one scale."""
    most = max([sum(v for v, _ in parts) for _, _, parts, _ in rows] or [0])
    if not most:
        return ""
    html = [f'<div class="row"><div class="ends"><span>{escape(name)}</span><b>{escape(text)}</b></div><div class="bar">' + "".join(f'<i style="width:{100 * v / most:.3f}%;background:{color}"></i>' for v, color in parts)
            + f"</div>{small}</div>" for name, text, parts, small in rows]
    return f'<div class="card">{_legend(legend)}{"".join(html)}</div>'


def _times(report):
    rows = []
    for arm in report["arms"]:
        time = (arm["summary"] or {}).get("time")
        if time and time["step"]["median"] is not None:
            known = [(key, label, color) for key, label, color in _PHASES if time[key]["median"] is not None]
            first = arm["summary"]["first_step"]
            facts = [(label + _between(time[key]), _ms(time[key]["median"])) for key, label, _ in known] + ([("the first step", _ms(first))] if first is not None else [])
            rows.append((arm["name"], _ms(time["step"]["median"]), [(time[key]["median"], color) for key, _, color in known] or [(time["step"]["median"], _PHASES[0][2])], _facts(facts) if facts else ""))
    return _section("Time of a step", _bars(rows, [(label, color) for _, label, color in _PHASES]), "Medians after the warm-up and their quartiles; steps that were looked at do not count.") if rows else ""


def _ledgers(report):
    rows = []
    for arm in report["arms"]:
        held = (arm["summary"] or {}).get("ledger")
        if held:
            rows.append((arm["name"], _bytes(sum(held.values())), [(held.get(role, 0), color) for role, color in _ROLES], _facts([(role, _bytes(held[role])) for role, _ in _ROLES if held.get(role)])))
    return _section("Training state", _bars(rows, list(_ROLES)), "Bytes of distinct storages between two steps, gradients included; activations are in peak memory only.")


# -- numerics --------------------------------------------------------------------------------------
def _matrices(report):
    cards = []
    for arm in report["arms"]:
        found = (arm["summary"] or {}).get("matrix")
        if not found:
            continue
        name, factor = report["metric"]["name"], report["metric"]["factor"]
        errors = any("max_error" in e for e in found.values())
        rows = []
        for key, entry in found.items():
            if "reason" in entry:
                rows.append(f'<tr><td class="whole">{_DTYPE.get(key, escape(key))}</td><td colspan="{3 if errors else 1}">{escape(entry["reason"])[:160]}</td></tr>')
                continue
            cells = [f"{factor * float(entry['metrics'].get(name, 'nan')):.2f}"] + ([f"{float(entry.get(k, 'nan')):.1e}" if entry.get(k) else "0" for k in ("max_error", "mean_error")] if errors else [])
            rows.append(f'<tr><td class="whole">{_DTYPE.get(key, escape(key))}</td>' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
        heads = ["in", name, *(["max error", "mean error"] if errors else [])]
        cards.append(f'<div class="card"><h3>trained in {escape(arm["name"])}</h3><table><tr>{"".join(f"<th>{escape(h)}</th>" for h in heads)}</tr>{"".join(rows)}</table></div>')
    return _section("Evaluated in FP16, FP32, FP64", _grid(cards), "Exact weights of the first seed; errors of the logits against FP64.")


def _scales(report):
    cards = []
    for i, arm in enumerate(report["arms"]):
        scale = (arm["summary"] or {}).get("scale")
        if not scale or not scale["points"]:
            continue
        logs = [(step, math.log2(value)) for step, value in scale["points"]] + [(scale["steps"], math.log2(scale["points"][-1][1]))]
        low, high = min(v for _, v in logs) - 1, max(v for _, v in logs) + 1
        x, y = lambda s: 1000 * (s - 1) / max(scale["steps"] - 1, 1), lambda v: 100 - 100 * (v - low) / (high - low)
        line, before = [], logs[0][1]
        for step, value in logs:
            line += [f"{x(step):.2f},{y(before):.2f}", f"{x(step):.2f},{y(value):.2f}"]
            before = value
        skips = "".join(f'<line x1="{x(s):.2f}" x2="{x(s):.2f}" y1="92" y2="100" stroke="#c0392b" stroke-width="2" vector-effect="non-scaling-stroke"/>' for s in scale["skipped"][:2000])
        text = f"{len(scale['skipped'])} skipped of {scale['steps']:,}" + (f", at most {scale['longest']} in a row" if scale["skipped"] else "")
        cards.append(f'<div class="card"><h3>{escape(arm["name"])}</h3><div class="plot"><div class="y"><span>2^{high:g}</span><span>2^{low:g}</span></div><svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="loss scale over the steps">'
                     f'<polyline points="{" ".join(line)}" fill="none" stroke="{COLORS[i % len(COLORS)]}" stroke-width="2" vector-effect="non-scaling-stroke"/>{skips}</svg><span></span>'
                     f'<div class="ends"><span>step 1</span><span>{scale["steps"]:,}</span></div></div><p class="dim">{text}; red: skipped steps</p></div>')
    return _section("Loss scale", _grid(cards))


def _color(share):
    """White through orange to dark red."""
    stops = ((0.0, (247, 248, 250)), (0.001, (255, 243, 214)), (0.1, (253, 200, 120)), (0.5, (226, 95, 50)), (1.0, (120, 20, 30)))
    for (a, low), (b, high) in zip(stops, stops[1:]):
        if share <= b:
            part = (share - a) / (b - a)
            return "#" + "".join(f"{round(p + part * (q - p)):02x}" for p, q in zip(low, high))
    return "#78141e"


def _losses(report):
    cards = []
    for arm in report["arms"]:
        packed = next((r["shares"] for r in arm["runs"] if r.get("shares")), None)
        if packed and packed["samples"]:
            cards.append(f'<div class="card"><h3>{escape(arm["name"])}</h3>{_heat(packed)}{_tables(arm["summary"]["layers"])}</div>')
    lead = ("Weight gradients that an FP32 run of the same batch on the exact weights has as non-zero and the FP16 run has as 0. Below: underflow is what FP16 would hold as 0 at the scale, subnormal what it would hold "
            "with fewer bits, lost what the run really had as 0 (it may have vanished on the way), all as shares of the FP32 non-zeros; headroom: bits that the largest stays below 65504.")
    return _section("What FP16 loses", _grid(cards), lead)


def _heat(packed):
    names, steps, rows = lost_table(packed)
    if not names:
        return ""
    note = ""
    if len(names) > MOST_LAYERS:
        worst = sorted(range(len(names)), key=lambda i: -max([v for v in rows[i] if v is not None] or [0]))[:MOST_LAYERS]
        note = f'<p class="dim">the {MOST_LAYERS} of {len(names)} tensors that lose most</p>'
        names, rows = [names[i] for i in sorted(worst)], [rows[i] for i in sorted(worst)]
    cells = lambda row: "".join(f'<i style="background:{"#fff" if v is None else _color(v)}" title="step {step}: {"no gradient" if v is None else percent(v)}"></i>' for step, v in zip(steps, row))
    lines = "".join(f'<span class="name" title="{escape(name)}"><bdi>{escape(name)}</bdi></span><div class="cells">{cells(row)}</div>' for name, row in zip(names, rows))
    ends = f"<span>step {steps[0]}</span><span>{steps[-1]}</span>" if len(steps) > 1 else f"<span>step {steps[0]}</span>"
    ramp = ",".join(f"{_color(i / 20)} {5 * i}%" for i in range(21))
    return (f'{note}<div class="heat">{lines}<span></span><div class="ends">{ends}</div><span class="name">lost</span><div><div class="scale" style="background:linear-gradient(90deg,{ramp})"></div>'
            f'<div class="ends"><span>0 %</span><span>100 %</span></div></div></div>')


def _tables(layers):
    parts = []
    for kind, is_open in (("weight gradient", True), ("activation gradient", False), ("activation", False), ("weight", False)):
        of_kind = [layer for layer in layers if layer["kind"] == kind]
        if not of_kind:
            continue
        columns = [("lost", "lost")] * (kind == "weight gradient") + [("underflow", "under-flow"), ("subnormal", "sub-normal")] + [("overflow", "over-flow")] * any(layer["overflow"] for layer in of_kind)
        heads = "".join(f"<th>{label.replace('-', '&shy;')}</th>" for _, label in columns)
        rows = "".join(f"<tr><td>{escape(layer['name'])}</td>" + "".join(f'<td class="{"hot" if key != "subnormal" and layer[key] >= 0.01 else ""}">{percent(layer[key]).replace("< ", "&lt;")}</td>' for key, _ in columns)
                       + f"<td>{'–' if layer['headroom'] is None else format(layer['headroom'], '.1f')}</td></tr>" for layer in of_kind)
        parts.append(f"<details{' open' * is_open}><summary>{kind}s</summary><table><tr><th>{'layer' if 'activation' in kind else 'tensor'}</th>{heads}<th>head&shy;room</th></tr>{rows}</table></details>")
    return "".join(parts)


# -- where it comes from ---------------------------------------------------------------------------
def _runs(report):
    seeds = sorted({run["seed"] for arm in report["arms"] for run in arm["runs"]})
    metric, factor = report["metric"]["name"], report["metric"]["factor"]
    tables = []
    for arm in report["arms"]:
        values = {run["seed"]: factor * float(run["metrics"][metric]) for run in arm["runs"]}
        tables.append(f"<h3>{escape(arm['name'])}</h3><p class=dim>" + "; ".join(f"seed {s}: {values[s]:.2f}" for s in seeds if s in values) + "</p>")
    return f'<section><details><summary>{escape(metric)} of each run</summary><div class="card">{"".join(tables)}</div></details></section>'


def _origin(report):
    rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in {**report["environment"], **report["config"]}.items())
    options = "".join(f"<p class=dim>{escape(arm['name'])}: {escape(', '.join(f'{k}={v}' for k, v in arm['options'].items() if v is not None))}</p>" for arm in report["arms"] if arm.get("options"))
    command = f"<p><code>{escape(report['command'])}</code></p>" if report["command"] else ""
    return f'<section><h2>Made by</h2><div class="card">{command}{options}<details><summary>environment</summary><table>{rows}</table></details></div></section>'
