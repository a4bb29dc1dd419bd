"""Writes the tables of README.md from benchmarks/results/cpu.json, between the `<!-- table: … -->` markers."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def step(result):
    lines = [f"One step over 50 M FP16 parameters (finite check, clip, AdamW, FP16 weights), median over {result['rows'][0]['processes']} processes; "
             f"{result['device']}; torch {result['versions']['torch']}, {result['date']}.", "",
             "| tensors | halfstep, split16 | GradScaler + clip + AdamW(fused) + FP16 copy | ratio | share of `mul_` bandwidth |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {r['tensors']:,} | {r['ours_ms']:.1f} ms | {r['torch_chain_ms']:.1f} ms | {r['ratio']:.2f} | {r['share_of_mul']:.2f} |" for r in result["rows"]]
    return "\n".join(lines)


def main():
    results = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    readme = ROOT / "README.md"
    text = re.sub(r"(<!-- table: step -->\n).*?(<!-- end -->)", lambda m: m.group(1) + step(results["step"]) + "\n" + m.group(2), readme.read_text(), flags=re.S)
    readme.write_text(text)


if __name__ == "__main__":
    main()
