import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
try:
    import halfstep  # noqa: F401  an installed package, or the source tree on PYTHONPATH
except ModuleNotFoundError:
    sys.path.insert(0, str(ROOT / "python"))
