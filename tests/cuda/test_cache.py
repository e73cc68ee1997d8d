"""Compiled kernels on disk: found again, or not there; never wrong, never in the way."""

import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ..helpers import child

cache = pytest.importorskip("fastnorm.cuda.cache")

IMAGE = cache.Image(b".version 8.0\n\x00\xff code\x00", "kernel_1", "ptx", {"registers": 40})
WHAT = cache.describe(("forward", 4096), (9, 0), "abc", {"numba": "1"})


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    where = tmp_path / "kernels"
    monkeypatch.setenv("FASTNORM_CACHE_DIR", str(where))
    return where


def files(folder):
    return sorted(folder.iterdir()) if folder.exists() else []


def test_what_was_written_is_read(folder):
    assert cache.read(WHAT) is None
    cache.write(WHAT, IMAGE)
    assert cache.read(WHAT) == IMAGE
    [file] = files(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    cache.forget(WHAT)
    assert cache.read(WHAT) is None
    cache.forget(WHAT)


@pytest.mark.parametrize(
    "other",
    [
        (("forward", 8192), (9, 0), "abc", {"numba": "1"}),
        (("forward", 4096), (8, 0), "abc", {"numba": "1"}),
        (("forward", 4096), (9, 0), "abd", {"numba": "1"}),
        (("forward", 4096), (9, 0), "abc", {"numba": "2"}),
        (("forward", 4096), (9, 0), "abc", {"numba": "1", "nvvm": "1"}),
    ],
)
def test_all_that_code_depends_on_is_in_the_key(other):
    cache.write(WHAT, IMAGE)
    assert cache.read(cache.describe(*other)) is None


def test_every_corruption_is_noticed(folder):
    cache.write(WHAT, IMAGE)
    [file] = files(folder)
    good = file.read_bytes()
    for length in range(len(good)):
        file.write_bytes(good[:length])
        assert cache.read(WHAT) is None, length
    for at in range(len(good)):
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert cache.read(WHAT) is None, at
    for content in (b"", b"\n", b"null\n", b"[]\n", b'{"what": 1}\n', b"\xff\xfe\n", good + b"\0"):
        file.write_bytes(content)
        assert cache.read(WHAT) is None, content
    cache.write(WHAT, IMAGE)
    assert cache.read(WHAT) == IMAGE


def test_files_of_another_name_or_owner_are_not_used(folder):
    cache.write(WHAT, IMAGE)
    [file] = files(folder)
    other = cache.describe("other", (9, 0), "abc", {})
    cache.path_of(other).write_bytes(file.read_bytes())
    assert cache.read(other) is None  # its head says that it is another's
    file.chmod(0o622)
    assert cache.read(WHAT) is None
    file.chmod(0o600)
    assert cache.read(WHAT) == IMAGE
    if os.geteuid() == 0:
        os.chown(file, 12345, -1)
        assert cache.read(WHAT) is None


def test_where_nothing_can_be_written_there_is_no_cache(monkeypatch, folder):
    for where in ("/dev/null/kernels", "/proc/kernels", ""):
        monkeypatch.setenv("FASTNORM_CACHE_DIR", where)
        cache.write(WHAT, IMAGE)
        assert cache.read(WHAT) is None
        cache.forget(WHAT)
    assert not folder.exists()


def test_a_full_disk_leaves_nothing(monkeypatch, folder):
    def fail(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    cache.write(WHAT, IMAGE)
    assert files(folder) == []


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTNORM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "fastnorm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its definition says to ignore
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder() == tmp_path / "home" / ".cache" / "fastnorm"


def test_it_does_not_grow_without_end(monkeypatch, folder):
    names = [cache.describe(i, (9, 0), "abc", {}) for i in range(12)]
    for i, name in enumerate(names[:10]):
        cache.write(name, IMAGE)
        os.utime(cache.path_of(name), (i, i))
    folder.joinpath("mine.txt").write_text("not a kernel")
    assert cache.read(names[0]) == IMAGE  # which makes it the latest
    monkeypatch.setattr(cache, "MAX_FILES", 5)
    cache.write(names[10], IMAGE)
    kept = [i for i, name in enumerate(names) if cache.read(name)]
    assert kept == [0, 7, 8, 9, 10]
    monkeypatch.setattr(cache, "MAX_FILES", 100)
    size = cache.path_of(names[10]).stat().st_size
    monkeypatch.setattr(cache, "MAX_BYTES", int(2.5 * size))
    cache.write(names[11], IMAGE)
    assert len([name for name in names if cache.read(name)]) == 2
    assert folder.joinpath("mine.txt").exists()


def test_what_processes_left_unfinished_goes(folder):
    cache.write(WHAT, IMAGE)
    old, new = folder / "unfinished-old", folder / "unfinished-new"
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    cache.write(WHAT, IMAGE)
    assert not old.exists()
    assert new.exists()


def test_many_writers(folder):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: cache.write(WHAT, IMAGE), range(200)))
    assert cache.read(WHAT) == IMAGE
    assert len(files(folder)) == 1


def test_readers_see_whole_files_beside_a_writer(folder):
    writes = f"""
        from fastnorm.cuda import cache
        image = cache.Image(b"x" * 200000, "entry", "ptx", dict())
        for _ in range(300):
            cache.write({WHAT!r}, image)
    """
    big = cache.Image(b"x" * 200000, "entry", "ptx", {})
    cache.write(WHAT, big)
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(child.run, writes, FASTNORM_CACHE_DIR=str(folder))
        while not writer.done():
            assert cache.read(WHAT) == big
    assert writer.result().returncode == 0, writer.result().stderr
