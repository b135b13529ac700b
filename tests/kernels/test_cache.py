"""Compiled kernels on disk, with a compiler that only counts."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from convservice.dtypes import FLOAT32
from convservice.errors import InternalError
from convservice_backends.cuda.source import Kernel, type_constants
from convservice_backends.cupy import cache as cache_module
from convservice_backends.cupy import compiler
from convservice_backends.cupy.cache import IN_USE_SECONDS, KernelCache, default_folder
from convservice_backends.cupy.compiler import Compiled

CONSTANTS = type_constants(FLOAT32, FLOAT32)
KERNEL = Kernel("direct", "float32", 128, CONSTANTS)
OTHER = Kernel("direct", "float32", 64, CONSTANTS)
SIZE = 1000
ROOT = Path(__file__).parents[2]


def fake(kernel: Kernel, architecture: int) -> Compiled:
    """As many bytes for every kernel, others for each."""
    seed = hashlib.sha256(f"{kernel.digest} {architecture}".encode()).digest()
    return Compiled((seed * SIZE)[:SIZE], "")


def cache_in(folder: Path, limit_bytes: int = 1 << 20) -> KernelCache:
    return KernelCache(folder, limit_bytes=limit_bytes, compile_with=fake)


def counted(cache: KernelCache) -> tuple[int, int]:
    return cache.compiled, cache.found


def test_compiled_once_for_all_processes(tmp_path: Path) -> None:
    first = cache_in(tmp_path / "not" / "yet")
    path = first.path(KERNEL, 90)
    assert path.read_bytes() == fake(KERNEL, 90).cubin
    assert first.path(KERNEL, 90) == path
    assert counted(first) == (1, 1)
    second = cache_in(tmp_path / "not" / "yet")
    assert second.path(KERNEL, 90) == path
    assert counted(second) == (0, 1)


def test_what_the_code_follows_from_tells_files_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_in(tmp_path)
    paths = {cache.path(KERNEL, 90), cache.path(OTHER, 90), cache.path(KERNEL, 80)}
    monkeypatch.setattr(compiler, "OPTIONS", (*compiler.OPTIONS, "--use_fast_math"))
    paths.add(cache.path(KERNEL, 90))
    monkeypatch.setattr(compiler, "compiler_version", lambda: "99.0")
    paths.add(cache.path(KERNEL, 90))
    assert len(paths) == 5
    assert counted(cache) == (5, 0)


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = cache_in(tmp_path)
    path = cache.path(KERNEL, 90)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-1], "changed": b"\0" + whole[1:], "emptied": b""}[damage])
    assert cache.path(KERNEL, 90).read_bytes() == whole
    assert counted(cache) == (2, 0)
    assert "is damaged" in caplog.text


def test_a_folder_that_takes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_bytes(b"")
    cache = cache_in(in_the_way / "kernels")
    path = cache.path(KERNEL, 90)
    assert path.read_bytes() == fake(KERNEL, 90).cubin
    assert cache.path(OTHER, 90).parent == path.parent != in_the_way
    assert cache.path(KERNEL, 90) == path
    assert counted(cache) == (2, 1)
    assert caplog.text.count("cannot be kept in") == 1
    del cache
    assert not path.parent.exists()


def test_no_folder_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "default_folder", lambda: None)
    cache = KernelCache(compile_with=fake)
    assert cache.folder is None
    assert cache.path(KERNEL, 90) == cache.path(KERNEL, 90)
    assert counted(cache) == (1, 1)


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_in(tmp_path)

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(InternalError, match=f"of {SIZE} bytes can be written neither .* No space left"):
            cache.path(KERNEL, 90)
    assert list(tmp_path.iterdir()) == []
    assert cache.path(KERNEL, 90).parent == tmp_path


def test_the_oldest_go_when_there_are_too_many(tmp_path: Path) -> None:
    cache = cache_in(tmp_path, limit_bytes=3 * SIZE)
    paths = [cache.path(Kernel("direct", f"{i}", 128, CONSTANTS), 90) for i in range(5)]
    assert all(path.exists() for path in paths)  # all in use
    part, foreign = tmp_path / ".broken.part", tmp_path / "notes.txt"
    for path in (part, foreign):
        path.write_bytes(b"")
    before = foreign.stat().st_mtime - IN_USE_SECONDS - 100
    for age, path in enumerate([*paths, part, foreign]):
        os.utime(path, (before + age, before + age))
    cache.path(Kernel("direct", "1", 128, CONSTANTS), 90)  # used again
    newest = cache.path(KERNEL, 90)
    assert {path for path in paths if path.exists()} == {paths[1], paths[4]}
    assert newest.exists()
    assert foreign.exists()
    assert not part.exists()


def test_threads_compile_a_kernel_once(tmp_path: Path) -> None:
    together = threading.Barrier(2, timeout=30)

    def compiled(kernel: Kernel, architecture: int) -> Compiled:
        together.wait()  # two kernels at the same time, or nothing goes on
        return fake(kernel, architecture)

    cache = KernelCache(tmp_path, compile_with=compiled)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(cache.path, [KERNEL, OTHER] * 4, [90] * 8))
    assert len(set(paths)) == 2
    assert counted(cache) == (2, 6)


def test_a_kernel_that_does_not_compile_is_tried_again(tmp_path: Path) -> None:
    tries: list[Kernel] = []

    def compiled(kernel: Kernel, architecture: int) -> Compiled:
        tries.append(kernel)
        if len(tries) == 1:
            raise InternalError("it does not compile")
        return fake(kernel, architecture)

    cache = KernelCache(tmp_path, compile_with=compiled)
    with pytest.raises(InternalError):
        cache.path(KERNEL, 90)
    assert list(tmp_path.iterdir()) == []
    assert cache.path(KERNEL, 90).exists()


PROCESS = """
import sys
from pathlib import Path
from convservice_backends.cupy.cache import KernelCache
from tests.kernels.test_cache import KERNEL, fake
sys.stdin.readline()  # all begin together
for turn in range(50):
    cache = KernelCache(Path(sys.argv[1], str(turn)), compile_with=fake)
    assert cache.path(KERNEL, 90).read_bytes() == fake(KERNEL, 90).cubin
"""


def test_processes_share_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(tmp_path)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    ended = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ended
    assert [len(list(folder.iterdir())) for folder in tmp_path.iterdir()] == [1] * 50


def test_where_kernels_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVSERVICE_KERNEL_CACHE", "/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_folder() == Path("/somewhere")
    monkeypatch.delenv("CONVSERVICE_KERNEL_CACHE")
    assert default_folder() == Path("/caches/convservice/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == Path("/home/someone/.cache/convservice/kernels")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert default_folder() is None
