"""Tables of plain text, for what commands print."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["plain_table"]


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = False, indent: str = "") -> str:
    """Columns under a header; ``right`` aligns all but the first to the right.

    >>> print(plain_table(["expert", "prompts"], [["math", "12"]], right=True))
    expert  prompts
    ------  -------
    math         12
    """
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        indent
        + "  ".join(
            cell.rjust(width) if right and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
