"""Pages of docs/ as programs: their blocks of Python run in order, and what they print is what the page says."""

import contextlib
import io
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(page):
    """[(code, the text block right behind it, or None)] of a page of docs/."""
    text, found = (DOCS / page).read_text(), []
    for match in BLOCK.finditer(text):
        if match[1] == "python":
            behind = BLOCK.match(text, match.end() + 1)
            found.append((match[2], behind[2] if behind and behind[1] == "text" else None))
    return found


def run(page):
    """Runs them in one namespace; yields (code, expected, printed, namespace) after each."""
    space = {"__name__": "docs"}
    for number, (code, expected) in enumerate(blocks(page)):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"docs/{page}, block {number + 1}", "exec"), space)
        yield code, expected, printed.getvalue(), space
