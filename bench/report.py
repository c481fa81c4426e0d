"""Measurements as a markdown table and a plot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyattn

from .harness import Measurement, Spread

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
        "1, pyattn is faster. GFLOP/s count allowed pairs alone. GEMM is a 1024 x 1024 matrix "
        "product of the dtype in the same turns, NumPy's or torch's, whichever is faster here. "
        "MB: peak memory above the inputs.",
        "",
    ]
    if dropped:
        taken = ", ".join(f"{name}={value}" for name, value in dropped.items())
        lines += [f"Not passed on to the libraries: {taken}.", ""]
    header = ["problem", "pass", "pyattn ms", "GFLOP/s", "of GEMM",
              *(f"{rival} / pyattn" for rival in rivals),
              *(f"{rival} MB" for rival in ("pyattn", *rivals))]
    lines += [_line(header), _line(["---", "---"] + ["--:"] * (len(header) - 2))]
    lines += [_line(_cells(found, rivals)) for found in measurements]
    notes = {f"- {rival}, {found.row.name}, {_pass(found)}: {reason}"
             for found in measurements for rival, reason in found.absent.items()}
    beyond = [f"- {found.row.name}, {_pass(found)}" for found in measurements
              if _share(found) > 1]
    if beyond:
        lines += ["", "Above 100% of GEMM, so that product is not what the machine can do (another "
                      "process, or a library that does not know this CPU):", "", *beyond]
    if notes:
        lines += ["", "Not timed:", "", *sorted(notes)]
    return "\n".join(lines) + "\n"


def _rivals(measurements: Sequence[Measurement]) -> list[str]:
    named = (rival for found in measurements for rival in found.row.rivals[1:])
    return list(dict.fromkeys(named))


def _pass(found: Measurement) -> str:
    return "forward + backward" if found.backward else "forward"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _share(found: Measurement) -> float:
    """The first rival's part of the machine's matrix product; 0 if one of them was not timed."""
    first = found.row.rivals[0]
    return found.gflops(first) / found.gemm if found.gemm and first in found.seconds else 0.0


def _cells(found: Measurement, rivals: Sequence[str]) -> list[str]:
    first = found.row.rivals[0]
    cells = [found.row.name, _pass(found)]
    if first in found.seconds:
        cells += [f"{found.seconds[first].median * 1e3:.3g}", f"{found.gflops(first):.0f}",
                  f"{_share(found):.0%}" if found.gemm else ""]
    else:
        cells += ["", "", ""]
    cells += [_ratio(found.ratios.get(rival)) for rival in rivals]
    for rival in (first, *rivals):
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
                    [f"{found.row.name}, {_pass(found)}" for found in measurements], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time divided by pyattn's: to the right of 1, pyattn is faster")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
