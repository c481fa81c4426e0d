"""``python -m pyattn``: the same command line as the ``pyattn`` script."""

import sys

from .cli import main

sys.exit(main())
