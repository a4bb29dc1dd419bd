"""Pages of docs/ as programs: their blocks of Python and of commands run in order, and what they print is what the page says."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(page):
    """[(language, code, the text block right behind it, or None)] of a page of docs/."""
    text, found = (DOCS / page).read_text(), []
    for match in BLOCK.finditer(text):
        if match[1] in ("python", "sh"):
            behind = BLOCK.match(text, match.end() + 1)
            found.append((match[1], match[2], behind[2] if behind and behind[1] == "text" else None))
    return found


def run(page, folder=None):
    """Runs the blocks of Python in one namespace and those of commands in `folder`; yields (code, expected, printed, namespace) after each.

    A block of Python that begins with `# name.py` is that file in `folder`. `halfstep …` and `python …` are run by this interpreter; a command
    that fails raises.
    """
    space = {"__name__": "docs"}
    for number, (language, code, expected) in enumerate(blocks(page)):
        file = re.match(r"# (\w+\.py)\b", code)
        if language == "sh":
            printed = "".join(_command(line, folder) for line in code.replace("\\\n", " ").splitlines() if line.strip())
        elif file and folder is not None:
            (Path(folder) / file[1]).write_text(code)
            printed = ""
        else:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code, f"docs/{page}, block {number + 1}", "exec"), space)
            printed = out.getvalue()
        yield code, expected, printed, space


def _command(line, folder):
    words = re.sub(r"\s+#.*", "", line).replace("halfstep ", f"{sys.executable} -m halfstep ", 1) if line.startswith("halfstep ") else line.replace("python ", f"{sys.executable} ", 1)
    where = os.pathsep.join(os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": where, "OMP_WAIT_POLICY": "passive"})
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout
