"""Measurements as a markdown table and a plot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyattn

from .content import DECIDED
from .harness import Measurement, Spread
from .linear import LinearRow
from .targets import DECIDING, MACHINE, MEGABYTES, MICROSECONDS, Target, reached

DENSE = " dense"
"""How the names of rivals end that attend over all pairs."""

RIVAL_PACKAGES = ("torch", "jax", "numpy")


def markdown(measurements: Sequence[Measurement], threads: int,
             dropped: Mapping[str, str] | None = None) -> str:
    """A table with one line for each row and pass, under a paragraph on how to read it.

    `dropped` are environment variables that were taken away before measuring.
    """
    rivals = _rivals(measurements)
    config = pyattn.show_config(mode="dicts")
    versions = ", ".join(f"{name} {config['versions'][name]}" for name in RIVAL_PACKAGES)
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    count = "one thread" if threads == 1 else f"{threads} threads"
    lines = [
        f"{config['cpu']['name']}, {count} of {os.cpu_count()}{load}; {versions}.",
        "",
        "Ratios are a rival's time divided by pyattn's in the same turn: median (quartiles); above "
        "1, pyattn is faster. GFLOP/s count allowed pairs alone. Of the machine: that rate divided "
        "by that of a 1024 x 1024 matrix product of the dtype in the same turns, the fastest of "
        "NumPy's and torch's; where it is GB/s of keys and values, by that of a plain read of as "
        "many bytes. MB: peak memory above the inputs.",
        "",
    ]
    different: dict[str, list[str]] = {}
    for found in measurements:
        for rival in found.different:
            different.setdefault(rival, []).append(_title(found))
    if dense := [rival for rival in different if rival.endswith(DENSE)]:
        lines += [f"Timed, but not compared: {', '.join(dense)} attend over all pairs, causal "
                  "where the pattern is. In the layers of other packages, functions that hand over "
                  "q, k and v are in the place of the projections.", ""]
    if any(DECIDED in found.row.rivals for found in measurements):
        lines += ["Tokens are independent normal numbers. Told what to decide (buckets, clusters, "
                  f"lists), pyattn is {DECIDED}: what its ratio lacks to 1 is the share of "
                  "hashing, clustering and selection.", ""]
    if any(isinstance(found.row, LinearRow) for found in measurements):
        lines += ["Of variants that sum over keys before queries read them, GFLOP/s count what "
                  "they multiply out in a forward, and a backward as two.", ""]
    if dropped:
        taken = ", ".join(f"{name}={value}" for name, value in dropped.items())
        lines += [f"Not passed on to the libraries: {taken}.", ""]
    counted = [rival for rival in ("pyattn", *rivals)
               if any(rival in found.megabytes for found in measurements)]
    header = ["problem", "pass", "pyattn ms", "rate", "of the machine",
              *(f"{rival} / pyattn" for rival in rivals), *(f"{rival} MB" for rival in counted)]
    lines += _table(header, [_cells(found, rivals, counted) for found in measurements])
    beyond = [f"- {_title(found)}" for found in measurements
              if found.share is not None and found.share.median > 1]
    if beyond:
        lines += ["", "Above 100% of the machine, so what it is compared with is not what the "
                      "machine can do (another process, or a library that does not know this CPU):",
                  "", *beyond]
    others = {rival: titles for rival, titles in different.items() if rival not in dense}
    if others:
        lines += ["", "Timed, but not compared, as they have rules of their own for who sees whom, "
                      "or features of their own:",
                  ""]
        lines += [f"- {rival} ({'; '.join(titles)})" for rival, titles in others.items()]
    notes: dict[str, list[str]] = {}
    for found in measurements:
        for rival, reason in found.absent.items():
            notes.setdefault(f"{rival}: {reason}", []).append(_title(found))
    if notes:
        lines += ["", "Not timed:", ""]
        lines += [f"- {note} ({'; '.join(titles)})" for note, titles in sorted(notes.items())]
    return "\n".join(lines) + "\n"


def target_table(targets: Sequence[Target], measurements: Sequence[Measurement],
                 threads: int) -> str:
    """What was to be reached and what was: of each target's rows, the worst."""
    count = "one thread" if threads == 1 else f"{threads} threads"
    lines = [f"Targets, {count}: the worst of the measured rows, median (quartiles).", ""]
    header = ["against", "pass", "target", "stretch", "reached", "", "rows", "worst"]
    cells = []
    for target in targets:
        found = reached(target, measurements)
        wanted = [target.text, target.steps, *(_value(target, Spread.of([value]))
                                               for value in (target.target, target.stretch))]
        if not found:
            cells.append([*wanted, "not measured", "", "0", ""])
            continue
        ordered = sorted(found, key=lambda name: found[name].median)
        worst = ordered[-1 if target.smaller_is_better else 0]
        verdict = "met" if target.met(found[worst].median) else "short"
        cells.append([*wanted, _value(target, found[worst]), verdict, str(len(found)), worst])
    return "\n".join([*lines, *_table(header, cells, left=(0, 1, 5, 7))]) + "\n"


def _value(target: Target, spread: Spread) -> str:
    form = {MACHINE: "{:.0%}", DECIDING: "{:.0%}", MICROSECONDS: "{:.1f}",
            MEGABYTES: "{:.0f}"}.get(target.against, "{:.2f}")
    middle, low, high = (form.format(x) for x in (spread.median, spread.low, spread.high))
    return middle if low == high else f"{middle} ({low}-{high})"


def _rivals(measurements: Sequence[Measurement]) -> list[str]:
    named = (rival for found in measurements for rival in found.row.rivals[1:])
    return list(dict.fromkeys(named))


def _pass(found: Measurement) -> str:
    return "forward + backward" if found.backward else "forward"


def _title(found: Measurement) -> str:
    return f"{found.row.name}, {_pass(found)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]],
           left: Sequence[int] = (0, 1)) -> list[str]:
    rule = ["---" if column in left else "--:" for column in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def _cells(found: Measurement, rivals: Sequence[str], counted: Sequence[str]) -> list[str]:
    first = found.row.rivals[0]
    cells = [found.row.name, _pass(found)]
    if first in found.seconds:
        unit = "GB/s" if found.row.limit == "read" else "GFLOP/s"
        cells += [f"{found.seconds[first].median * 1e3:.3g}",
                  f"{found.rate(first) / 1e9:.3g} {unit}",
                  "" if found.share is None else f"{found.share.median:.0%}"]
    else:
        cells += ["", "", ""]
    cells += [_ratio(found.ratios.get(rival)) for rival in rivals]
    for rival in counted:
        peak = found.megabytes.get(rival)
        cells.append("" if peak is None else f"{peak:.0f}")
    return cells


def _ratio(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"


def plot(measurements: Sequence[Measurement], path: Path) -> None:
    """Draw the ratios of every rival, one line for each row and pass."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    rivals = _rivals(measurements)
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.35 * len(measurements)),
                                layout="constrained")
    for marker, rival in zip("osD^v", rivals, strict=False):
        points: list[tuple[int, Any]] = [(y, found.ratios[rival])
                                         for y, found in enumerate(measurements)
                                         if rival in found.ratios]
        if points:
            axes.errorbar(
                [s.median for _, s in points], [y for y, _ in points], fmt=marker, capsize=3,
                xerr=[[s.median - s.low for _, s in points],
                      [s.high - s.median for _, s in points]],
                label=rival)
    axes.axvline(1, color="0.5", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(measurements)),
                    [_title(found) for found in measurements], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time divided by pyattn's: to the right of 1, pyattn is faster")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
