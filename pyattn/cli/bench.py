"""``python -m pyattn bench``: the measurements of bench/, which is part of a checkout."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pyattn.checks import OptionError

CHECKOUT = Path(__file__).resolve().parents[2]


def add(subparsers: Any) -> None:
    """Declare the command."""
    # no argument begins with NUL, so argparse passes every one on, --help included
    parser = subparsers.add_parser(
        "bench", help="time against NumPy, torch and JAX (needs a checkout)",
        add_help=False, prefix_chars="\0")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Hand over to ``python -m bench``, in a process that can still choose its threads."""
    if not (CHECKOUT / "bench" / "__main__.py").is_file():
        raise OptionError("bench/ is not installed with the package; run this in a checkout of "
                          "pyattn, with pip install -e '.[bench]'")
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "bench", *args.arguments]
    return subprocess.run(command, env=environment, check=False).returncode
