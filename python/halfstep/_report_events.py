"""A report as TensorBoard events: one folder an arm, so that TensorBoard shows the arms over each other."""

import math
import re

from ._shares import unpacked
from ._tensorboard import Writer

TAGS = {"weight": "weight", "activation": "activation", "activation gradient": "activation_gradient", "weight gradient": "weight_gradient"}


def write(report, folder):
    """amp/loss_scale, amp/skipped_total, amp/found_inf, amp/underflow_share/<layer>/<kind>, amp/headroom_bits/<layer>, train/loss, eval/<metric>, energy/J_per_step."""
    for arm in report["arms"]:
        if not arm["runs"]:
            continue
        with Writer(folder / re.sub(r"[^A-Za-z0-9.=-]+", "_", arm["name"])) as writer:
            run = next((r for r in arm["runs"] if r.get("scale") or r.get("shares")), arm["runs"][0])
            _run(writer, run)
            for run in arm["runs"]:
                for name, value in run["metrics"].items():
                    writer.scalar(f"eval/{name}", float(value), run["seed"])
            energy = arm["summary"]["energy"]["joules_per_step"]
            if energy is not None:
                writer.scalar("energy/J_per_step", energy, run.get("steps") or 0)


def _run(writer, run):
    for step, value in run.get("losses") or ():
        writer.scalar("train/loss", float(value), step)
    scale = run.get("scale")
    if scale:
        for step, value in scale["points"]:
            writer.scalar("amp/loss_scale", value, step)
            writer.scalar("amp/loss_scale_log2", math.log2(value), step)
        before, row = None, 0
        for total, step in enumerate(scale["skipped"], 1):
            row = row + 1 if before == step - 1 else 1
            for tag, value in (("skipped_total", total), ("consecutive_skips", row), ("found_inf", 1)):
                writer.scalar(f"amp/{tag}", value, step)
            before = step
    shares = run.get("shares")
    for packed in shares["samples"] if shares else ():
        for entry in packed["rows"]:
            tensor = shares["tensors"][entry[0]]
            sample(writer, packed["step"], tensor["name"], tensor["kind"], unpacked(entry))


def sample(writer, step, name, kind, found, headroom=True):
    """The Shares of one tensor."""
    if found.nonzero:
        writer.scalar(f"amp/underflow_share/{name}/{TAGS[kind]}", found.underflow / found.nonzero, step)
    if headroom and kind == "weight gradient" and found.headroom is not None:
        writer.scalar(f"amp/headroom_bits/{name}", found.headroom, step)
