"""halfstep: FP16 training that is fast, small and never silently wrong."""

from . import cli

cli.explain_if_broken()

from ._library import _C, PACKAGE, cuda_status
from . import functional, lr_scheduler, nn, optim, policies
from ._bench import Bench, bench
from ._compare import Comparison, compare
from ._dynamic import DynamicPrecision, PrecisionDecision
from ._evaluate import Evaluation, evaluate
from ._export import ExportReport, export
from ._guard import AccuracyGuard, GuardDecision
from ._islands import islands_
from ._job import Arm, Job
from ._monitor import Monitor, monitor
from ._nonfinite import NonFinite, find_nonfinite
from ._stats import ScalerStats, TensorStats
from ._swap import SwapReport, swap_layers_
from ._tune import Tuning, tune
from .ada_loss import ada_loss_
from .amp import GradScaler, autocast
from .cast import CastReport, cast_model, evaluate_in, export_state_dict, load_state_dict
from .checkpoint import load, save
from .trace import SimResult, record, simulate

__version__ = _C.build_info()["version"]
cmake_prefix_path = str(PACKAGE / "share" / "cmake")
include_path = str(PACKAGE / "include")


def set_overrides(enabled):
    """Switches the CPU kernels that docs/overrides.md lists on or off for this process."""
    _C.set_overrides(bool(enabled))


def doctor():
    """What is installed and works here, as lines of (what, finding)."""
    from .cli import doctor

    return doctor()


__all__ = ["AccuracyGuard", "Arm", "Bench", "CastReport", "Comparison", "DynamicPrecision", "Evaluation", "ExportReport", "GradScaler", "GuardDecision", "Job", "Monitor",
           "NonFinite", "PrecisionDecision", "ScalerStats", "SimResult", "SwapReport", "TensorStats", "Tuning", "ada_loss_", "autocast", "bench", "cast_model", "cmake_prefix_path", "compare",
           "cuda_status", "doctor", "evaluate", "evaluate_in", "export", "export_state_dict", "find_nonfinite", "functional", "include_path", "islands_", "load", "load_state_dict",
           "lr_scheduler", "monitor", "nn", "optim", "policies", "record", "save", "set_overrides", "simulate", "swap_layers_", "tune"]
