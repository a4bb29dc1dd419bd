"""Rows as a text table, for every command that prints one."""


def table(rows, left=(0,)):
    """`rows` of text, the first of them the headings; columns of `left` are flush left, the others right."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(str(cell).ljust(w) if i in left else str(cell).rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows)
