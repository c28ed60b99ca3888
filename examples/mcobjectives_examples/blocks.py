"""What a report is made of, and its form in Markdown; `data/report.html` gives the same blocks their form in HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import quote


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Columns of text; those in `right` are numbers. The title and the note say what is in it."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    right: Sequence[int] = ()
    note: str = ""


@dataclass(frozen=True)
class Verdicts:
    """Claims, each with what became of it and the evidence: (verdict, claim, evidence)."""

    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Chart:
    """A drawing of the numbers in `table`; `legend` names its lines, each with its class of style."""

    svg: str
    legend: Sequence[tuple[str, str]]
    table: Table


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, and its file's name beside the report, empty where it is not there."""

    title: str
    caption: str
    alt: str
    source: str
    file: str


Block = Text | Table | Verdicts | Bullets | Chart | Picture


@dataclass(frozen=True)
class Section:
    """A heading with what is under it."""

    title: str
    blocks: Sequence[Block] = ()
    sections: Sequence[Section] = ()


def markdown(blocks: Iterable[Block]) -> str:
    """Blocks in Markdown; text stays text, whatever is in it."""
    return "\n\n".join(map(_block, blocks)) + "\n"


def markdown_page(page: Section, level: int = 1) -> str:
    """A section and all under it in Markdown."""
    parts = [f"{'#' * level} {escaped(page.title)}\n"]
    if page.blocks:
        parts.append(markdown(page.blocks))
    return "\n".join([*parts, *(markdown_page(section, level + 1) for section in page.sections)])


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]], right: Sequence[int] | range = ()) -> str:
    """A table of Markdown texts."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = line("---:" if i in right else "---" for i in range(len(header)))
    return "\n".join([line(header), rule, *map(line, lines)])


def escaped(text: str) -> str:
    """Text without a meaning in Markdown or HTML, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _block(block: Block) -> str:
    match block:
        case Text(text):
            return escaped(text)
        case Table():
            head = f"**{escaped(block.title)}.** {escaped(block.note)}".rstrip()
            lines = [[escaped(cell) for cell in line] for line in block.lines]
            return f"{head}\n\n{markdown_table([escaped(name) for name in block.header], lines, block.right)}"
        case Verdicts(items):
            return "\n".join(
                f"- *{escaped(v)}*: {escaped(claim)}: {escaped(evidence)}." for v, claim, evidence in items
            )
        case Bullets(items):
            return "\n".join(f"- {escaped(item)}" for item in items)
        case Chart():
            return _block(block.table)
        case Picture():
            shown = f"![{escaped(block.alt)}]({quote(block.file)})\n\n" if block.file else ""
            return f"{shown}**{escaped(block.title)}.** {escaped(block.caption)}"
