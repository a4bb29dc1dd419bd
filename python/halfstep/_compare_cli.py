"""`halfstep compare`, `init`, `bench`, `merge`, `explain` and `size`."""

import json
import sys
from pathlib import Path


def add(commands):
    """Adds them to the parser's commands."""
    run = commands.add_parser("compare", help="is mixed precision as good as FP32 for this job, and what does it cost and save")
    run.add_argument("make", nargs="?", help="script.py:make, a function (arm, seed) -> halfstep.Job; `halfstep init` writes one")
    run.add_argument("--seeds", default="8", help="how many seeds, or which: 3,4,5, or one: 3, (default 8)")
    run.add_argument("--arms", action="append", metavar="ARM,…", help="fp32, mixed, autocast, bf16, fp16-s1, or PRESET:key=value,…; the others are compared with the first (default fp32,mixed)")
    run.add_argument("--delta", default="0.5pp", help="the difference that does not matter: percentage points, or a number in the metric's unit (default 0.5pp)")
    run.add_argument("--out", default="compare", metavar="FOLDER", help="folder of report.json, report.html, report.png, events/ (default compare)")
    run.add_argument("--every", type=int, default=50, metavar="STEPS", help="steps between two looks at what FP16 loses (default 50)")
    run.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    run.add_argument("--from", nargs="+", dest="reports", metavar="REPORT", help="compare the arms of these report.json files instead of training")
    run.set_defaults(run=_compare)
    new = commands.add_parser("init", help="writes a commented script for compare, which runs as it is")
    new.add_argument("file", nargs="?", default="train.py")
    new.set_defaults(run=_init)
    machine = commands.add_parser("bench", help="this machine's table: optimizer step, layers and products in FP16 beside FP32, or the width from which mixed precision is quicker")
    machine.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    machine.add_argument("--widths", metavar="WIDTH,…", help="instead, a training step of a net of each of these widths in FP32, mixed precision and autocast: 64,128,256,512,1024")
    machine.add_argument("--size", choices=["small", "large"], help="of layers and step (default small on a CPU, large on a GPU); tables of one size can be merged")
    machine.add_argument("--rounds", type=int, default=7, help="how often each arm runs (default 7)")
    machine.add_argument("--json", metavar="FILE", help="the table for `halfstep merge`")
    machine.set_defaults(run=_bench)
    several = commands.add_parser("merge", help="reports of compare, or tables of bench, of several machines as one table")
    several.add_argument("reports", nargs="+", metavar="REPORT")
    several.add_argument("--json", metavar="FILE", help="the rows of the table")
    several.set_defaults(run=_merge)
    for name, text in (("explain", "what each layer stores, computes, sums and gives in, and its casts"), ("size", "every byte by role, and the operations by dtype")):
        look = commands.add_parser(name, help=text)
        look.add_argument("make", help="script.py:make, as for compare")
        look.add_argument("--arms", action="append", metavar="ARM,…", help="as for compare (default fp32,mixed)")
        look.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
        look.set_defaults(run=_look)


def _seeds(text):
    try:
        return [int(part) for part in text.removesuffix(",").split(",")] if "," in text else int(text)
    except ValueError:
        raise ValueError(f"--seeds is {text!r}; expected a whole number from 1, or seeds such as 3,4,5 (one: 3,)") from None


def _compare(options):
    from . import _compare as compare

    if options.reports:
        if options.make:
            raise ValueError(f"both {options.make!r} and --from; expected one of them")
        found = compare.from_reports(options.reports, options.delta, options.out)
    else:
        if not options.make:
            raise ValueError("no script; expected script.py:make (`halfstep init` writes one), or --from")
        found = compare.compare(options.make, options.arms or "fp32,mixed", _seeds(options.seeds), options.delta, options.out, every=options.every, device=options.device)
    print(found)
    print(f"wrote {Path(options.out) / 'report.html'}")
    return found.exit_status


def _init(options):
    path = Path(options.file)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write((Path(__file__).parent / "_template.py").read_text(encoding="utf-8").replace("train.py", path.name))
    except FileExistsError:
        raise ValueError(f"{path} is there already; name another file") from None
    print(f"wrote {path}; next: halfstep compare {path}:make --seeds 8 --arms fp32,mixed --delta 0.5pp --out r/")
    return 0


def _bench(options):
    from ._bench import bench

    try:
        widths = None if options.widths is None else [int(w) for w in options.widths.split(",")]
    except ValueError:
        raise ValueError(f"--widths is {options.widths!r}; expected whole numbers such as 64,128,256") from None
    if widths is not None and options.size is not None:
        raise ValueError(f"--size is {options.size!r}, but with --widths there are nets of these widths only")
    folder = Path(options.json or ".").parent
    if not folder.is_dir():
        raise ValueError(f"--json is {options.json!r}, but there is no folder {str(folder)!r}")  # before a minute of measuring
    found = bench(options.device, widths, options.size, options.rounds)
    print(found)
    if options.json:
        found.save(options.json)
        print(f"wrote {options.json}")
    return 0


def _merge(options):
    from ._merge import as_text, merge

    rows = merge(options.reports)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    print(as_text(rows))
    return 0


def _look(options):
    from ._compare import _device, _place
    from ._explain import Look
    from ._job import Job, parse_arms
    from ._worker import CannotLoad, load_make, seed_all

    file, name = _place(options.make)
    for number, arm in enumerate(parse_arms(options.arms or "fp32,mixed", _device(options.device))):
        try:
            make = load_make(file, name)
        except CannotLoad as error:
            raise ValueError(str(error)) from None
        seed_all(0)
        job = make(arm, 0)
        if not isinstance(job, Job):
            raise ValueError(f"{options.make}: {name}() returned {type(job).__name__}; expected a halfstep.Job")
        look = Look(arm, job)
        print("\n" * (number > 0) + (f"arm {arm.name}\n{look.explain()}" if options.command == "explain" else look.size()))
    return 0


def guarded(options):
    """options.run, with every error that is the user's as one line and status 1."""
    name = f"halfstep {options.command}"
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print(f"{name}: interrupted" + ("; the same command goes on from here" if options.command == "compare" else ""), file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"{name}: {' '.join(text.split())}", file=sys.stderr)
        return 1
