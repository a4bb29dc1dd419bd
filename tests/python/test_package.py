"""An outside CMake project configures, builds, trains and links no Python against the installed package."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent
pytestmark = pytest.mark.slow


def run(*command, cwd=None):
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def check(*command, cwd=None):
    code, text = run(*command, cwd=cwd)
    assert code == 0, text[-4000:]
    return text


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    if not shutil.which("cmake") or not shutil.which("ninja"):
        pytest.skip("needs cmake and ninja")
    build, prefix = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("prefix")
    launcher = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
    check("cmake", "-G", "Ninja", "-S", ROOT, "-B", build, f"-DTORCH_DIR={TORCH}", "-DHALFSTEP_CUDA=OFF", "-DHALFSTEP_TESTS=OFF", "-DHALFSTEP_EXAMPLES=OFF",
          f"-DCMAKE_INSTALL_PREFIX={prefix}", *launcher)
    check("ninja", "-C", build, "install")
    return prefix


def outside(build, installed, *options):
    return ["cmake", "-G", "Ninja", "-S", ROOT / "tests/package", "-B", build, f"-DCMAKE_PREFIX_PATH={installed}", *options]


def test_find_package_alone_builds_trains_and_needs_no_python(installed, tmp_path):
    check(*outside(tmp_path, installed, f"-DTORCH_DIR={TORCH}"))
    check("ninja", "-C", tmp_path)
    assert "applied 40" in check(tmp_path / "outside", cwd=tmp_path)
    libraries = check("ldd", tmp_path / "outside")
    assert "libhalfstep.so" in libraries
    assert not [line for line in libraries.splitlines() if "libpython" in line.split("=>")[0] or "libtorch_python" in line.split("=>")[0]]


def test_another_torch_minor_is_refused_with_both_versions(installed, tmp_path):
    fake = tmp_path / "torch"
    (fake / "include/torch/headeronly").mkdir(parents=True)
    (fake / "lib").mkdir()
    (fake / "lib/libtorch_cpu.so").touch()
    (fake / "include/torch/headeronly/version.h").write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 3\n#define TORCH_VERSION_PATCH 1\n")
    code, text = run(*outside(tmp_path / "build", installed, f"-DTORCH_DIR={fake}"))
    flat = " ".join(text.split())
    assert code != 0 and f"built against torch {torch.__version__.split('+')[0]}" in flat and "is torch 2.3.1" in flat


def test_nothing_private_is_exported():
    library = ROOT / "python/halfstep/lib/libhalfstep.so"
    if not library.exists():
        pytest.skip("the library is not built in place")
    names = [line.split(maxsplit=2)[-1] for line in check("nm", "-D", "--defined-only", "-C", library).splitlines()]
    own = [n for n in names if n.startswith("halfstep::")]
    assert own and not [n for n in own if n.startswith(("halfstep::math::", "halfstep::cpu::", "halfstep::ops::", "halfstep::api::"))]
    needed = check("readelf", "-d", library)
    assert "libtorch_python" not in needed and "libpython" not in needed


def test_objects_of_each_instruction_set_define_only_their_own_names():
    """Anything else could be bound by the linker and run AVX-512 code on an older CPU."""
    objects = sorted(ROOT.glob("build*/CMakeFiles/halfstep_isa_*.dir/csrc/cpu/isa/*.o"))
    if not objects:
        pytest.skip("no build tree")
    for item in objects:
        isa = str(item).split("halfstep_isa_")[1].split(".dir")[0]
        for line in check("nm", "--defined-only", "--extern-only", item).splitlines():
            name = line.split()[-1]
            assert f"isa_{isa}" in name or name == f"_ZN8halfstep3cpu{len('kKernels' + isa)}kKernels{isa.capitalize()}E", (item.name, name)


def test_parallel_for_is_parallel():
    """Without -fopenmp at::parallel_for silently runs one thread."""
    library = ROOT / "python/halfstep/lib/libhalfstep.so"
    if not library.exists() or os.cpu_count() < 2:
        pytest.skip("needs the library in place and two cores")
    assert "GOMP_parallel" in check("nm", "-D", library)
