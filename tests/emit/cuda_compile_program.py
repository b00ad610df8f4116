"""Compiles kernels for GPUs that are not there, and prints one line of JSON for each: registers, stack, shared memory.

    python tests/emit/cuda_compile_program.py 90          # the first choice of every kind of layer
    python tests/emit/cuda_compile_program.py 90 all      # every choice
    python tests/emit/cuda_compile_program.py 80 3x3 norm # some of them

It runs in a process of its own, because Triton either compiles or interprets, from its import on.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fxcompress.emit.cuda import launch, pointwise_launch
from fxcompress.emit.cuda.launch import Call, Ending, Packed, Window, candidates, convolve
from fxcompress.quant.spec import Grid

TYPES = {
    torch.int8: "*i8", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip
RELU, GRID = ("clamp", 0.0, None), Grid(0.1, 0)
THREE = ((3, 3), (1, 1), (1, 1))

#: What the networks of the benchmark are made of: geometry, images, size, numbers, zero point, ending.
LAYERS: list[tuple[str, Window, int, int, torch.dtype, int, Ending]] = [
    ("first", Window(4, 64, 1, (7, 7), (2, 2), (3, 3)), 32, 224, torch.int8, -10, Ending(RELU, None, GRID)),
    ("3x3", Window(256, 256, 1, *THREE), 256, 14, torch.int8, -128, Ending(RELU, None, GRID)),
    ("3x3 of one image", Window(512, 512, 1, *THREE), 1, 7, torch.int8, -128, Ending(RELU, None, GRID)),
    ("1x1 with a sum", Window(64, 256), 256, 56, torch.int8, -128, Ending(RELU, GRID, GRID)),
    ("1x1 with stride", Window(256, 512, 1, (1, 1), (2, 2)), 32, 56, torch.int8, -128, Ending(None, None, GRID)),
    ("1x1 with few channels", Window(24, 144), 32, 56, torch.int8, 5, Ending(("silu",), None, GRID)),
    ("1x1 of one pixel", Window(8, 1), 1, 1, torch.int8, 5, Ending(("sigmoid",), None, None)),
    ("linear", Window(768, 3072), 197, 1, torch.int8, 3, Ending(("gelu", "none"), None, GRID)),
    ("linear with a real sum", Window(3072, 768), 50_432, 1, torch.int8, 3, Ending(None, "real", None)),
    ("grouped", Window(4, 4, 32, *THREE), 32, 56, torch.int8, -128, Ending(RELU, None, GRID)),
    ("depthwise", Window(1, 1, 144, *THREE), 32, 56, torch.int8, -128, Ending(("clamp", 0.0, 6.0), None, GRID)),
    ("depthwise in fp16", Window(1, 1, 32, (5, 5), (2, 2), (2, 2)), 1, 112, torch.float16, 0, Ending(("silu",))),
    ("3x3 in fp16", Window(128, 128, 1, *THREE), 32, 28, torch.float16, 0, Ending(RELU, "real", None)),
    ("1x1 in bf16", Window(320, 1280), 1, 7, torch.bfloat16, 0, Ending(("hardswish",))),
    ("first in fp16", Window(4, 32, 1, (3, 3), (2, 2), (1, 1)), 256, 224, torch.float16, 0, Ending(RELU, None, GRID)),
    ("linear in fp8", Window(768, 3072), 50_432, 1, torch.float8_e4m3fn, 0, Ending(("gelu", "tanh"), "real", None)),
]


def layer_calls(every: bool) -> Iterator[tuple[str, Call]]:
    for name, window, images, size, dtype, zero, ending in LAYERS:
        count = window.outputs * window.groups
        weight = torch.empty(count, window.channels, *window.kernel, dtype=dtype, device="meta")
        scaled = dtype in (torch.int8, torch.float8_e4m3fn)
        factor = torch.empty(count, device="meta") if scaled else None
        packed = Packed(window, weight, factor, torch.empty(count, device="meta"), zero)
        x = torch.empty(images, window.channels * window.groups, size, size, dtype=dtype, device="meta")
        x = x.contiguous(memory_format=torch.channels_last)
        height, width = window.out_size(size, size)
        addend = None
        if ending.addend is not None:
            kind = torch.int8 if isinstance(ending.addend, Grid) else torch.float16
            addend = torch.empty(images, count, height, width, dtype=kind, device="meta")
            addend = addend.contiguous(memory_format=torch.channels_last)
        rows = torch.empty(images * size * size, device="meta") if dtype == torch.float8_e4m3fn else None
        real = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16
        for blocks in candidates(window, images * height * width, weight.element_size() == 1, zero)[
            : None if every else 1
        ]:
            yield f"{name}: {blocks}", convolve(packed, ending, blocks, x, addend, real, rows)


def pointwise_calls() -> Iterator[tuple[str, Call]]:
    bytes_, image = (
        torch.empty(32, 64, 56, 56, dtype=torch.int8, device="meta"),
        torch.empty(8, 3, 64, 64, device="meta"),
    )
    bytes_ = bytes_.contiguous(memory_format=torch.channels_last)
    gate = torch.empty(32, 64, 1, 1, dtype=torch.float16, device="meta")
    half = torch.empty(197, 768, dtype=torch.float16, device="meta")
    plain = Ending(None, None, GRID)
    yield "images come in", pointwise_launch.combine(image, ending=plain, channels=4)
    yield "numbers go out", pointwise_launch.combine(bytes_, grids=(GRID, None))
    yield "gate", pointwise_launch.combine(bytes_, gate, pointwise_launch.MULTIPLY, (GRID, None), plain)
    yield "real sum", pointwise_launch.combine(half, half, ending=Ending(("gelu", "none")))
    yield "max pool", pointwise_launch.max_pool(bytes_, Window(1, 1, 1, (3, 3), (2, 2), (1, 1)), (28, 28))
    yield "mean", pointwise_launch.mean(bytes_[:1], GRID, GRID, {})
    yield "real mean", pointwise_launch.mean(gate, None, None, {})
    weight = torch.empty(768, device="meta")
    yield "norm", pointwise_launch.normalize(half, weight, weight, 1e-6, GRID, 768)


def source_of(call: Call) -> ASTSource:
    """The kernel with its arguments, as a launch would specialise it."""
    kernel = launch.kernel(call.kernel)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(kernel.params):
        value = call.arguments[parameter.name]
        signature[parameter.name] = "fp32"
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and free):
            signature[parameter.name] = "constexpr"
            constants[index,] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            hints[index,] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0 and free:
                hints[index,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, hints)


def resources(binary: bytes) -> dict[str, int]:
    """What a compiled kernel takes of a GPU."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}


def main() -> None:
    capability, every = int(sys.argv[1]), "all" in sys.argv
    wanted = set(sys.argv[2:]) - {"all"}
    for name, call in (*layer_calls(every), *pointwise_calls()):
        if ("fp8" in name and capability < 89) or (wanted and name.split(":")[0] not in wanted):
            continue
        line: dict[str, Any] = {"name": name}
        try:
            compiled = triton.compile(source_of(call), GPUTarget("cuda", capability, 32), options=call.options)
            line.update(resources(compiled.asm["cubin"]), shared=compiled.metadata.shared)
            line["matrix"] = bool(re.search(r"wgmma|mma\.sync", compiled.asm["ptx"]))
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
