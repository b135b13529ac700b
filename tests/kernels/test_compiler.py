"""NVRTC on kernels of the tree and on broken ones; no device is needed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from convservice.dtypes import FLOAT32
from convservice.errors import BackendUnavailable, InternalError
from convservice_backends.cuda.source import Kernel, type_constants
from convservice_backends.cupy import compiler
from convservice_backends.cupy.compiler import Compiled, Resources, compile_kernel, resources_in, target_of

KERNEL = Kernel("direct", "float32", 128, type_constants(FLOAT32, FLOAT32))


def test_a_kernel_is_compiled() -> None:
    compiled = compile_kernel(KERNEL, 90)
    assert compiled.cubin.startswith(b"\x7fELF")
    assert KERNEL.name.encode() in compiled.cubin
    assert compiled.resources.registers > 0
    assert compiled.resources.spill_bytes == compiled.resources.static_shared_bytes == 0
    assert compiled.warnings == ()


def test_threads_compile_at_the_same_time() -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(compile_kernel, [KERNEL] * 4, [75, 75, 90, 90]))
    assert found[0].cubin == found[1].cubin != found[2].cubin == found[3].cubin


def test_an_error_of_the_source_names_kernel_file_and_line() -> None:
    with pytest.raises(
        InternalError, match=r"direct_broken does not compile for sm_90: types\.cuh\(\d+\): error"
    ):
        compile_kernel(Kernel("direct", "broken", 128), 90)


def test_the_size_of_the_arguments_is_checked() -> None:
    kernel = Kernel("elementwise", "other", 128, (*KERNEL.constants, ("COPY", 0), ("MAP_ARGUMENTS_BYTES", 8)))
    with pytest.raises(InternalError, match=r"elementwise\.cu differ"):
        compile_kernel(kernel, 90)


def test_a_device_that_lacks_the_instructions() -> None:
    kernel = Kernel("direct", "float32", 128, KERNEL.constants, minimum=80)
    with pytest.raises(InternalError, match="needs instructions of sm_80, the device is sm_75"):
        compile_kernel(kernel, 75)


def test_the_architecture_compiled_for() -> None:
    assert target_of(90) == 90
    assert target_of(129) == 121
    for unknown in (70, 999):
        with pytest.raises(BackendUnavailable, match=rf"compiles for sm_75, .*the device is sm_{unknown}"):
            target_of(unknown)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """NVRTC is looked for anew, during the test and after it."""
    compiler.nvrtc_module.cache_clear()
    yield
    compiler.nvrtc_module.cache_clear()


class _NoLibrary:
    """The bindings, where the library itself is not there."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("Failure finding libnvrtc.so")


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("lacks", ["the bindings", "the library"])
def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    def imported(name: str) -> Any:
        if lacks == "the bindings":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return _NoLibrary()

    monkeypatch.setattr(compiler, "import_module", imported)
    with pytest.raises(BackendUnavailable, match=r"pip install 'convservice\[cuda13\]'"):
        compile_kernel(KERNEL, 90)
    monkeypatch.setattr(compiler, "import_module", importlib.import_module)
    assert compile_kernel(KERNEL, 90).cubin  # found as soon as it is there


def test_what_the_log_says() -> None:
    log = (
        "ptxas info    : 0 bytes gmem\n"
        "ptxas info    : Compiling entry function 'k' for 'sm_90'\n"
        "    48 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads\n"
        "ptxas info    : Function properties for called_by_k\n"
        "    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers, 8192 bytes smem, 368 bytes cmem[0]\n"
        'kernel.cu(7): warning #177-D: variable "unused" was declared but never referenced\n'
        'Remark: The warnings can be suppressed with "-diag-suppress <warning-number>"\n'
    )
    compiled = Compiled(b"", log)
    assert compiled.resources == Resources(168, 64, 64, 8192)
    assert [line.split(":")[0] for line in compiled.warnings] == ["kernel.cu(7)"]
    for strange in ("", log + log):
        with pytest.raises(InternalError, match="must speak of one kernel"):
            resources_in(strange)
