"""Compiled kernels on disk, so that a warm process needs no compiler.

A file is a digest of the rest, a line of JSON that says what it is, and the code. It is used only
where the digest fits, where the line says all that the code depends on, and where the file is the
user's own; all else is compiled again. A folder that cannot be written is no error: there is no
cache then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from .compiler import Image

FORMAT = 1
SUFFIX = ".kernel"
_UNFINISHED = "unfinished-"
#: A kernel takes some 10 to 100 KB. What was not used for longest goes first.
MAX_BYTES = 64 << 20
MAX_FILES = 4096
_HOUR = 3600.0
_DIGEST = hashlib.sha256().digest_size


def folder() -> Path | None:
    """FASTNORM_CACHE_DIR, else the user's cache; None where it is empty or there is no home."""
    asked = os.environ.get("FASTNORM_CACHE_DIR")
    if asked is not None:
        return Path(asked) if asked else None
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base, "fastnorm")
    try:
        return Path.home() / ".cache" / "fastnorm"
    except RuntimeError:
        return None


def describe(
    spec: object, capability: tuple[int, int], sources: str, versions: Mapping[str, str]
) -> str:
    """All that the code depends on, as text."""
    facts = {
        "format": FORMAT, "spec": repr(spec), "capability": list(capability), "sources": sources,
        "versions": dict(versions),
    }  # fmt: skip
    return json.dumps(facts, sort_keys=True)


def path_of(description: str) -> Path | None:
    """Where the code of this description is kept."""
    where = folder()
    return where and where / (hashlib.sha256(description.encode()).hexdigest()[:40] + SUFFIX)


def read(description: str) -> Image | None:
    """The image that was kept; None where there is none that can be trusted."""
    path = path_of(description)
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            if not _is_own(os.fstat(file.fileno())):
                return None
            image = _parsed(file.read(), description)
        if image is not None:
            os.utime(path)  # used now
        return image
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_own(status: os.stat_result) -> bool:
    """Whether nobody else could have written the file."""
    others = stat.S_IWGRP | stat.S_IWOTH
    return status.st_uid == os.geteuid() and not status.st_mode & others


def _parsed(content: bytes, description: str) -> Image | None:
    digest, rest = content[:_DIGEST], content[_DIGEST:]
    if digest != hashlib.sha256(rest).digest():
        return None
    line, _, code = rest.partition(b"\n")
    head = json.loads(line)
    if head["what"] != description:
        return None
    return Image(code, head["entry"], head["kind"], head["info"])


def write(description: str, image: Image) -> None:
    """Keep an image for other processes; it appears whole or not at all."""
    path = path_of(description)
    if path is None:
        return
    head = {
        "what": description, "entry": image.entry, "kind": image.kind, "info": image.info,
    }  # fmt: skip
    rest = json.dumps(head, default=str).encode() + b"\n" + bytes(image.code)
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_whole(path, hashlib.sha256(rest).digest() + rest)
        _tidy(path.parent)


def _write_whole(path: Path, content: bytes) -> None:
    number, name = tempfile.mkstemp(prefix=_UNFINISHED, dir=path.parent)
    try:
        with open(number, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def forget(description: str) -> None:
    """Drop what was kept: the driver would not have it."""
    path = path_of(description)
    if path is not None:
        with contextlib.suppress(OSError):
            path.unlink()


def _tidy(where: Path) -> None:
    """Keep the folder small; leave alone what is not ours by its name."""
    found = []
    with os.scandir(where) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if entry.name.startswith(_UNFINISHED) and status.st_mtime < time.time() - _HOUR:
                    os.unlink(entry.path)  # of a process that died
                elif entry.name.endswith(SUFFIX):
                    found.append((status.st_mtime, status.st_size, entry.path))
    found.sort(reverse=True)
    total = 0
    for count, (_, size, path) in enumerate(found, 1):
        total += size
        if total > MAX_BYTES or count > MAX_FILES:
            with contextlib.suppress(OSError):
                os.unlink(path)
