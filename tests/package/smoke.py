"""Run in any folder with a Python that has halfstep installed: does the package hold what it promises, and work?

    python tests/package/smoke.py [--installed]     --installed: also that nothing in it points to where it was built
"""

import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path


def trains(hs, torch):
    p = torch.nn.Parameter(torch.ones(8).half())
    optimizer, scaler = hs.optim.AdamW([p], lr=0.1), hs.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((p * p).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert float(p.detach()[0]) < 1 and scaler.stats().steps_applied == 1


def holds_its_files(hs):
    package = Path(hs.__file__).parent
    for path in (Path(hs.include_path) / "halfstep/halfstep.h", Path(hs.cmake_prefix_path) / "halfstep/halfstepConfig.cmake", package / "lib/libhalfstep.so"):
        assert path.is_file() and path.is_relative_to(package), path
    files = metadata.files("halfstep")
    assert [f for f in files if f.name == "LICENSE" and "Redistribution and use" in f.read_text()], files
    assert metadata.version("halfstep") == hs.__version__, (metadata.version("halfstep"), hs.__version__)


def commands_agree():
    script = subprocess.run([Path(sysconfig.get_path("scripts")) / "halfstep", "doctor"], capture_output=True, text=True)
    module = subprocess.run([sys.executable, "-m", "halfstep", "doctor"], capture_output=True, text=True)
    assert script.returncode == module.returncode == 0, script.stdout + script.stderr + module.stderr
    measured = ("bandwidth", "products", "verdict")  # another time they come out a little differently
    stable = lambda text: [line for line in text.splitlines() if not line.startswith(measured)]
    assert stable(script.stdout) == stable(module.stdout) and len(script.stdout.splitlines()) == len(module.stdout.splitlines())
    return script.stdout


def points_nowhere(hs):
    """Every place that the loader looks in is given relative to the library itself, and no build path is left in a text file."""
    package = Path(hs.__file__).parent
    assert "site-packages" in package.parts, package
    libraries = sorted(package.rglob("*.so"))
    assert len(libraries) >= 2, libraries
    for library in libraries:
        text = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        paths = [p for line in text.splitlines() if "RUNPATH" in line or "RPATH" in line for p in line.split("[")[1].rstrip("]").split(":")]
        assert paths and all(p.startswith("$ORIGIN") for p in paths), (library, paths)
    for text in [*package.rglob("*.cmake"), *package.rglob("*.h"), package / "lib/torch_version"]:
        assert "/torch/lib" not in text.read_text().replace("../torch/lib", ""), text


if __name__ == "__main__":
    import torch

    import halfstep as hs

    trains(hs, torch)
    holds_its_files(hs)
    print(commands_agree(), end="")
    if "--installed" in sys.argv:
        points_nowhere(hs)
    print(f"halfstep {hs.__version__} works: {Path(hs.__file__).parent}")
