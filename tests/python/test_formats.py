"""docs/formats.md: each block of code prints what stands below it, and the table follows from the widths of the fields."""

from fractions import Fraction

import docs
import pytest
import torch

from halfstep._shares import shares

FORMATS = {"FP16": (torch.float16, 5, 10), "BF16": (torch.bfloat16, 8, 7), "FP32": (torch.float32, 8, 23), "FP64": (torch.float64, 11, 52)}


def test_every_block_prints_what_the_page_says():
    count = 0
    for code, expected, printed, _ in docs.run("formats.md"):
        assert expected is not None and printed.strip(), f"nothing is checked by\n{code}"
        assert printed == expected, f"of\n{code}"
        count += 1
    assert count >= 9


def exact(text):
    """The number that a cell of the table states: `2^128 - 2^120`, `65504`."""
    total, sign = Fraction(0), 1
    for part in text.split():
        if part in "+-":
            sign = 1 if part == "+" else -1
        else:
            base, _, power = part.partition("^")
            total += sign * Fraction(int(base)) ** int(power or 1)
    return total


def table():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (docs.DOCS / "formats.md").read_text().splitlines() if line.startswith("| ") and "---" not in line]
    return rows[0][1:], {row[0]: row[1:] for row in rows[1:]}


@pytest.mark.parametrize("column, name", list(enumerate(FORMATS)))
def test_the_table_follows_from_the_widths(column, name):
    _, exponent, fraction = FORMATS[name]
    bias, names, rows = 2 ** (exponent - 1) - 1, *table()
    two = Fraction(2)
    step = two ** (bias - fraction)  # between the largest numbers
    largest = (2 ** (fraction + 1) - 1) * step
    tiny = two ** (1 - bias - fraction)
    assert names == list(FORMATS)
    assert [int(n) for n in rows.pop("bits: sign, exponent, fraction")[column].split(",")] == [1, exponent, fraction]
    assert {what: exact(cells[column]) for what, cells in rows.items()} == {
        "largest": largest, "rounds to inf from": largest + step / 2, "smallest normal": two ** (1 - bias), "smallest subnormal": tiny, "rounds to 0 up to": tiny / 2,
        "epsilon: from 1 to the next number": two**-fraction, "integers are exact up to": two ** (fraction + 1), "finite values": 2 * (2**exponent - 1) * 2**fraction}


@pytest.mark.parametrize("name", ["FP16", "BF16", "FP32"])
def test_torch_rounds_at_these_thresholds(name):
    dtype, _, _ = FORMATS[name]
    column, rows = list(FORMATS).index(name), table()[1]
    at = lambda what: float(exact(rows[what][column]))
    to = lambda x: torch.tensor(x, dtype=torch.float64).to(dtype).double().item()
    below, above = (1 - 2**-50, 1 + 2**-50) if dtype == torch.float32 else (1 - 2**-12, 1 + 2**-12)  # what FP32, through which torch goes to 16 bits, still sees
    assert to(at("rounds to inf from")) == float("inf") and to(at("rounds to inf from") * below) == at("largest") == torch.finfo(dtype).max
    assert to(at("rounds to 0 up to")) == 0 and to(at("rounds to 0 up to") * above) == at("smallest subnormal")
    assert to(at("smallest normal")) == torch.finfo(dtype).tiny and to(1 + at("epsilon: from 1 to the next number") * 0.51) == 1 + torch.finfo(dtype).eps
    whole = at("integers are exact up to")
    assert to(whole - 1) == whole - 1 and to(whole) == whole and to(whole + 1) != whole + 1


def test_halfstep_counts_by_these_thresholds():
    rows = table()[1]
    last, first, tiny = (float(exact(rows[what][0])) for what in ("rounds to 0 up to", "rounds to inf from", "smallest normal"))
    near = 2**-40
    found = shares(torch.tensor([last, last * (1 + near), tiny / 2, tiny, first * (1 - near), first, 0.0, -0.0], dtype=torch.float64))
    assert (found.nonzero, found.underflow, found.subnormal, found.overflow) == (6, 1, 2, 1)
