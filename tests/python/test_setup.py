"""scripts/setup, which `make run` and `make test` begin with: what it says when something is missing, and how it mends what was interrupted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASH = shutil.which("bash")
# An environment "made" in no time: pip is this Python's exit status, the tools do nothing.
FAKE_PYTHON = f"""#!{BASH}
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$3/bin"
  echo home >"$3/pyvenv.cfg"
  printf '#!{BASH}\\nexit ${{PIP_EXIT:-0}}\\n' >"$3/bin/python"
  printf '#!{BASH}\\n' >"$3/bin/cmake"
  chmod +x "$3"/bin/*
else
  case "$*" in *${{BROKEN:-nothing is broken}}*) exit 1 ;; esac
  exec {sys.executable} "$@"
fi
"""


@pytest.fixture
def tree(tmp_path):
    """A tree with the scripts alone, and a PATH where `python3` and `id` are ours."""
    shutil.copytree(ROOT / "scripts", tmp_path / "tree/scripts")
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, text in {"python3": FAKE_PYTHON, "g++": f"#!{BASH}\n", "id": f"#!{BASH}\necho ${{USER_ID:-0}}\n"}.items():
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    for tool in ("bash", "dirname", "cat", "mkdir", "touch", "find", "rm", "grep", "chmod"):
        (bin / tool).symlink_to(shutil.which(tool))
    return tmp_path / "tree"


def setup(tree, **env):
    command = 'source scripts/setup; echo "ready $PYTHON $BUILD"'
    done = subprocess.run([BASH, "-c", command], cwd=tree, env={"PATH": str(tree.parent / "bin")} | env, capture_output=True, text=True)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def test_missing_tools_are_named_in_one_line_with_the_command_for_all_of_them(tree):
    (tree.parent / "bin/g++").unlink()
    assert setup(tree) == (1, "", "halfstep: g++ missing; run: apt-get install -y g++")
    (tree.parent / "bin/python3").unlink()
    assert setup(tree, USER_ID="1000") == (
        1, "", "halfstep: g++ python3 python3-venv python3-dev missing; run: sudo apt-get install -y g++ python3 python3-venv python3-dev")


@pytest.mark.parametrize("package, probe", [("python3-venv", "ensurepip"), ("python3-dev", "Python.h")])
def test_a_python_without_its_parts_is_named(package, probe, tree):
    assert setup(tree, BROKEN=probe) == (1, "", f"halfstep: {package} missing; run: apt-get install -y {package}")
    assert not (tree / ".venv").exists()


def test_catch2_is_asked_for_when_not_root(tree):
    command = "source scripts/common; system_package catch2"
    done = subprocess.run([BASH, "-c", command], cwd=tree, env={"PATH": str(tree.parent / "bin"), "USER_ID": "1000"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "halfstep: catch2 missing; run: sudo apt-get install -y catch2\n")


@pytest.mark.parametrize("torch", ["abc", "2", "2.x", "2.11.0; true"])
def test_a_torch_that_is_no_version_is_refused_before_anything_is_made(torch, tree):
    code, _, said = setup(tree, TORCH=torch)
    assert (code, said) == (1, f"halfstep: TORCH={torch} is not a version such as 2.11.0")
    assert not list(tree.glob(".venv*"))


def test_a_torch_that_pip_does_not_have_leaves_nothing_behind(tree):
    code, _, said = setup(tree, TORCH="2.99.0", PIP_EXIT="1")
    assert code == 1 and said.splitlines()[-1].startswith("halfstep: pip could not install torch 2.99.0")
    assert not list(tree.glob(".venv*"))


def test_the_environment_is_made_once_and_each_torch_has_its_own(tree):
    code, said, _ = setup(tree)
    assert code == 0 and said.splitlines() == ["setting up .venv with torch 2.11.0 (5 GB, some minutes)", f"ready {tree}/.venv/bin/python build"]
    assert setup(tree, PIP_EXIT="1") == (0, f"ready {tree}/.venv/bin/python build", "")  # pip is not asked again
    code, said, _ = setup(tree, TORCH="2.15.0")
    assert code == 0 and said.splitlines()[-1] == f"ready {tree}/.venv-2.15.0/bin/python build-2.15.0"


def test_an_interrupted_set_up_is_begun_anew(tree):
    half = tree / ".venv/lib/half_a_package"
    half.parent.mkdir(parents=True)
    half.touch()
    (tree / ".venv/halfstep-unfinished").touch()
    assert setup(tree)[0] == 0
    assert not half.exists() and not (tree / ".venv/halfstep-unfinished").exists()
    # one that was whole and no longer runs: its Python is gone, or the tree was moved
    half.parent.mkdir()
    half.touch()
    (tree / ".venv/bin/cmake").write_text("#!/nowhere/python\n")
    assert setup(tree)[0] == 0 and not half.exists()


def test_new_requirements_are_added_to_an_environment_that_is_whole(tree):
    assert setup(tree)[0] == 0
    kept = tree / ".venv/kept"
    kept.touch()
    script = tree / "scripts/setup"
    script.write_text(script.read_text().replace("matplotlib)", "matplotlib another)"))
    code, said, _ = setup(tree, PIP_EXIT="1")
    assert code == 1 and kept.exists()
    assert setup(tree)[0] == 0 and kept.exists() and "another" in (tree / ".venv/halfstep-2.11.0").read_text()


def test_an_environment_of_someone_else_is_left_alone(tree):
    theirs = tree / ".venv/pyvenv.cfg"
    theirs.parent.mkdir()
    theirs.write_text("theirs")
    code, _, said = setup(tree)
    assert (code, said) == (1, "halfstep: .venv is there and was not made by make run; activate it and say VENV=0, or move it away")
    assert theirs.read_text() == "theirs"


def test_the_current_environment_must_have_torch(tree):
    (tree.parent / "bin/python3").write_text(f"#!{BASH}\ncase \"$*\" in *find_spec*) exit 1 ;; esac\nexec {sys.executable} \"$@\"\n")
    code, said, error = setup(tree, VENV="0")
    assert code == 1 and error == f"halfstep: VENV=0, but {tree.parent}/bin/python3 has no torch; run: {tree.parent}/bin/python3 -m pip install torch==2.11.0"
