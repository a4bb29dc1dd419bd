"""Drives CMake; all build logic is in CMakeLists.txt. `pip install --no-build-isolation .`"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'HALFSTEP_VERSION "(.*)"', (ROOT / "csrc/include/halfstep/version.h").read_text()).group(1)
if not find_spec("torch"):  # said here, in pip's first question, so that it is all that pip prints
    sys.exit("halfstep is built against the torch it will run with, which build isolation hides; run: pip install --no-build-isolation .")
# pip that is called by its path leaves the tools beside it out of PATH.
os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]


def torch_requirement():
    """The libraries work with the torch minor they were built against, and with no other."""
    try:
        return "torch=={}.{}.*".format(*version("torch").split(".")[:2])
    except PackageNotFoundError:
        return "torch>=2.11"


def run(*command):
    if subprocess.call([str(part) for part in command]) != 0:
        sys.exit(f"halfstep: {command[0]} failed; its message is above")


class CMakeBuild(build_ext):
    """Configures, builds and installs into the package; in place (editable) straight into python/halfstep."""

    def run(self):
        missing = [tool for tool in ("cmake", "ninja") if not shutil.which(tool)]
        if missing:
            sys.exit(f"halfstep: {', '.join(missing)} missing, which --no-build-isolation does not fetch; run: pip install 'cmake>=3.24,<4' ninja")
        build = ROOT / ("build-editable" if self.inplace else "build-wheel")
        options = ["-DHALFSTEP_PYTHON=ON", "-DHALFSTEP_TESTS=OFF", "-DHALFSTEP_EXAMPLES=OFF", f"-DPython_EXECUTABLE={sys.executable}",
                   f"-DHALFSTEP_CUDA={os.environ.get('HALFSTEP_CUDA', 'AUTO')}",
                   f"-DHALFSTEP_CUDA_ARCHITECTURES={os.environ.get('HALFSTEP_CUDA_ARCHITECTURES', '')}"]
        if not self.inplace:
            options += ["-DHALFSTEP_RELOCATABLE=ON", f"-DHALFSTEP_PACKAGE_DIR={build}/package"]
        cache = build / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(build)  # the tree was moved or copied
        run("cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *options)
        run("cmake", "--build", build, *(["--parallel", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []))
        if not self.inplace:
            run("cmake", "--install", build, "--prefix", Path(self.build_lib).resolve() / "halfstep")


# setuptools' own build folder would be build/, and what an older build left in it would go into the wheel.
shutil.rmtree(ROOT / "build-wheel/setuptools", ignore_errors=True)
setup(
    version=VERSION,
    license="BSD-3-Clause",  # here, since older and newer setuptools want it written in two ways in pyproject.toml
    install_requires=[torch_requirement()],
    options={"build": {"build_base": "build-wheel/setuptools"}},
    package_dir={"": "python"},
    packages=find_packages("python"),
    ext_modules=[Extension("halfstep._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
