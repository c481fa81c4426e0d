"""The folder where compiled code is kept from process to process, and its files.

A file of code begins with the digest of what follows. Nobody meets half a file, and one that is
damaged or that another user could have written is not taken. Plain files have no digest: they are
for people to read, too, and whoever takes one looks at what it says.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from pathlib import Path

CACHE_VARIABLE = "PYATTN_CACHE_DIR"
DIGEST_BYTES = 32
ROOT = 0
WRITABLE_BY_OTHERS = 0o022


def cache_folder() -> Path | None:
    """Return where compiled code is kept; None if this user has no home."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "pyattn"
    usual = home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or usual) / "pyattn"


def read(path: Path) -> bytes | None:
    """Return what `write` stored, unless it is missing, damaged, or another user's."""
    content = read_plain(path)
    if content is None:
        return None
    digest, stored = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    return stored if hashlib.sha256(stored).digest() == digest else None


def read_plain(path: Path) -> bytes | None:
    """Return what a file holds, unless it is missing or another user's."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read()
    except OSError:
        return None
    if hasattr(os, "getuid") and (
            status.st_uid not in (os.getuid(), ROOT) or status.st_mode & WRITABLE_BY_OTHERS):
        return None
    return content


def write(path: Path, content: bytes) -> None:
    """Keep `content` at `path`, a file in a folder of the cache, if anything can be written."""
    write_plain(path, hashlib.sha256(content).digest() + content)


def write_plain(path: Path, content: bytes) -> None:
    """Do so without a digest."""
    try:
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            Path(name).unlink()
