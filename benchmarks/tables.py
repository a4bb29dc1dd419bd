"""Writes the tables of README.md from benchmarks/results/cpu.json, between the `<!-- table: … -->` markers."""

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


def main():
    results = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    readme = ROOT / "README.md"
    text = re.sub(r"(<!-- table: step -->\n).*?(<!-- end -->)", lambda m: m.group(1) + step(results["step"]) + "\n" + m.group(2), readme.read_text(), flags=re.S)
    readme.write_text(text)


if __name__ == "__main__":
    main()
