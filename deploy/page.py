"""How a report is put on a page: HTML that needs no other file, no network and no script.

Called by deploy/report.py. Every text is escaped here. Wide tables scroll within themselves, also by keyboard, so that
the page fits a phone; colours follow the reader's choice of light or dark.
"""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["disclosure", "page", "picture", "raw_table", "strip", "table", "text"]

# Nothing may be loaded, whatever gets into a report.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_PHONE = "(max-width: 40rem)"
_DARK = "(prefers-color-scheme: dark)"


def page(title: str, body: Iterable[str]) -> str:
    """Return the whole document; `body` is HTML, `title` a text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{text(title)} · Zeroout</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head>'
        "<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def table(label: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of texts; `label` is what a screen reader calls it."""
    return raw_table(label, header, ([text(cell) for cell in row] for row in rows))


def raw_table(label: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose cells are HTML already; the header's are texts."""
    head = "".join(f"<th scope=col>{text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class=wide role=region tabindex=0 aria-label="{text(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def picture(description: str, images: Mapping[tuple[bool, bool], bytes]) -> str:
    """Return a picture from its PNGs by (dark, narrow); the browser takes the one that fits."""
    sources = "".join(
        f'<source media="{media}" srcset="{_data_uri(images[form])}">'
        for media, form in (
            (f"{_DARK} and {_PHONE}", (True, True)),
            (_PHONE, (False, True)),
            (_DARK, (True, False)),
        )
    )
    return f'<picture>{sources}<img src="{_data_uri(images[False, False])}" alt="{text(description)}"></picture>'


def strip(kept: Sequence[int] | None, after: int, before: int) -> str:
    """Return a bar of `before` places with those in `kept` filled, or its first `after` where nobody knows which."""
    places = range(after) if kept is None else kept
    path = "".join(f"M{start} 0h{length}v1h-{length}z" for start, length in _runs(places))
    return (
        f'<svg class=strip role=img aria-label="{after} of {before} kept" viewBox="0 0 {before} 1" '
        f'preserveAspectRatio=none><path d="{path}"/></svg>'
    )


def disclosure(summary: str, content: str, *, is_open: bool) -> str:
    """Return HTML content that a click shows and hides."""
    return f"<details{' open' if is_open else ''}><summary>{text(summary)}</summary>{content}</details>"


def text(value: str) -> str:
    """Return a text as HTML."""
    return html.escape(value, quote=True)


def _runs(places: Iterable[int]) -> list[tuple[int, int]]:
    """Return (start, length) of each run of neighbours in rising places."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and sum(runs[-1]) == place:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((place, 1))
    return runs


def _data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #23272e; --dim: #646c77; --line: #e3e6ea;
  --soft: #f5f6f8; --mark: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181d; --ink: #d7dbe0; --dim: #949da9;
  --line: #2b3038; --soft: #1c2026; --mark: #f58a3c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.9rem; margin: 0; } h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; }
.dim { color: var(--dim); font-size: .875rem; margin-top: .4rem; }
.verdict { font-size: 1.1rem; border-left: 4px solid var(--mark); padding-left: .9rem; }
.notice { background: var(--soft); border: 1px solid var(--mark); border-radius: 6px; padding: .7rem 1rem; }
h1, p, li, summary, code { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; min-width: 24rem; }
th, td { padding: .35rem .8rem .35rem 0; text-align: left; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--dim); font-weight: 500; }
td:first-child { white-space: pre; }
summary { cursor: pointer; padding: .5rem 0; }
.strip { display: block; width: 16rem; height: .8rem; background: var(--line); fill: var(--mark); }
@media (max-width: 40rem) { .strip { width: 7rem; } }
picture img { width: 100%; height: auto; display: block; border-radius: 6px; }
pre { background: var(--soft); padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: .8125rem; }
"""
