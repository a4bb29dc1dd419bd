"""The `halfstep` command. It runs even where `import halfstep` fails, and says why."""

import argparse
import platform
import sys


def doctor():
    """Lines of (what, finding), each from a probe that ran."""
    lines = [("python", platform.python_version())]
    try:
        import torch

        lines.append(("torch", f"{torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}"))
    except ImportError as error:
        return lines + [("torch", f"not importable: {error}; pip install torch==2.11.0")]
    try:
        import halfstep
    except ImportError as error:
        return lines + [("halfstep", f"not importable: {error}")]
    lines.append(("halfstep", halfstep.__version__))
    ops = sorted({s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("halfstep::")})
    lines.append(("ops", f"{len(ops)}: {', '.join(ops)}"))
    lines.append(("cuda", halfstep.cuda_status()))
    lines.append(("overrides", "on" if halfstep._C.overrides_enabled() else "off"))
    x = torch.full((4,), 65504.0, dtype=torch.float16)
    stats = torch.ops.halfstep.grad_stats([x, x / 0], [])
    lines.append(("check", "grad_stats finds the bad tensor" if float(stats[-1, 6]) == 1 else f"FAILED: grad_stats gave {stats.tolist()}"))
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(prog="halfstep")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is installed, what works here, and what is wrong")
    parser.parse_args(argv)
    lines = doctor()
    for what, finding in lines:
        print(f"{what:10} {finding}")
    return 1 if any("not importable" in f or f.startswith("FAILED") for _, f in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
