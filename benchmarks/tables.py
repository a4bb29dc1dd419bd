"""Writes the tables of README.md and docs/ from benchmarks/results/cpu.json and audit_cpu.json, between `<!-- table: name -->` and `<!-- end -->`;
those named `plain_…` are of plain_cpu.json, a CPU without FP16 or matrix units."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def step(result):
    rows = result["rows"]
    peers = [("chain", "GradScaler + clip + AdamW(fused) + FP16 copy")]
    if "deepspeed_ms" in rows[0]:
        peers.append(("deepspeed", "the same with DeepSpeedCPUAdam"))
    lines = [f"One step over 50 M FP16 parameters (finite check, clip, AdamW, FP16 weights), median over {rows[0]['processes']} processes; "
             f"{result['device']}; torch {result['versions']['torch']}, {result['date']}.", "",
             "| tensors | kernels | halfstep, split16 | " + " | ".join(title for _, title in peers) + " | share of `mul_` bandwidth |",
             "| --- " * (4 + len(peers)) + "|"]
    for r in rows:
        cells = [f"{r['tensors']:,}", r["capability"], f"{r['ours_ms']:.1f} ms"]
        cells += [f"{r[f'{arm}_ms']:.1f} ms ({r[f'ratio_{arm}']:.2f} ×)" for arm, _ in peers] + [f"{r['share_of_mul']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def modes(result):
    lines = [f"One step of AdamW with finite check and clip over 40 M parameters in 4 tensors, every arm stepped in turn in one process; bytes a parameter; resident: growth of a process of "
             f"its own; share: of the bandwidth of a copy; {result['device']}; torch {result['versions']['torch']}, {result['date']}.", "",
             "| mode | held | resident | moved | time | relative | share |", "| --- " * 7 + "|"]
    for r in result["rows"]:
        moved, share = (f"{r['moved']:g}", f"{r['share']:.2f}") if r["moved"] is not None else ("–", "–")
        lines.append(f"| {r['mode']} | {r['held']:.2f} | {r['resident']:.2f} | {moved} | {r['ms']:.1f} ms | {r['relative']:.2f} | {share} |")
    return "\n".join(lines)


def states(result):
    rows = result["rows"]
    lines = [f"Loss on held-out data, mean of {rows[0]['seeds']} seeds; in brackets the mean paired difference to FP32 states and its standard deviation; "
             f"torch {result['versions']['torch']}, {result['date']}.", "",
             "| net | FP32 states (spread) | BF16 states | int8 states |", "| --- " * 4 + "|"]
    for r in rows:
        cells = [f"{r['fp32']['loss']:.4f} (± {r['spread']:.4f})"] + [f"{r[k]['loss']:.4f} ({r[k]['difference']:+.4f} ± {r[k]['deviation']:.4f})" for k in ("bf16", "int8")]
        lines.append(f"| {r['net']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def conv_linear(result):
    lines = [f"Forward + backward, median of interleaved rounds; × is the time over FP32's in the same round, stock is torch without halfstep; {result['device']}; "
             f"torch {result['versions']['torch']}, {result['date']}.", "",
             "| CPU | case | FP32 | FP16 | × | stock FP16 | BF16 | × | stock BF16 |", "| --- " * 9 + "|"]
    for r in result["rows"]:
        cells = [r["environment"], r["case"], f"{r['fp32_ms']:.2f} ms"]
        for key in ("fp16", "bf16"):
            cells += [f"{r[key + '_ms']:.2f} ms", f"{r[key + '_ratio']:.2f}", f"{r[key + '_stock_ms']:.2f} ms"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def backward_stats(result):
    rows = result["rows"]
    lines = [f"Backward + step of SGD under a GradScaler, the fastest of {rows[0]['rounds']} interleaved rounds; {result['device']}; torch {result['versions']['torch']}, {result['date']}.", "",
             "| net | statistics in the step | in the backward | ratio |", "| --- " * 4 + "|"]
    for r in rows:
        cells = [f"{r[f'{arm}_backward_ms']:.2f} + {r[f'{arm}_step_ms']:.2f} ms" for arm in ("pass", "hook")]
        lines.append(f"| {r['case']} | {' | '.join(cells)} | {r['ratio']:.2f} |")
    return "\n".join(lines)


def monitor(result):
    rows = result["rows"]
    lines = [f"CPU time of one training step, the fastest of each kind in interleaved rounds; live file and TensorBoard events on; {result['device']}; torch {result['versions']['torch']}, {result['date']}.", "",
             f"| net | a step | between samples | a sample | every {rows[0]['every']} steps |", "| --- " * 5 + "|"]
    for r in rows:
        lines.append(f"| {r['case']} | {r['step_ms']:.1f} ms | {r['between_ms']:+.2f} ms | {r['sample_ms']:+.1f} ms | {100 * r['overhead']:.2f} % |")
    return "\n".join(lines)


def policies(result):
    rows = result["rows"]
    lines = [f"Seven sigmoid layers on digits, FP16 weights, {rows[0]['steps']:,} steps, a NaN image in every {rows[0]['every']}th batch ({1000 // rows[0]['every']} skips per 1,000 are its own), "
             f"{rows[0]['seeds']} seeds; {result['device']}; torch {result['versions']['torch']}, {result['date']}.", "",
             "| policy | skips per 1,000 | needless | flushed share | final loss | last scale |", "| --- " * 6 + "|"]
    for r in rows:
        lines.append(f"| `{r['policy']}` | {r['skips']:.1f} | {r['needless']:.1f} | {100 * r['flushed']:.3f} ± {100 * r['flushed_spread']:.3f} % | {r['loss']:.4f} ± {r['loss_spread']:.4f} | {r['scale']:g} |")
    return "\n".join(lines)


def layers(result):
    names = {"fp16": "FP16", "fp32": "FP32", "fp16_compiled": "FP16 compiled", "fp32_compiled": "FP32 compiled"}
    lines = [f"Forward + backward, median of interleaved rounds; × is how many times quicker than the quickest of torch in the same round; {result['device']}; "
             f"torch {result['versions']['torch']}, {result['date']}.", "",
             "| CPU | case | halfstep FP16 | " + " | ".join(f"torch {n}" for n in names.values()) + " | × |", "| --- " * (4 + len(names)) + "|"]
    for r in result["rows"]:
        times = [f"{r[k + '_ms']:.2f} ms" if k + "_ms" in r else "–" for k in names]
        lines.append(f"| {r['environment']} | {r['case']} | {r['ours_ms']:.2f} ms | {' | '.join(times)} | {r['ratio']:.2f} |")
    return "\n".join(lines)


def gpt(result):
    lines = [f"One training step of a GPT of 4 layers, width 256, 8 × 256 tokens, vocabulary 8,192: forward, backward, clip, AdamW; median of interleaved rounds; {result['device']}; "
             f"torch {result['versions']['torch']}, {result['date']}.", "", "| | time | over halfstep's |", "| --- " * 3 + "|"]
    return "\n".join(lines + [f"| {r['arm']} | {r['ms']:.1f} ms | {r['ratio']:.2f} |" for r in result["rows"]])


def audit(result):
    lines = ["Forward + backward over FP32's time in the same round, medians of interleaved rounds; in brackets forward and backward alone; stock is torch without halfstep; "
             f"{result['device']}; torch {result['versions']['torch']}, {result['date']}.", "",
             "| case | FP32 | FP16 × | stock FP16 × | autocast × | stock autocast × |", "| --- " * 6 + "|"]

    def ratio(r, key, parts=False):
        if f"{key}_ratio" not in r:
            return "raises"
        both = f" ({r[f'{key}_forward_ratio']:.2f}, {r[f'{key}_backward_ratio']:.2f})" if parts else ""
        return f"{r[f'{key}_ratio']:.2f}{both}"

    for r in result["rows"]:
        cells = [f"{r['fp32_forward_ms'] + r['fp32_backward_ms']:.2f} ms", ratio(r, "fp16", True), ratio(r, "stock_fp16", True), ratio(r, "autocast"), ratio(r, "stock_autocast")]
        lines.append(f"| {r['case']} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"plain_layers": layers, "plain_gpt": gpt, "half_gpt": gpt, "audit": audit, "monitor": monitor, "gpt": gpt, "layers": layers, "layers_hidden": layers, "backward_stats": backward_stats, "states": states, "step": step, "policies": policies, "modes": modes, "conv_linear": conv_linear}


def main():
    results = {}
    for file, prefix in (("cpu", ""), ("audit_cpu", ""), ("plain_cpu", "plain_"), ("half_cpu", "half_")):
        result = json.loads((ROOT / f"benchmarks/results/{file}.json").read_text())
        results |= {prefix + name: rows for name, rows in result.items()}

    def table(match):
        name = match.group(2)
        return match.group(1) + (TABLES[name](results[name]) + "\n" if name in results else "") + match.group(3)

    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = page.read_text()
        new = re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", table, old, flags=re.S)
        if new != old:
            page.write_text(new)


if __name__ == "__main__":
    main()
