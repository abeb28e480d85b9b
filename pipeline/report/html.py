"""One self-contained HTML page: styles and pictures are inline, and nothing is fetched."""

import html
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from storage.text import printable

HEX = re.compile(r"[0-9a-f]{32,}")  # a fingerprint
SHOWN = 12  # digits of one
STYLE = """
:root { --line: #d8dee4; --soft: #59636e; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; color: #1f2328; background: #fff;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin-bottom: .3rem; }
p.note, figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 1rem 0; }
figure div { display: flex; flex-wrap: wrap; gap: 1rem; }
figure svg { flex: 1 1 19rem; min-width: 0; max-width: min(100%, 46rem); height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; white-space: nowrap; }
th { border-bottom: 1px solid var(--soft); }
td { border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
table.pairs td { text-align: left; }
table.pairs td + td { white-space: normal; overflow-wrap: anywhere; }
pre { background: #f6f8fa; padding: .6rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .8rem; }
@media print { body { max-width: none; font-size: 11px; } h2 { break-after: avoid; }
  figure, table, pre { break-inside: avoid; } }
"""


def escape(text: str) -> str:
    """Foreign text as HTML: nothing in it is an element, or turns the direction of a line."""
    return html.escape(printable(text))


def page(title: str, parts: Iterable[str]) -> str:
    """A complete HTML document; `parts` are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def lead(text: str) -> str:
    """The first paragraph: what was found, in words."""
    return f"<p>{escape(text)}</p>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def quote(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{names}</tr>{cells}</table></div>'


def pairs(values: dict[str, Any]) -> str:
    """A table with one name and value per line; nested values have dotted names. A fingerprint is
    cut; its whole is shown when the pointer rests on it."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{value_cell(value)}</tr>" for name, value in flatten(values)
    )
    return f'<div class="scroll"><table class="pairs">{rows}</table></div>'


def value_cell(value: Any) -> str:
    if isinstance(value, str) and HEX.fullmatch(value):
        return f'<td title="{escape(value)}">{value[:SHOWN]}…</td>'
    return f"<td>{escape(say(value))}</td>"


def say(value: Any) -> str:
    """A value as text: numbers with separators, and four digits of a fraction."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found += flatten(value, f"{prefix}{name}.")
        elif value is not None:
            found.append((f"{prefix}{name}", value))
    return found


def picture(figures: Sequence[Any], caption: str) -> str:
    """matplotlib figures as inline SVG, side by side if there is room, with a caption."""
    shown = "".join(svg(figure, caption) for figure in figures)
    return f"<figure><div>{shown}</div><figcaption>{escape(caption)}</figcaption></figure>"


def svg(figure: Any, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    alt = escape(label)
    return text.replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)


def axes(number: int = 1, width: float = 4.4, height: float = 3.2) -> tuple[list[Any], list[Any]]:
    """(figures of one plot each, the plots), for `picture`; no window system is needed."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text, dollar signs too; the same numbers give the same bytes.
    same: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "report"}
    matplotlib.rcParams.update(same | {"text.parse_math": False})
    figures = [Figure(figsize=(width, height), layout="constrained") for _ in range(number)]
    plots = [figure.subplots() for figure in figures]
    for plot in plots:
        plot.grid(True, alpha=0.3)
        plot.spines[["top", "right"]].set_visible(False)
    return figures, plots
