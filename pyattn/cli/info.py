"""``python -m pyattn info``: versions, backends and the machine."""

from __future__ import annotations

import argparse
from typing import Any


def add(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "info", help="print versions, backends, threads and caches",
        description="Print what pyattn.show_config() knows, as you would paste it into a report.")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the configuration."""
    from pyattn.config import show_config

    if args.json:
        import json

        print(json.dumps(show_config(mode="dicts"), indent=2))
    else:
        show_config()
    return 0
