# SPDX-License-Identifier: BSD-3-Clause
"""One HTML file that needs nothing else: sections, tables, and the style of the charts in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --muted: #59636e; --line: #d1d9e0; --back: #ffffff;
  --s0: #0969da; --s1: #54aeff; --s2: #bc4c00; --s3: #8250df; --s4: #1a7f37; --s5: #818b98; --s6: #454c54;
  --s7: #0598bc; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --muted: #9198a1; --line: #3d444d; --back: #0d1117;
  --s0: #4493f8; --s1: #a5d0ff; --s2: #f0883e; --s3: #bc8cff; --s4: #3fb950; --s5: #768390; --s6: #c9d1d9;
  --s7: #39c5cf; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
p, figcaption { max-width: 46rem; } .muted { color: var(--muted); }
figure { margin: 1.5rem 0; } figcaption { margin-bottom: .5rem; }
.scroll { overflow-x: auto; } .scroll > svg { width: 100%; min-width: 40rem; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; } .key { white-space: nowrap; }
.key svg { vertical-align: -2px; margin-right: .3rem; }
svg text { font: 12px system-ui, sans-serif; fill: var(--text); } svg text.muted { fill: var(--muted); }
svg text.number { font-weight: 600; font-size: 11px; }
line.grid { stroke: var(--line); stroke-width: 1; opacity: .6; } line.axis { stroke: var(--muted); stroke-width: 1.5; }
line.roof { stroke: var(--text); stroke-width: 1.5; } line.slope { stroke: var(--muted); stroke-width: 1.5;
  stroke-dasharray: 5 4; }
.series0 { fill: var(--s0); } .series1 { fill: var(--s1); } .series2 { fill: var(--s2); } .series3 { fill: var(--s3); }
.series4 { fill: var(--s4); } .series5 { fill: var(--s5); } .series6 { fill: var(--s6); } .series7 { fill: var(--s7); }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, td.text, th.text { text-align: left; } th { font-weight: 600; vertical-align: bottom; }
td:first-child { white-space: nowrap; } td.text { min-width: 16rem; }
details { margin: .75rem 0; } summary { cursor: pointer; font-weight: 600; }
"""


def page(title: str, lead: Sequence[str], sections: Sequence[str]) -> str:
    """The whole file; ``lead`` are paragraphs of text, ``sections`` are HTML."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join([*(f"<p>{escape(text)}</p>" for text in lead), *sections])
        + "\n</body></html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f'<p class="muted">{escape(text)}</p>'


def folded(summary: str, content: str, is_open: bool = False) -> str:
    """Content that a click shows."""
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{content}</details>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], text_column: int | None = None) -> str:
    """The first column and ``text_column`` are flush left, the others are numbers."""

    def cell(tag: str, index: int, text: str) -> str:
        kind = ' class="text"' if index == text_column else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", index, column) for index, column in enumerate(columns))
    body = "".join(f"<tr>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def case_names(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """The name of each; with batch and threads where these are not the same in all."""
    batches, threads = ({case[key] for case in cases} for key in ("batch", "threads"))
    names = []
    for case in cases:
        name = case["name"].replace("->", "→")
        name += f", batch {case['batch']}" if len(batches) > 1 else ""
        name += f", {case['threads']} thread{'s' * (case['threads'] > 1)}" if len(threads) > 1 else ""
        names.append(name)
    return names
