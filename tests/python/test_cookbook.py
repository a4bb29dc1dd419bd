"""docs/cookbook.md, every block of it: the six steps of a project, from the machine to a file that runs without halfstep."""

import json
import os
import subprocess
import sys
from pathlib import Path

import docs
import pytest

HERE = Path(__file__).parent
CODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import docs
json.dump([block[:3] for block in docs.run("cookbook.md", ".")], open("blocks.json", "w"))
"""


@pytest.mark.slow
def test_the_six_steps_run_and_say_what_the_page_says(tmp_path):
    pytest.importorskip("scipy")
    where = os.pathsep.join(os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p) or str(HERE.parents[1] / "python")
    # A process of its own, whose waiting threads sleep: others share the cores.
    done = subprocess.run([sys.executable, "-c", CODE, HERE], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": where, "OMP_WAIT_POLICY": "passive"})
    assert done.returncode == 0, done.stderr[-3000:]
    blocks = json.loads((tmp_path / "blocks.json").read_text())
    assert [[code, printed] for code, expected, printed in blocks if expected is not None] == [[code, expected] for code, expected, _ in blocks if expected is not None]
    printed = "\n".join(p for _, _, p in blocks)
    for line in ("mixed precision will help here: ", "mixed is quicker than fp32: ", "arm mixed", "held between steps", "mixed vs fp32: equivalent", "deploy in FP16: no, because", "with 'normalise' in FP32: yes"):
        assert line in printed, line
    assert {"run.pt", "digits.pt2", "digits.pt", "test.pt", "r"} <= {p.name for p in tmp_path.iterdir()}


def test_the_page_has_six_steps_each_with_something_to_run():
    text = (docs.DOCS / "cookbook.md").read_text()
    steps = text.split("\n## ")[1:]
    assert [s[0] for s in steps] == list("123456") and all(docs.BLOCK.search(s) for s in steps)
    assert sum(expected is not None for _, _, expected in docs.blocks("cookbook.md")) == 5
