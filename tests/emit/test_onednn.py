"""Prepared primitives: shapes, threads, lifetimes, and what happens where the library is missing."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fxcompress.emit import onednn
from fxcompress.emit.cpu_int8 import Int8Conv, Int8MaxPool
from fxcompress.quant.spec import Grid

IN, OUT = Grid(0.03125, 0), Grid(0.0625, 0)

needs_library = pytest.mark.skipif(onednn.library() is None, reason="no oneDNN library on this machine")


def layer(residual: bool = False) -> Int8Conv:
    torch.manual_seed(0)
    made = Int8Conv(
        8, 16, [3, 3], [1, 1], [1, 1], [1, 1], 1, True, IN.config(), OUT.config(),
        residual=OUT.config() if residual else None,
    )  # fmt: skip
    made.weight.copy_(torch.randint(-127, 128, made.weight.shape))
    made.weight_scale.fill_(2**-8)
    return made


def image(batch: int = 1, size: int = 9) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 8, size, size), dtype=torch.uint8)


@needs_library
def test_every_shape_has_a_primitive_of_its_own_and_their_number_is_bounded() -> None:
    made = layer()
    for batch in (1, 2, 17):
        for size in range(1, 12):
            x = image(batch, size)
            assert torch.equal(made(x), made._in_floats(x))
    assert isinstance(made._run, onednn.ByShape)
    assert len(made._run.runs) == onednn.ByShape.limit


@needs_library
def test_one_module_called_from_many_threads_gives_right_answers() -> None:
    made = layer(residual=True)
    inputs = [(image(), torch.randint(0, 256, (1, 16, 9, 9), dtype=torch.uint8)) for _ in range(64)]
    expected = [made._in_floats(x, residual.clone()) for x, residual in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = list(pool.map(lambda pair: made(*pair), inputs))
            assert all(map(torch.equal, found, expected))


@needs_library
def test_thousands_of_calls_and_modules_leave_no_memory_behind() -> None:
    def resident() -> int:
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    made, x = layer(), image()
    first = made(x)
    for _ in range(200):
        copy.deepcopy(made)(x)
    gc.collect()
    before = resident()
    for _ in range(2000):
        result = made(x)
    for _ in range(400):
        copy.deepcopy(made)(x)
    gc.collect()
    assert torch.equal(result, first)
    assert resident() - before < 8 << 20  # 400 leaked layers would hold more: each packs its weights and its code


@needs_library
def test_the_number_of_threads_may_change_between_calls() -> None:
    made, x = layer(), image(4)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            results.append(made(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, made._in_floats(x)) for result in results)


@needs_library
def test_what_is_prepared_is_not_copied_or_pickled() -> None:
    made, pool, x = layer(), Int8MaxPool([3, 3], [2, 2], [1, 1], [1, 1], False), image()
    for module in (made, pool):
        expected = module(x)
        assert torch.equal(copy.deepcopy(module)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), expected)


@needs_library
def test_what_onednn_cannot_do_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise onednn.KernelUnavailable("no")

    monkeypatch.setattr(onednn, "convolution", refuse)
    made, x = layer(), image()
    assert torch.equal(made(x), made._in_floats(x))


@needs_library
def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(onednn.KernelUnavailable, match="no activation 'maxout'"):
        onednn.Attributes().activation("maxout", [], "")


@pytest.mark.parametrize("path", ["off", "/nowhere/libdnnl.so.3", "not-a-library"])
def test_without_a_library_pytorchs_operators_do_the_work(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(onednn.VARIABLE, path)
    assert onednn.library() is None
    with pytest.raises(onednn.KernelUnavailable, match=onednn.PACKAGE):
        onednn.Memory((1, 2), torch.uint8, (2, 1))
    made, x = layer(), image()
    assert torch.equal(made(x), made._in_floats(x))


def test_a_library_that_is_something_else_is_not_used(tmp_path: Path) -> None:
    code = "from fxcompress.emit import onednn; assert onednn.library() is None; print('none')"
    file = tmp_path / "libdnnl.so.3"
    file.write_bytes(b"not a library")
    environment = {**os.environ, onednn.VARIABLE: str(file)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"
