"""The command line, ``python -m pyattn``: one module for each command.

A command's module has ``add(subparsers)``, which declares its arguments and sets ``run``, and
``run(args) -> int``, the exit status. All of them are imported to answer ``--help``, so they import
what is slow (numba, scipy, matplotlib) inside ``run``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pyattn._version import __version__
from pyattn.checks import BackendError, DtypeError, OptionError, ShapeError

COMMANDS = ("info", "check", "demo", "show", "warmup", "bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done. 1: done, and what was checked is wrong. 2: the arguments or a file are of no use; one
    line on stderr says why. 130: interrupted.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        status = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # whoever read us has gone; without this, Python would complain while it shuts down
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except (ShapeError, DtypeError, OptionError, BackendError, OSError) as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    as_module = Path(sys.argv[0]).name == "__main__.py"
    parser = argparse.ArgumentParser(
        prog="python -m pyattn" if as_module else "pyattn",
        description="Attention for plain arrays, forward and backward.")
    parser.add_argument("--version", action="version", version=f"pyattn {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for name in COMMANDS:
        importlib.import_module(f"{__name__}.{name}").add(subparsers)
    return parser
