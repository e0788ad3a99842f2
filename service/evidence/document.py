"""HTML pages that need no other file and no script: the frame, tables, lists and pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from service.pixels.images import encode_png
from service.shapes import UInt8

STYLE = """
:root { --line: #d4d9de; --soft: #f4f6f8; --ink: #1b242d; --dim: #59646f; --mark: #0b5d7a; --paper: #fff }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 74rem; padding: 2rem 1.5rem 4rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 1.7rem; margin: 0 }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; padding-bottom: .3rem; border-bottom: 2px solid var(--mark) }
p { margin: .5rem 0; max-width: 60rem } .dim { color: var(--dim) }
code, td.n, th.n, .digest { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .86em }
.digest { overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100%; margin: .8rem 0; font-size: .92em }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line) }
td:last-child { overflow-wrap: anywhere }
thead th { background: var(--soft); font-weight: 600 } td.n, th.n { text-align: right; white-space: nowrap }
tbody th { font-weight: 500; white-space: nowrap } table.narrow { width: auto }
.claims { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem; margin: 1.4rem 0 }
.claims div { border: 1px solid var(--line); border-top: 3px solid var(--mark); padding: .7rem .9rem }
.claims b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums }
figure { margin: 0; border: 1px solid var(--line); padding: .8rem; break-inside: avoid }
figcaption { font-weight: 600; overflow-wrap: anywhere }
ul { padding-left: 1.2rem; max-width: 60rem } li { margin: .25rem 0 }
@media print { body { max-width: none; padding: 0; font-size: 10pt } h2 { break-after: avoid }
  tr, figure, .claims div { break-inside: avoid } @page { margin: 16mm } }
"""


def document(title: str, body: str, style: str = "") -> str:
    """Return a page.

    Args:
        title: text of the title bar.
        body: HTML.
        style: rules after those of `STYLE`.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n<body>{body}</body></html>\n"
    )


def claims(boxes: Iterable[tuple[str, str]]) -> str:
    """Return a row of boxes, each with a figure and its meaning."""
    inside = "".join(f"<div><b>{escape(value)}</b>{escape(text)}</div>" for value, text in boxes)
    return f'<div class="claims">{inside}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = (), narrow: bool = False) -> str:
    """Return a table of cells that are escaped here.

    Args:
        head: titles of the columns.
        rows: cells.
        numeric: columns that are set to the right.
        narrow: as wide as its cells instead of the page.
    """

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = [' class="n"' if place in numeric else "" for place in range(len(row))]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    width = ' class="narrow"' if narrow else ""
    return f"<table{width}><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def facts(rows: Iterable[tuple[str, str]], kind: str = "") -> str:
    """Return a table of names and texts, without titles.

    Args:
        rows: escaped here.
        kind: class of the cells of the texts.
    """
    kind = f' class="{kind}"' if kind else ""
    body = "".join(f"<tr><th>{escape(name)}</th><td{kind}>{escape(text)}</td></tr>" for name, text in rows)
    return f"<table><tbody>{body}</tbody></table>"


def items(texts: Iterable[str]) -> str:
    """Return the entries of a list, escaped here."""
    return "".join(f"<li>{escape(text)}</li>" for text in texts)


def image(pixels_CHW: UInt8[np.ndarray, "C H W"], text: str = "") -> str:
    """Return a picture that holds its PNG file.

    Args:
        pixels_CHW: grey (C = 1) or RGB (C = 3).
        text: in its place for readers who do not see it.
    """
    content = base64.b64encode(encode_png(pixels_CHW)).decode("ascii")
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{content}">'
