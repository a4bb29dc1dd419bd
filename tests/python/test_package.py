"""Outside projects against the installed package: they configure, build, train and link no Python. What the libraries export."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent
PACKAGE = ROOT / "python/halfstep"
pytestmark = pytest.mark.slow
# find_package(Torch) with a toolkit and no card takes architectures that the toolkit no longer knows.
ENV = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0")}
LAUNCHER = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []


def run(*command, cwd=None, env=ENV):
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout + done.stderr


def check(*command, cwd=None, env=ENV):
    code, text = run(*command, cwd=cwd, env=env)
    assert code == 0, text[-4000:]
    return text


def needs(*tools):
    missing = [t for t in tools if not shutil.which(t)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")


def without_python(folder):
    """A PATH that has what a C++ programmer has, and no Python."""
    needs("cmake", "g++", "ninja", "bash")
    folder.mkdir()
    real = {}
    for tool in ("cmake", "ninja"):  # those that pip installed are Python scripts; the programs lie behind them
        try:
            module = __import__(tool)
            real[tool] = Path(getattr(module, {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}[tool])) / tool
        except ImportError:
            real[tool] = shutil.which(tool)
    for tool in ["bash", "sh", "g++", "gcc", "c++", "cc", "ld", "as", "ar", "ranlib", "nm", "readelf", "dirname", "id", "mkdir", "cat", "sed", "grep", "nproc", "uname",
                 "ccache"]:
        if shutil.which(tool):
            real[tool] = shutil.which(tool)
    for tool, path in real.items():
        (folder / tool).symlink_to(path)
    return ENV | {"PATH": str(folder)}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """`make install-cpp`, where there is no Python."""
    top = tmp_path_factory.mktemp("cpp")
    env = without_python(top / "bin") | {"PREFIX": str(top / "prefix"), "TORCH_DIR": str(TORCH), "CUDA": "OFF", "BUILD": "build-cpp"}
    check(top / "bin/bash", ROOT / "scripts/install_cpp", env=env)
    cache = (ROOT / "build-cpp/CMakeCache.txt").read_text()
    assert "Python_EXECUTABLE" not in cache and "pybind11" not in cache
    return top / "prefix"


def outside(build, *options):
    return ["cmake", "-G", "Ninja", "-S", ROOT / "tests/package", "-B", build, *LAUNCHER, *options]


@pytest.fixture(scope="module")
def torch_config(tmp_path_factory):
    """Why find_package(Torch) cannot work here, whatever halfstep does; None where it can."""
    top = tmp_path_factory.mktemp("torch_config")
    (top / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 3.24)\nproject(x LANGUAGES CXX)\nfind_package(Torch REQUIRED)\n")
    code, text = run("cmake", "-G", "Ninja", "-S", top, "-B", top / "build", f"-DCMAKE_PREFIX_PATH={TORCH}")
    if code == 0:
        return None
    lines = [line.strip() for line in text[text.find("CMake Error"):].splitlines() if line.strip()]
    return "torch's own CMake files stop here: " + " ".join(lines[:3])


@pytest.mark.parametrize("way", ["alone", "before", "after", "subdirectory"])
def test_an_outside_project_builds_trains_and_needs_no_python(way, installed, tmp_path, request):
    if way in ("before", "after"):
        reason = request.getfixturevalue("torch_config")
        if reason:
            pytest.skip(reason)
    if way == "subdirectory":
        options = [f"-DHALFSTEP_SOURCE={ROOT}", f"-DTORCH_DIR={TORCH}", "-DHALFSTEP_CUDA=OFF"]
    elif way == "alone":
        options = [f"-DCMAKE_PREFIX_PATH={installed}"]
    else:
        options = [f"-DCMAKE_PREFIX_PATH={installed};{TORCH}", f"-DFIND_TORCH={way}"]
    # compiles the library itself by add_subdirectory, so that one build folder stays and the next call is quick
    build = ROOT / "build-outside" if way == "subdirectory" else tmp_path
    check(*outside(build, *options))
    check("ninja", "-C", build)
    assert "applied 40" in check(build / "outside", cwd=tmp_path)
    assert "found" in check(build / "by_name", cwd=tmp_path)
    for program in ("outside", "by_name"):
        names = [line.split("=>")[0] for line in check("ldd", build / program).splitlines()]
        assert [n for n in names if "libhalfstep.so" in n]
        assert not [n for n in names if "python" in n], names


@pytest.mark.parametrize("header", [False, True])
def test_a_program_that_uses_ops_by_name_keeps_the_library(header, installed, tmp_path):
    """By hand, with a linker told to leave out what is not used: the public header keeps the library, nothing else does."""
    needs("g++")
    program = tmp_path / "by_name"
    check("g++", "-std=c++20", "-O0", *(["-DINCLUDE_HALFSTEP"] if header else []), f"-I{installed}/include", f"-I{TORCH}/include", "-Wl,--as-needed",
          ROOT / "tests/package/by_name.cpp", "-o", program, f"-L{installed}/lib", "-lhalfstep", f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10",
          f"-Wl,-rpath,{installed}/lib:{TORCH}/lib")
    code, text = run(program)
    assert (code, text.strip()) == ((0, "found") if header else (1, "not found"))


def test_another_torch_minor_is_refused_with_both_versions(installed, tmp_path):
    fake = tmp_path / "torch"
    (fake / "include/torch/headeronly").mkdir(parents=True)
    (fake / "lib").mkdir()
    (fake / "lib/libtorch_cpu.so").touch()
    (fake / "include/torch/headeronly/version.h").write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 3\n#define TORCH_VERSION_PATCH 1\n")
    code, text = run(*outside(tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed}", f"-DTORCH_DIR={fake}"))
    flat = " ".join(text.split())
    assert code != 0 and f"built against torch {torch.__version__.split('+')[0]}" in flat and "is torch 2.3.1" in flat


def test_the_build_refuses_an_old_torch_and_another_system(tmp_path):
    needs("cmake")
    fake = tmp_path / "torch/include/torch/headeronly"
    fake.mkdir(parents=True)
    (fake / "version.h").write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 3\n#define TORCH_VERSION_PATCH 1\n")
    code, text = run("cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path / "old", f"-DTORCH_DIR={tmp_path / 'torch'}")
    assert code != 0 and "halfstep needs torch >= 2.11" in text and "is 2.3.1" in " ".join(text.split())
    code, text = run("cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path / "other", "-DCMAKE_SYSTEM_NAME=Windows")
    assert code != 0 and "halfstep supports Linux; use WSL2" in text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """`make wheel`, which also installs the wheel in a fresh environment and runs tests/package/smoke.py there."""
    needs("cmake", "g++", "ninja")
    folder = tmp_path_factory.mktemp("wheel")
    env = ENV | {"VENV": "0", "CUDA": "OFF", "WHEEL_DIR": str(folder), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{ENV['PATH']}"}
    text = check("bash", ROOT / "scripts/wheel", env=env)
    assert "works:" in text
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_names_its_torch_and_holds_what_cpp_users_need(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    minor = ".".join(torch.__version__.split(".")[:2])
    assert f"Requires-Dist: torch=={minor}.*" in metadata
    header = (ROOT / "csrc/include/halfstep/version.h").read_text()
    version = header.split('HALFSTEP_VERSION "')[1].split('"')[0]
    assert f"\nVersion: {version}\n" in metadata
    assert version.startswith(".".join(header.split(f"HALFSTEP_VERSION_{part} ")[1].split()[0] for part in ("MAJOR", "MINOR", "PATCH")))
    for name in ("lib/libhalfstep.so", "include/halfstep/halfstep.h", "share/cmake/halfstep/halfstepConfig.cmake", f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"):
        assert f"halfstep/{name}" in names, names
    assert [n for n in names if n.endswith("LICENSE")]
    assert not [n for n in names if "/.build" in n or n.endswith((".o", ".pyc", ".log"))], names


def test_an_outside_project_finds_torch_beside_the_wheel(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "torch").symlink_to(TORCH)
    check(*outside(tmp_path / "build", f"-DCMAKE_PREFIX_PATH={site}/halfstep/share/cmake"))
    check("ninja", "-C", tmp_path / "build", "by_name")
    assert "found" in check(tmp_path / "build/by_name")
    assert str(site / "halfstep/lib/libhalfstep.so") in check("ldd", tmp_path / "build/by_name")


def built_in_place():
    if not (PACKAGE / "lib/libhalfstep.so").exists():
        pytest.skip("the library is not built in place")


def test_an_outside_project_builds_against_the_package_in_place(tmp_path):
    """What `pip install -e` and `make test` leave in python/halfstep is a whole package too."""
    built_in_place()
    needs("cmake", "ninja")
    paths = check(sys.executable, "-c", "import halfstep as hs; print(hs.cmake_prefix_path); print(hs.include_path)", env=ENV | {"PYTHONPATH": str(ROOT / "python")})
    cmake, include = paths.split()
    assert (Path(include) / "halfstep/halfstep.h").is_file()
    check(*outside(tmp_path, f"-DCMAKE_PREFIX_PATH={cmake}"))
    check("ninja", "-C", tmp_path, "by_name")
    assert "found" in check(tmp_path / "by_name")


def copy_of_package(folder, ignore=()):
    built_in_place()
    shutil.copytree(PACKAGE, folder / "halfstep", ignore=shutil.ignore_patterns("__pycache__", "include", "share", *ignore))
    return ENV | {"PYTHONPATH": str(folder)}


def doctor(env, *prefix):
    code, text = run(sys.executable, *(prefix or ("-m", "halfstep")), "doctor", env=env)
    assert "Traceback" not in text, text
    return code, dict(line.split(maxsplit=1) for line in text.splitlines() if line[:1].isalpha() and len(line.split(maxsplit=1)) == 2)


def test_doctor_runs_where_the_library_is_missing_and_says_why(tmp_path):
    env = copy_of_package(tmp_path, ignore=("lib", "_C*"))
    code, text = run(sys.executable, "-c", "import halfstep", env=env)
    assert code != 0 and "libhalfstep.so is missing" in text.splitlines()[-1]
    # the installed command is this script
    script = tmp_path / "halfstep.d" / "halfstep"
    script.parent.mkdir()
    script.write_text("import sys\nfrom halfstep.cli import main\nsys.exit(main())\n")
    for prefix in (("-m", "halfstep"), (script,)):
        code, lines = doctor(env, *prefix)
        assert code == 1 and torch.__version__ in lines["torch"]
        assert "not importable" in lines["halfstep"] and "libhalfstep.so is missing" in lines["halfstep"] and "pip install" in lines["halfstep"]


def test_another_torch_at_import_is_named_before_the_library_is_loaded(tmp_path):
    env = copy_of_package(tmp_path)
    (tmp_path / "halfstep/lib/torch_version").write_text("2.3.1\n")
    (tmp_path / "halfstep/lib/libhalfstep.so").write_bytes(b"not a library: whatever loads it fails otherwise")
    code, text = run(sys.executable, "-c", "import halfstep", env=env)
    assert code != 0 and text.splitlines()[-1] == (
        f"ImportError: halfstep was built against torch 2.3.1, but torch {torch.__version__} is installed; rebuild it: pip install --no-build-isolation .")
    code, lines = doctor(env)
    assert code == 1 and "built against torch 2.3.1" in lines["halfstep"]


def test_a_library_that_does_not_load_is_named(tmp_path):
    env = copy_of_package(tmp_path)
    (tmp_path / "halfstep/lib/libhalfstep.so").write_bytes(b"not a library")
    code, lines = doctor(env)
    assert code == 1 and "cannot load" in lines["halfstep"] and "libhalfstep.so" in lines["halfstep"]


def test_doctor_is_content_with_the_package_in_place():
    built_in_place()
    code, lines = doctor(ENV | {"PYTHONPATH": str(ROOT / "python")})
    assert code == 0 and "grad_stats" in lines["ops"] and lines["check"] == "grad_stats finds the bad tensor"


def test_nothing_private_is_exported():
    library = PACKAGE / "lib/libhalfstep.so"
    built_in_place()
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
    built_in_place()
    if os.cpu_count() < 2:
        pytest.skip("needs two cores")
    assert "GOMP_parallel" in check("nm", "-D", PACKAGE / "lib/libhalfstep.so")


def test_the_program_of_docs_cpp_md_builds_and_runs(installed, tmp_path):
    text = (ROOT / "docs/cpp.md").read_text()
    block = lambda language: text.split(f"```{language}\n")[1].split("```")[0]
    (tmp_path / "main.cpp").write_text(block("cpp"))
    (tmp_path / "CMakeLists.txt").write_text(block("cmake"))
    check("cmake", "-G", "Ninja", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed}", f"-DTORCH_DIR={TORCH}")
    check("ninja", "-C", tmp_path / "build")
    assert "at scale 65536" in check(tmp_path / "build/app", cwd=tmp_path)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in weights.items()} == {
        "0.weight": (torch.float32, (64, 16)), "0.bias": (torch.float32, (64,)), "2.weight": (torch.float32, (2, 64)), "2.bias": (torch.float32, (2,))}
