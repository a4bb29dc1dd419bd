"""Drives CMake; all build logic is in CMakeLists.txt. `pip install --no-build-isolation .`"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'HALFSTEP_VERSION "(.*)"', (ROOT / "csrc/include/halfstep/version.h").read_text()).group(1)


class CMakeBuild(build_ext):
    """Configures, builds and installs into the package; in place (editable) straight into python/halfstep."""

    def run(self):
        try:
            import torch  # noqa: F401
        except ImportError:
            sys.exit("halfstep is built against the torch it will run with, which build isolation hides: pip install --no-build-isolation .")
        build = ROOT / ("build-editable" if self.inplace else "build-wheel")
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-DHALFSTEP_PYTHON=ON", "-DHALFSTEP_TESTS=OFF", "-DHALFSTEP_EXAMPLES=OFF",
                     f"-DHALFSTEP_CUDA={os.environ.get('HALFSTEP_CUDA', 'AUTO')}", f"-DPython_EXECUTABLE={sys.executable}"]
        if self._has("ninja"):
            configure += ["-G", "Ninja"]
        if not self.inplace:
            configure += [f"-DHALFSTEP_PACKAGE_DIR={build}/package"]
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", str(build), "--parallel", os.environ.get("MAX_JOBS", str(os.cpu_count()))])
        if not self.inplace:
            package = Path(self.build_lib).resolve() / "halfstep"
            subprocess.check_call(["cmake", "--install", str(build), "--prefix", str(package)])
            self.copy_tree(f"{build}/package", str(package))

    @staticmethod
    def _has(tool):
        from shutil import which

        return which(tool) is not None


setup(
    version=VERSION,
    package_dir={"": "python"},
    packages=["halfstep"],
    ext_modules=[Extension("halfstep._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
