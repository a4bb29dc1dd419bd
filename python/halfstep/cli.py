"""The `halfstep` command. It runs even where `import halfstep` fails, and says why."""

import argparse
import json
import platform
import sys
from pathlib import Path

from . import _compare_cli, _tune_cli, _watch


def doctor():
    """Lines of (what, finding), each from a probe that ran."""
    lines = [("python", platform.python_version())]
    try:
        import torch

        lines.append(("torch", f"{torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}"))
    except ImportError as error:
        return lines + [("torch", f"not importable: {error}; pip install torch==2.11.0")]
    try:
        from . import _library
    except Exception as error:  # whatever keeps the package from loading is the finding
        return lines + [("halfstep", f"not importable: {error}")]
    lines.append(("halfstep", f"{_library._C.build_info()['version']} in {_library.PACKAGE}"))
    ops = sorted({s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("halfstep::")})
    lines.append(("ops", f"{len(ops)}: {', '.join(ops)}"))
    lines.append(("cuda", _library.cuda_status()))
    lines.append(("overrides", "on" if _library._C.overrides_enabled() else "off"))
    lines.append(("CPU path", _library._C.cpu_path()))
    x = torch.full((4,), 65504.0, dtype=torch.float16)
    stats = torch.ops.halfstep.grad_stats([x, x / 0], [])
    lines.append(("check", "grad_stats finds the bad tensor" if float(stats[-1, 6]) == 1 else f"FAILED: grad_stats gave {stats.tolist()}"))
    from . import _doctor

    return lines + _doctor.probes()


def simulate(options):
    """`halfstep simulate`: policies over a recorded run, as one table."""
    try:
        from . import trace
    except Exception as error:  # as in doctor
        print(f"halfstep simulate: halfstep is not importable: {error}", file=sys.stderr)
        return 1
    try:
        recorded = trace.read(options.trace)
        results = [trace.simulate(recorded, trace.policy_of(text), None if text == "recorded" else text) for text in options.policy or ["recorded"]]
        print(trace.table(results))
        if options.plot:
            trace.plot(results, options.plot)
        if options.json:
            Path(options.json).write_text(json.dumps([json.loads(r.to_json()) for r in results]) + "\n")
    except (OSError, ValueError) as error:
        print(f"halfstep simulate: {error}", file=sys.stderr)
        return 1
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line and status 1: 2 is a verdict of compare."""
        self.exit(1, f"{self.prog}: {message} ({self.prog} --help)\n")


def main(argv=None):
    parser = _Parser(prog="halfstep")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is installed, what works here, and what is wrong")
    replay = commands.add_parser("simulate", help="loss-scaling policies over a recorded run (hs.record)")
    replay.add_argument("trace", help="file that hs.record wrote")
    replay.add_argument("--policy", action="append", metavar="NAME[:KEY=VALUE,…]",
                        help="a preset (torch, megatron, …), a policy (static:scale=1024, dynamic:growth_interval=100, …) or recorded; may be given several times")
    replay.add_argument("--plot", metavar="PNG", help="scale, skips and flushed share over the steps")
    replay.add_argument("--json", metavar="FILE", help="every number of every policy")
    _compare_cli.add(commands)
    _tune_cli.add(commands)
    _watch.add(commands)
    options = parser.parse_args(argv)
    if options.command == "simulate":
        return simulate(options)
    if hasattr(options, "run"):
        return _compare_cli.guarded(options)
    lines = doctor()
    for what, finding in lines:
        print(f"{what:10} {finding}")
    return 1 if any("not importable" in f or f.startswith("FAILED") for _, f in lines) else 0


def _started_as_command():
    """Python imports the package before it runs `halfstep …` or `python -m halfstep …`."""
    if sys.argv[:1] == ["-m"]:
        return any(a == "-mhalfstep" or (a, b) == ("-m", "halfstep") for a, b in zip(sys.orig_argv, sys.orig_argv[1:] + [""]))
    return bool(sys.argv) and Path(sys.argv[0]).name == "halfstep"


def explain_if_broken():
    """First line of the package: a command whose package does not load ends here, with the reason and no traceback."""
    if not _started_as_command():
        return
    try:
        from . import _library  # noqa: F401
    except Exception:
        sys.exit(main())


if __name__ == "__main__":
    sys.exit(main())
