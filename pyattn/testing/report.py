"""What a check found: a text table, or one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyattn._version import __version__

from .compare import TILE, Comparison

OK, FAILED, ERROR, SKIPPED = "ok", "FAILED", "ERROR", "skipped"


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """One case in one dtype."""

    case: str
    dtype: str
    status: str
    """"ok", "FAILED" (an array is wrong), "ERROR" (it did not run) or "skipped"."""
    comparisons: tuple[Comparison, ...] = ()
    hint: str = ""
    """The known mistake that explains the first wrong array, if one does."""
    message: str = ""
    """Why it was skipped or did not run."""
    subject: str = ""
    """What was checked, where a report holds several things."""

    @property
    def worst(self) -> Comparison | None:
        """The first array that is wrong, or the one nearest to its bound."""
        for comparison in self.comparisons:
            if not comparison:
                return comparison
        return max(self.comparisons, default=None,
                   key=lambda c: c.error / c.bound if c.bound else 0)


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of a check. True if everything passed; prints as a table."""

    title: str
    results: tuple[CaseResult, ...]
    facts: tuple[tuple[str, str], ...] = ()
    """What else a reader should know, such as shapes and options."""

    @property
    def passed(self) -> bool:
        """Whether something was checked and nothing was wrong."""
        return not self.failures and self.count(OK) > 0

    def __bool__(self) -> bool:
        return self.passed

    @property
    def failures(self) -> tuple[CaseResult, ...]:
        """Results that are wrong, or did not run."""
        return tuple(r for r in self.results if r.status in (FAILED, ERROR))

    def count(self, status: str) -> int:
        """Return how many results have `status`."""
        return sum(r.status == status for r in self.results)

    @property
    def summary(self) -> str:
        """Counts in one line."""
        if len(self.results) == 1 and self.results[0].comparisons:
            judged = self.results[0].comparisons
            wrong = sum(not c for c in judged)
            return f"{wrong} of {len(judged)} arrays wrong" if wrong else (
                f"all {len(judged)} arrays right")
        counts = [f"{self.count(status)} {word}" for status, word in
                  ((OK, "passed"), (FAILED, "failed"), (ERROR, "did not run"),
                   (SKIPPED, "skipped")) if self.count(status)]
        return ", ".join(counts) or "nothing was checked"

    def __str__(self) -> str:
        lines = [self.title, *(f"  {name}: {fact}" for name, fact in self.facts), ""]
        if len(self.results) == 1 and self.results[0].comparisons:
            lines += _text_arrays(self.results[0])
        else:
            lines += _text_cases(self.results)
            for result in self.failures:
                lines += ["", *text_failure(result)]
        return "\n".join([*lines, "", f"{'PASSED' if self.passed else 'FAILED'}: {self.summary}"])

    __repr__ = __str__

    def to_html(self, path: str | Path) -> None:
        """Write the report as one HTML file that loads nothing from elsewhere."""
        Path(path).write_text(_page(self), encoding="utf-8")


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Lines of a text table; the columns `right` are aligned to the right."""
    right = set(right)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in
                      enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def _text_cases(results: Sequence[CaseResult]) -> list[str]:
    several = len({r.subject for r in results}) > 1
    rows = [["", "case", "dtype", "result", "worst", "error", "x plain", "correlation"]]
    for r in results:
        numbers = ["", "", "", ""]
        if r.worst is not None:
            numbers = [r.worst.name, *_numbers(r.worst)]
        rows.append([r.subject if several else "", r.case, r.dtype, r.status, *numbers])
    return [line.strip() for line in table([row[0 if several else 1:] for row in rows],
                                           right=range(5, 8) if several else range(4, 7))]


def _numbers(c: Comparison) -> list[str]:
    if math.isnan(c.error):
        return ["-", "-", "-"]
    return [f"{c.error:.1e}", f"{c.ratio:.2g}", f"{c.correlation:.6f}"]


def text_failure(result: CaseResult) -> list[str]:
    """Tell what is wrong with one case, with a heat map of the first wrong array."""
    subject = f"{result.subject}: " if result.subject else ""
    lines = [f"{subject}{result.case} ({result.dtype}) {result.status}"]
    if result.message:
        lines.append(f"  {result.message}")
    if result.hint:
        lines.append(f"  hint: {result.hint}")
    wrong = [c for c in result.comparisons if not c]
    lines += [f"  {c.name}: {c.reason}{_at(c)}" for c in wrong]
    for c in wrong[:1]:
        lines += ["    " + line for line in heat_map(c)]
    return lines


def _at(c: Comparison) -> str:
    return f" (worst in {c.where}; at {list(c.worst)})" if c.worst is not None else ""


def _text_arrays(result: CaseResult) -> list[str]:
    rows = [["array", "shape", "dtype", "result", "error", "allowed", "x plain", "correlation",
             "NaN parity", "worst tile"]]
    for c in result.comparisons:
        error, ratio, correlation = _numbers(c)
        allowed = "-" if math.isnan(c.bound) else f"{c.bound:.1e}"
        rows.append([c.name, str(c.shape).replace(" ", ""), c.dtype, OK if c else FAILED, error,
                     allowed, ratio, correlation, "yes" if c.parity else "NO", c.where])
    lines = table(rows, right=(4, 5, 6, 7))
    wrong = [c for c in result.comparisons if not c]
    lines += ["", *(f"{c.name}: {c.reason}{_at(c)}" for c in wrong)] if wrong else []
    lines += [f"hint: {result.hint}"] if result.hint else []
    lines += [result.message] if result.message else []
    for c in result.comparisons:
        picture = heat_map(c)
        lines += ["", f"{c.name}, error by tile", *picture] if picture else []
    return [*lines, "", LEGEND]


_LEVELS = " .:-="
LEGEND = ("tiles of 64: ' ' exact, '.' up to 1%, ':' 10%, '-' 50%, '=' all of the allowed error; "
          "1-9 powers of ten beyond it; N NaN or inf in the wrong place")


def _symbol(x: float) -> str:
    """One character for error / bound."""
    if math.isinf(x):
        return "N"
    if x > 1:
        return str(min(9, math.ceil(math.log10(x))))
    return _LEVELS[int(np.searchsorted([0, 0.01, 0.1, 0.5, 1], x))]


def heat_map(c: Comparison, rows: int = 24, columns: int = 96) -> list[str]:
    """Draw the error by tile in characters, the worst `rows` of heads and `columns` of tiles."""
    lines = []
    for title, labels, grid, _ in _panels(c, rows, columns):
        lines += [title] if title else []
        width = max(map(len, labels), default=0)
        lines += [f"{label.ljust(width)} |{''.join(map(_symbol, row))}|"
                  for label, row in zip(labels, grid, strict=True)]
    return lines


def _panels(c: Comparison, rows: int,
            columns: int) -> list[tuple[str, list[str], np.ndarray, int]]:
    """`heat` as pictures: (title, label of each line, 2-D values, tiles in a cell's width).

    One picture of (heads x tiles of rows), unless both axes have many tiles: then one for a head.
    """
    if c.heat is None or not c.heat.size or len(c.shape) < 2:
        return []
    heat = c.heat if c.axes == 2 else c.heat[..., None]
    lead, tall, wide = heat.shape[:-2], heat.shape[-2], heat.shape[-1]
    flat = heat.reshape(-1, tall, wide)
    order = sorted(np.argsort(-flat.max((1, 2)), kind="stable")[:rows if wide <= 4 else 4].tolist())
    names = [f"batch {', '.join(map(str, index[:-1]))}, head {index[-1]}" if index[1:] else
             f"head {index[0]}" if index else "all" for index in np.ndindex(lead)]
    left_out = f"the worst {len(order)} of {len(flat)} heads" if len(order) < len(flat) else ""
    if wide > 4:
        panels = []
        for i in order:
            grid, step = _shrunk(flat[i], rows, columns)
            labels = [f"{t * step[0] * TILE}:" for t in range(len(grid))]
            panels.append((f"{names[i]} (down: rows, across: columns)", labels, grid,
                           step[1]))
        return panels
    lines = np.stack([flat[i, :, j] for i in order for j in range(wide)])
    labels = [names[i] for i in order]
    if wide > 1:
        labels = [f"{label}, columns {j * TILE}:" for label in labels for j in range(wide)]
    grid, step = _shrunk(lines, len(lines), columns)
    return [(left_out, labels, grid, step[1])]


def _shrunk(grid: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Take the maximum over blocks, to leave at most (rows, columns); also the block's size."""
    step = (-(-grid.shape[0] // rows), -(-grid.shape[1] // columns))
    for axis, size in enumerate(step):
        grid = np.maximum.reduceat(grid, np.arange(0, grid.shape[axis], size), axis=axis)
    return grid, step


_STYLE = """
:root { color-scheme: light; --ink: #1b2733; --soft: #5b6b7a; --line: #dfe5ea; --bad: #b3261e;
  --good: #1a6b4a; --paper: #ffffff; --wash: #f5f7f9; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink);
  background: var(--wash); margin: 0; }
main { max-width: 1140px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 32px 0 8px; }
.verdict { display: inline-block; font-weight: 650; padding: 2px 12px; border-radius: 12px;
  color: #fff; background: var(--good); margin-right: 10px; }
.verdict.bad { background: var(--bad); }
table { border-collapse: collapse; width: 100%; background: var(--paper); font-size: 14px; }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
tr:last-child td { border-bottom: 0; } td.long { white-space: normal; min-width: 11em; }
td.wrap { white-space: normal; } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
th { color: var(--soft); font-weight: 600; background: var(--paper); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
tr.bad td { background: #fdf1f0; } td.bad, .bad-ink { color: var(--bad); font-weight: 650; }
td.skipped { color: var(--soft); } td.ok { color: var(--good); font-weight: 600; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 14px 18px; margin: 12px 0; }
.card h3 { margin: 0 0 6px; font-size: 15px; }
.hint { border-left: 4px solid #c77700; background: #fff7ea; padding: 6px 12px; margin: 8px 0; }
.facts td:first-child { color: var(--soft); width: 10em; }
details > summary { cursor: pointer; margin: 10px 0; }
summary b { font-size: 15px; } summary i { color: var(--soft); font-style: normal; }
ul { margin: 8px 0 12px; padding-left: 20px; } li { margin: 2px 0; }
.pictures { display: flex; flex-wrap: wrap; gap: 8px 32px; }
figure { margin: 10px 0 0; max-width: 100%; }
figcaption { color: var(--soft); font-size: 13px; margin-bottom: 4px; }
svg text { font: 11px system-ui, sans-serif; fill: #5b6b7a; }
footer { color: var(--soft); font-size: 13px; margin-top: 40px; }
"""

_WITHIN = ("#eef3f8", "#cfe0f1", "#9fc4e4", "#5f9fd0", "#2f74ad")
_BEYOND = ("#f6b26b", "#ea8a2f", "#d2601a", "#a83a12", "#7d2410")
_WRONG_NAN = "#111111"


def _colour(x: float) -> str:
    if math.isinf(x):
        return _WRONG_NAN
    if x > 1:
        return _BEYOND[min(len(_BEYOND) - 1, int(math.log10(x)))]
    return _WITHIN[int(np.searchsorted([0, 0.01, 0.1, 0.5, 1], x))]


def _page(report: Report) -> str:
    bad = "" if report.passed else " bad"
    verdict = "passed" if report.passed else "failed"
    facts = "".join(f"<tr><td>{_esc(name)}</td><td>{_esc(fact)}</td></tr>"
                    for name, fact in report.facts)
    single = len(report.results) == 1 and bool(report.results[0].comparisons)
    several = len({r.subject for r in report.results}) > 1
    body = [f"<h1>{_esc(report.title)}</h1>",
            f'<p><span class="verdict{bad}">{verdict}</span>{_esc(report.summary)}</p>']
    if facts:
        body.append(f'<div class="scroll"><table class="facts">{facts}</table></div>')
    if single:
        body.append(_html_case(report.results[0]))
    else:
        if report.failures:
            body.append("<h2>What is wrong</h2>")
            body += [_html_folded(r, several, " open" if i < 3 else "")
                     for i, r in enumerate(report.failures)]
        body += ["<h2>All cases</h2>", _html_cases(report.results, several)]
        shown = [r for r in report.results if r.status == OK and r.comparisons]
        if shown:
            body.append("<details><summary>Numbers and heat maps of what passed</summary>")
            body += [_html_folded(r, several) for r in shown]
            body.append("</details>")
    body += ["<h2>How to read this</h2>", _READING,
             f"<footer>pyattn {_esc(__version__)}, numpy {_esc(np.__version__)}</footer>"]
    return ("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_esc(report.title)}</title><style>{_STYLE}</style></head>"
            f"<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n")


_READING = (
    '<p><b>Error</b> is the largest difference from the dense formulas in float64 (long double for '
    'float64). <b>x plain</b> is that error as a multiple of the error that a plain implementation '
    'in the same dtype makes: matrix products summed in float32, every intermediate array rounded. '
    '<b>Allowed</b> is 2 times the plain error for outputs and 3 times for gradients, plus 2 ulp '
    'of the largest value, or the rounding that cannot be avoided where terms of a sum cancel. '
    '<b>Correlation</b> is the cosine between the array and the exact one. '
    '<b>NaN parity</b>: NaN and inf stand where they should, and nowhere else.</p>'
    '<p>A heat map has one cell for each tile of 64 rows; its colour is the largest error in the '
    'tile as a part of what is allowed.</p>')


def _legend() -> str:
    """One line that tells what the colours mean."""
    swatches = [(colour, words) for colour, words in zip(
        (*_WITHIN, _BEYOND[0], _BEYOND[2], _BEYOND[4], _WRONG_NAN),
        ("exact", "to 1%", "to 10%", "to 50%", "allowed", "to 10x", "to 1000x", "more",
         "NaN amiss"), strict=True)]
    parts, x = [], 0
    for colour, words in swatches:
        parts.append(f'<rect x="{x}" y="1" width="12" height="12" fill="{colour}"/>'
                     f'<text x="{x + 16}" y="11">{words}</text>')
        x += 30 + 6 * len(words)
    return (f'<svg role="img" aria-label="legend of the heat maps" width="{x}" height="14">'
            f'{"".join(parts)}</svg>')


_LEGEND_SVG = _legend()


def _html_cases(results: Sequence[CaseResult], several: bool) -> str:
    head = (["subject"] if several else []) + ["case", "dtype", "result", "worst array"]
    cells = "".join(f"<th>{name}</th>" for name in head) + "".join(
        f'<th class="n">{name}</th>' for name in ("error", "x plain", "correlation"))
    rows = []
    for r in results:
        numbers = ["", "", "", ""] if r.worst is None else [r.worst.name, *_numbers(r.worst)]
        words = [r.subject] * several + [r.case, r.dtype]
        bad = r.status in (FAILED, ERROR)
        status = f"{r.status}: {r.message}" if r.status == SKIPPED else r.status
        rows.append(('<tr class="bad">' if bad else "<tr>")
                    + "".join(f'<td class="wrap">{_esc(word)}</td>' for word in words)
                    + f'<td class="wrap {"bad" if bad else r.status}">{_esc(status)}</td>'
                    + f"<td>{_esc(numbers[0])}</td>"
                    + "".join(f'<td class="n">{number}</td>' for number in numbers[1:]) + "</tr>")
    return f'<div class="scroll"><table><tr>{cells}</tr>{"".join(rows)}</table></div>'


def _html_folded(r: CaseResult, several: bool, state: str = "") -> str:
    """One case under a line that names it and, where known, the cause."""
    subject = f"{r.subject}: " if several and r.subject else ""
    cause = f" <i>{_esc(r.hint)}</i>" if r.hint else ""
    return (f"<details{state}><summary><b>{_esc(subject + r.case)}</b> {_esc(r.dtype)}{cause}"
            f"</summary>{_html_case(r)}</details>")


def _html_case(r: CaseResult) -> str:
    parts = [f"<pre>{_esc(r.message)}</pre>"] if r.message else []
    if r.hint:
        parts.append(f'<p class="hint"><b>Likely cause:</b> {_esc(r.hint)}.</p>')
    reasons = [f'<li><span class="bad-ink">{_esc(c.name)}</span>: {_esc(c.reason + _at(c))}</li>'
               for c in r.comparisons if not c]
    parts += [f"<ul>{''.join(reasons)}</ul>"] if reasons else []
    if r.comparisons:
        parts.append(_html_arrays(r.comparisons))
    pictures = [figure for c in r.comparisons if (figure := _figure(c))]
    if pictures:
        parts.append("<figure><figcaption>Error by tile of 64 rows, from left to right"
                     f"</figcaption>{_LEGEND_SVG}</figure>"
                     f'<div class="pictures">{"".join(pictures)}</div>')
    return f'<div class="card">{"".join(parts)}</div>'


def _html_arrays(comparisons: Sequence[Comparison]) -> str:
    rows = []
    for c in comparisons:
        error, ratio, correlation = _numbers(c)
        allowed = "-" if math.isnan(c.bound) else f"{c.bound:.1e}"
        rows.append(
            ("<tr>" if c else '<tr class="bad">') + f"<td>{_esc(c.name)}</td>"
            f"<td>{_esc(str(c.shape))}</td><td>{_esc(c.dtype)}</td>"
            f'<td class="{"ok" if c else "bad"}">{OK if c else FAILED}</td>'
            + "".join(f'<td class="n">{x}</td>' for x in (error, allowed, ratio, correlation))
            + f"<td>{'yes' if c.parity else '<b>no</b>'}</td>"
            f'<td class="long">{_esc(c.where)}</td></tr>')
    names = ("array", "shape", "dtype", "result")
    numbers = ("error", "allowed", "x plain", "correlation")
    head = ("".join(f"<th>{x}</th>" for x in names)
            + "".join(f'<th class="n">{x}</th>' for x in numbers)
            + "<th>NaN parity</th><th>worst tile</th>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _figure(c: Comparison) -> str:
    panels = [f"<figcaption>{_esc(c.name)}{': ' + _esc(title) if title else ''}</figcaption>"
              + _svg(c.name, labels, grid, step)
              for title, labels, grid, step in _panels(c, 32, 128)]
    return f"<figure>{''.join(panels)}</figure>" if panels else ""


def _svg(name: str, labels: list[str], grid: np.ndarray, step: int) -> str:
    """One heat map: a cell for `step` tiles, with its numbers where a pointer rests on it."""
    across, foot = grid.shape[1], 20 * len(grid)
    cell = max(6, min(22, 800 // across))
    margin = 8 + 7 * max(map(len, labels))
    parts = []
    for y, (label, row) in enumerate(zip(labels, grid, strict=True)):
        parts.append(f'<text x="{margin - 6}" y="{y * 20 + 14}" text-anchor="end">'
                     f"{_esc(label)}</text>")
        for x, value in enumerate(row):
            words = "NaN or inf amiss" if math.isinf(value) else f"{value:.2g} of the allowed error"
            parts.append(
                f'<rect x="{margin + x * cell}" y="{y * 20}" width="{cell - 1}" height="19" '
                f'fill="{_colour(float(value))}"><title>{_esc(label)}, from '
                f"{x * step * TILE}: {words}</title></rect>")
    parts += [f'<text x="{margin + x * cell}" y="{foot + 12}">{x * step * TILE}</text>'
              for x in range(0, across, max(1, across // 8))]
    return (f'<div style="overflow-x:auto"><svg role="img" aria-label="error of {_esc(name)} by '
            f'tile" width="{margin + across * cell + 30}" height="{foot + 16}">{"".join(parts)}'
            "</svg></div>")


def _esc(x: Any) -> str:
    return html.escape(str(x))
