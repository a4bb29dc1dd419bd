"""`halfstep tune`."""

from pathlib import Path


def add(commands):
    """Adds it to the parser's commands."""
    run = commands.add_parser("tune", help="the fewest layers in FP32 with which 16 bits are as good as FP32 for this job")
    run.add_argument("make", help="script.py:make, as for compare; `halfstep init` writes one")
    run.add_argument("--margin", default="0.5pp", help="the loss that does not matter: percentage points, or a number in the metric's unit (default 0.5pp)")
    run.add_argument("--seeds", default="8", help="how many seeds, or which: 3,4,5, or one: 3, (default 8)")
    run.add_argument("--arm", default="mixed", help="what is tuned: mixed, autocast, bf16, fp16-s1, or PRESET:key=value,… (default mixed)")
    run.add_argument("--against", default="fp32", metavar="ARM", help="what it must be as good as (default fp32)")
    run.add_argument("--layers", action="append", metavar="GLOB", help="names or globs of the modules to choose from; may be given several times (default: the innermost)")
    run.add_argument("--out", default="tune", metavar="FOLDER", help="folder of policy.json and runs/ (default tune)")
    run.add_argument("--every", type=int, default=50, metavar="STEPS", help="steps between two looks at what FP16 loses (default 50)")
    run.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    run.set_defaults(run=_tune)


def _tune(options):
    from ._compare_cli import _seeds
    from ._tune import tune

    found = tune(options.make, options.margin, _seeds(options.seeds), arm=options.arm, against=options.against, layers=options.layers, out=options.out, every=options.every, device=options.device)
    print(found)
    print(f"wrote {Path(options.out) / 'policy.json'}" if found.islands is not None else "wrote no policy")
    return found.exit_status
