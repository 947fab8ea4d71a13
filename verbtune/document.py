"""What a report is made of, as Markdown and as HTML."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Iterable

__all__ = ["Block", "Heading", "Picture", "Table", "Text", "as_html", "as_markdown", "plain"]


@dataclasses.dataclass(frozen=True)
class Heading:
    """A heading of level 1 to 6."""

    level: int
    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph of Markdown inline text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells of Markdown inline text; the first column to the left, the others to the right."""

    header: list[str]
    rows: list[list[str]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """An SVG of a unique name, and what it shows, as Markdown inline text."""

    name: str
    svg: str
    caption: str


Block = Heading | Text | Table | Picture


def plain(text: str) -> str:
    """Text that is not ours, so that Markdown takes none of it for structure."""
    return re.sub(r"([\\`*|<>\[\]])", r"\\\1", " ".join(text.split()))


def as_markdown(blocks: Iterable[Block]) -> str:
    """Blocks as a Markdown file, which finds its pictures in the folder `pictures`."""
    return "\n".join(map(_markdown_block, blocks))


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}\n"
        case Text(text):
            return f"{text}\n"
        case Picture(name, _, caption):
            return f"![{caption}](pictures/{name}.svg)\n\n*{caption}*\n"
        case Table(header, rows):
            widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
            rule = [("-" * w if i == 0 else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
            lines = []
            for row in (header, rule, *rows):
                cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
                lines.append(f"| {' | '.join(cells)} |")
            return "\n".join(lines) + "\n"


_CSS = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; color: #24292f; background: #fff; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; margin: 2rem 0 .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .45rem; text-align: right; border-bottom: 1px solid #8b949e55; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.long { white-space: normal; text-align: left; min-width: 20rem; }
tbody tr:hover { background: #8b949e22; }
figure { margin: 1.5rem 0; }
figure svg { max-width: 100%; height: auto; overflow: visible; }
figcaption { font-size: .9rem; opacity: .8; max-width: 50rem; }
code { font-size: .85em; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117; } }
"""


def as_html(blocks: Iterable[Block], *, title: str) -> str:
    """Blocks as an HTML page that needs no other file."""
    body = "\n".join(map(_html_block, blocks))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html_block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Picture(_, svg, caption):
            # In an HTML page the namespaces go without saying.
            bare = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
            return f"<figure>{bare}<figcaption>{_inline(caption)}</figcaption></figure>"
        case Table(header, rows):
            head = "".join(f"<th>{_inline(cell)}</th>" for cell in header)
            body = "\n".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in rows)
            return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _html_cell(cell: str) -> str:
    return f"<td{' class=long' * (len(cell) > 70)}>{_inline(cell)}</td>"


def _inline(text: str) -> str:
    """The Markdown of our own cells and sentences as HTML: bold, code and escapes, nothing else."""
    pieces = re.split(r"(\\.|\*\*.+?\*\*|`.+?`)", text)
    return "".join(map(_inline_piece, pieces))


def _inline_piece(piece: str) -> str:
    if piece.startswith("\\") and len(piece) == 2:
        return html.escape(piece[1])
    if piece.startswith("**") and len(piece) > 4:
        return f"<strong>{html.escape(piece[2:-2])}</strong>"
    if piece.startswith("`") and len(piece) > 2:
        return f"<code>{html.escape(piece[1:-1])}</code>"
    return html.escape(piece)
