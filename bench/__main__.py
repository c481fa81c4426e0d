"""``python -m bench``: measure, and write the table and the plot."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
                    "NUMBA_NUM_THREADS")

HOLDING_BACK = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE",
                "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA",
                "ONEDNN_MAX_CPU_ISA", "NPY_DISABLE_CPU_FEATURES", "NUMBA_CPU_NAME",
                "NUMBA_CPU_FEATURES")
"""Variables that make a library use less of the CPU than it would by itself. Left in place, one of
them has made NumPy's matrix product half as fast, and whatever is compared with it look good."""

REST = 0.3
"""Seconds for which OpenMP's and OpenBLAS's idle threads may hold on to a core that others need."""


def main() -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Time pyattn beside NumPy, torch and JAX, in turns in "
                                            "one process, and count peak memory.")
    parser.add_argument("--quick", action="store_true", help="the short set")
    parser.add_argument("--rows", metavar="REGEX", help="only rows whose name matches")
    parser.add_argument("--list", action="store_true", help="print the rows' names and stop")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--patterns", action="store_true",
                      help="only fixed patterns, at N = 1024, 4096 and 16384")
    some.add_argument("--content", action="store_true",
                      help="only variants that choose keys by content, at N = 2048 to 65536")
    some.add_argument("--linear", action="store_true",
                      help="only variants whose time is linear in N, at N = 2048 to 262144")
    parser.add_argument("--targets", action="store_true",
                        help="only rows with a target, and a table of what was reached")
    parser.add_argument("--threads", type=int, nargs="+", default=[len(_cores())], metavar="N",
                        help="for every library; with several counts, one run after the other "
                             "(default: %(default)s)")
    parser.add_argument("--seconds", type=float,
                        help="for the turns of one row and pass (default: 3, with --quick 2)")
    parser.add_argument("--no-memory", action="store_true", help="do not count memory")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table here too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios")
    args = parser.parse_args()
    if len(args.threads) > 1:
        if args.output or args.plot:
            parser.error("--output and --plot need one number of --threads")
        return max(_again(threads, args) for threads in args.threads)
    [threads] = args.threads
    _limit_threads(threads)
    dropped = {name: os.environ.pop(name) for name in HOLDING_BACK if name in os.environ}

    # only now: the thread pools of NumPy and the others take their size when they are imported
    from pyattn.cli.progress import progress

    from .content import CONTENT_ROWS
    from .harness import measure
    from .linear import LINEAR_ROWS
    from .report import markdown, plot, target_table
    from .rows import ROWS, PatternRow
    from .targets import CONTENT_TARGETS, LINEAR_TARGETS, PATTERN_TARGETS, TARGETS

    known = {"patterns": ([row for row in ROWS if isinstance(row, PatternRow)], PATTERN_TARGETS),
             "content": (CONTENT_ROWS, CONTENT_TARGETS), "linear": (LINEAR_ROWS, LINEAR_TARGETS)}
    chosen = next((name for name in known if getattr(args, name)), None)
    everything, targets = known[chosen] if chosen else ((*ROWS, *CONTENT_ROWS, *LINEAR_ROWS),
                                                        TARGETS)
    rows = [row for row in everything if (row.quick or not args.quick)
            and (not args.targets or any(target.speaks_of(row) for target in targets))
            and (args.rows is None or re.search(args.rows, row.name))]
    if args.list:
        print("\n".join(row.name for row in rows))
        return 0
    if not rows:
        parser.error(f"no row matches {args.rows!r}; --list names them")
    seconds = args.seconds if args.seconds is not None else 2.0 if args.quick else 3.0
    measurements = []
    with progress("measuring", total=sum(len(row.passes) for row in rows)) as bar:
        for row in rows:
            for backward in row.passes:
                measurements.append(measure(row, backward, seconds=seconds,
                                            memory=not args.no_memory,
                                            rest=REST if threads > 1 else 0.0))
                bar.advance(text=row.name)
    table = markdown(measurements, threads, dropped)
    if args.targets:
        table += "\n" + target_table(targets, measurements, threads)
    print(table, end="")
    if args.output:
        args.output.write_text(table)
    if args.plot:
        plot(measurements, args.plot)
    return 0


def _again(threads: int, args: argparse.Namespace) -> int:
    """Run this command for one number of threads, in a process that starts with all cores."""
    switches = [f"--{name.replace('_', '-')}"
                for name in ("quick", "patterns", "content", "linear", "targets", "list",
                             "no_memory")
                if getattr(args, name)]
    values = [f"--{name}={value}" for name in ("rows", "seconds")
              if (value := getattr(args, name)) is not None]
    command = [sys.executable, "-m", "bench", *switches, *values, "--threads", str(threads)]
    return subprocess.run(command, check=False).returncode


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _limit_threads(threads: int) -> None:
    """Give this process `threads` cores: JAX has no other setting that it obeys."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, _cores()[:threads])
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(threads)


if __name__ == "__main__":
    sys.exit(main())
