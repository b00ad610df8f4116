"""oneDNN's C API: primitives that are prepared once and then executed on plain tensors.

PyTorch's own `onednn::` operators build their primitive anew at every call, which costs more than a small convolution
itself. Here a primitive is built once for each shape; a call then only says where its input and its result lie.

The library comes with the package `onednn-cpu-gomp` (oneDNN 3, Apache-2.0), whose OpenMP is the one that PyTorch has
loaded, so that there is one pool of threads. `FXCOMPRESS_ONEDNN` names another libdnnl, or "off" to do without.
Reference: oneDNN developer guide, https://uxlfoundation.github.io/oneDNN/ .
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

VARIABLE = "FXCOMPRESS_ONEDNN"
PACKAGE = "onednn-cpu-gomp"

# Numbers of oneDNN's enumerations (dnnl_types.h, version 3).
SOURCE, RESULT, WEIGHTS, BIAS, SCRATCHPAD = 1, 17, 33, 41, 80
SCALES, ZERO_POINTS = 0x1000, 0x2000
_CPU, _IN_ORDER, _INFERENCE, _DIRECT, _ANY_LAYOUT = 1, 1, 96, 1, 1
_DTYPES = {torch.float32: 3, torch.int32: 4, torch.int8: 5, torch.uint8: 6}
_MAX_POOLING = 0x1FF
_WEIGHTS_DESCRIPTION, _SCRATCHPAD_DESCRIPTION = 131, 136  # dnnl_query_weights_md, dnnl_query_scratchpad_md
_OWN_SCRATCHPAD = 1

Run = Callable[..., torch.Tensor]

#: Activations by the word that `onednn::` operators have for them: algorithm, and its two parameters from the
#: operator's arguments.
_ACTIVATIONS: dict[str, Callable[[list[Any], str], tuple[int, float, float]]] = {
    "relu": lambda arguments, algorithm: (0x20, 0.0, 0.0),
    "leaky_relu": lambda arguments, algorithm: (0x20, arguments[0], 0.0),
    "tanh": lambda arguments, algorithm: (0x21, 0.0, 0.0),
    "swish": lambda arguments, algorithm: (0x2C, 1.0, 0.0),
    "hardtanh": lambda arguments, algorithm: (0x2F, arguments[0], arguments[1]),
    "gelu": lambda arguments, algorithm: (0x2B if algorithm == "tanh" else 0x31, 0.0, 0.0),
    "hardswish": lambda arguments, algorithm: (0x34, 1 / 6, 0.5),
}


class KernelUnavailable(Exception):
    """oneDNN has no implementation for what was asked; the caller takes another path."""


class _Argument(ctypes.Structure):
    _fields_ = (("argument", ctypes.c_int), ("memory", ctypes.c_void_p))


class _Library:
    """The loaded library, its CPU engine and a stream in which primitives run one after the other."""

    def __init__(self, path: str) -> None:
        self.functions = ctypes.CDLL(path)
        # Calls so short that giving the interpreter lock away and taking it back would double their time.
        self.short = ctypes.PyDLL(path)
        self.functions.dnnl_primitive_desc_query_md.restype = ctypes.c_void_p
        self.functions.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
        self.functions.dnnl_post_ops_append_sum.argtypes = (
            ctypes.c_void_p, ctypes.c_float, ctypes.c_int32, ctypes.c_int,
        )  # fmt: skip
        self.functions.dnnl_post_ops_append_eltwise.argtypes = (
            ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_float,
        )  # fmt: skip
        self.execute = self.functions.dnnl_primitive_execute
        self.execute.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        self.set_address = self.short.dnnl_memory_set_data_handle
        self.set_address.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self.engine = self.make("engine_create", _CPU, ctypes.c_size_t(0))
        self.stream = self.make("stream_create", self.engine, _IN_ORDER)

    def make(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """Call a function that writes a handle to its first argument, and return the handle.

        Raises:
            KernelUnavailable: the function says that it cannot.
        """
        handle = ctypes.c_void_p()
        self.call(name, ctypes.byref(handle), *arguments)
        return handle

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.functions, f"dnnl_{name}")(*arguments)
        if status:
            raise KernelUnavailable(f"oneDNN: dnnl_{name} returned status {status}")

    def description(self, primitive: ctypes.c_void_p, what: int) -> ctypes.c_void_p:
        """Return the description of one of a primitive's arguments; it lives as long as the primitive's own."""
        return ctypes.c_void_p(self.functions.dnnl_primitive_desc_query_md(primitive, what, 0))

    def size(self, memory: ctypes.c_void_p) -> int:
        """Return the bytes that a described memory takes."""
        return int(self.functions.dnnl_memory_desc_get_size(memory))

    def keep(self, owner: object, kind: str, handle: ctypes.c_void_p) -> ctypes.c_void_p:
        """Destroy a handle when its owner goes."""
        weakref.finalize(owner, getattr(self.functions, f"dnnl_{kind}_destroy"), handle).atexit = False
        return handle


def library() -> _Library | None:
    """Return the loaded library, or None where there is none."""
    wanted = os.environ.get(VARIABLE, "")
    path = wanted or _installed()
    return _open(path) if path and path != "off" else None


@functools.cache
def _open(path: str) -> _Library | None:
    try:
        return _Library(path)
    except (OSError, AttributeError, KernelUnavailable):  # not a library, another version, or another machine's
        return None


@functools.cache
def _installed() -> str | None:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(Path(str(file.locate())).resolve()) for file in files if file.name == "libdnnl.so.3"), None)


class Memory:
    """The description of a tensor's memory: sizes, dtype and strides; without strides, a layout of oneDNN's choice."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None) -> None:
        self.library = _loaded()
        count, number = len(sizes), _DTYPES[dtype]
        if strides is None:
            made = self.library.make("memory_desc_create_with_tag", count, _dims(sizes), number, _ANY_LAYOUT)
        else:
            made = self.library.make("memory_desc_create_with_strides", count, _dims(sizes), number, _dims(strides))
        self.handle = self.library.keep(self, "memory_desc", made)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Memory:
        """Describe a tensor as it lies in memory."""
        return cls(tensor.shape, tensor.dtype, tensor.stride())


class Attributes:
    """What a primitive does besides its own arithmetic: scales, zero points, and operations behind it, in order."""

    def __init__(self) -> None:
        self.library = _loaded()
        self.handle = self.library.keep(self, "primitive_attr", self.library.make("primitive_attr_create"))
        self.operations = self.library.keep(self, "post_ops", self.library.make("post_ops_create"))
        # The library's own scratchpad belongs to the thread that made a primitive, and another may execute it.
        self.library.call("primitive_attr_set_scratchpad_mode", self.handle, _OWN_SCRATCHPAD)
        self.tensors: dict[int, torch.Tensor] = {}

    def scale(self, argument: int, values: torch.Tensor, mask: int = 0) -> None:
        """Give an argument its scales, one for each index of the dimensions whose bits are set in `mask`."""
        self.library.call("primitive_attr_set_scales_mask", self.handle, argument, mask)
        self.tensors[SCALES | argument] = values.detach().to(torch.float32).reshape(-1).contiguous()

    def zero_point(self, argument: int, value: int) -> None:
        """Give an argument its zero point."""
        if value:
            self.library.call("primitive_attr_set_zero_points_mask", self.handle, argument, 0)
            self.tensors[ZERO_POINTS | argument] = torch.tensor([value], dtype=torch.int32)

    def add_to_result(self, scale: float, zero_point: int, dtype: torch.dtype) -> None:
        """Add what the memory of the result held before."""
        self.library.call("post_ops_append_sum", self.operations, scale, zero_point, _DTYPES[dtype])

    def activation(self, word: str, arguments: list[Any], algorithm: str) -> None:
        """Apply an activation.

        Raises:
            KernelUnavailable: there is none of that name.
        """
        if word == "none":
            return
        if word not in _ACTIVATIONS:
            raise KernelUnavailable(f"oneDNN has no activation {word!r}")
        number, alpha, beta = _ACTIVATIONS[word](arguments, algorithm)
        self.library.call("post_ops_append_eltwise", self.operations, number, alpha, beta)

    def settled(self) -> ctypes.c_void_p:
        """Return the handle, with the operations in it."""
        self.library.call("primitive_attr_set_post_ops", self.handle, self.operations)
        return self.handle


class Primitive:
    """An operation prepared for one shape.

    It may be called from several threads at once: each call takes a set of arguments of its own.
    """

    def __init__(
        self,
        description: ctypes.c_void_p,
        variable: dict[int, Memory],
        fixed: dict[int, tuple[Memory | ctypes.c_void_p, torch.Tensor]],
    ) -> None:
        self.library = _loaded()
        self.handle = self.library.keep(self, "primitive", self.library.make("primitive_create", description))
        self.variable, self.fixed = variable, fixed
        self.scratchpad = self.library.description(description, _SCRATCHPAD_DESCRIPTION)
        self.calls: list[_Call] = []  # arguments that no call is using

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Execute on tensors for the variable arguments, in their order."""
        try:
            call = self.calls.pop()
        except IndexError:
            call = _Call(self)
        for set_address, memory, tensor in zip(call.setters, call.memories, tensors, strict=True):
            set_address(memory, tensor.data_ptr())
        status = call.execute(call.primitive, call.stream, call.count, call.arguments)
        self.calls.append(call)
        if status:
            raise KernelUnavailable(f"oneDNN: execution returned status {status}")


class _Call:
    """One set of arguments of a primitive: the array that is handed over, and the memories whose address changes."""

    def __init__(self, primitive: Primitive) -> None:
        library = primitive.library
        self.memories = [self._memory(library, memory.handle, None) for memory in primitive.variable.values()]
        self.setters = [library.set_address] * len(self.memories)
        entries = list(zip(primitive.variable, self.memories, strict=True))
        for argument, (memory, tensor) in primitive.fixed.items():
            handle = memory.handle if isinstance(memory, Memory) else memory
            entries.append((argument, self._memory(library, handle, tensor)))
        self.scratch = torch.empty(library.size(primitive.scratchpad), dtype=torch.uint8)
        if len(self.scratch):
            entries.append((SCRATCHPAD, self._memory(library, primitive.scratchpad, self.scratch)))
        self.array = (_Argument * len(entries))(*(_Argument(argument, memory) for argument, memory in entries))
        self.execute, self.primitive, self.stream = library.execute, primitive.handle, library.stream
        self.count, self.arguments = len(entries), ctypes.cast(self.array, ctypes.c_void_p)

    def _memory(self, library: _Library, handle: ctypes.c_void_p, tensor: torch.Tensor | None) -> ctypes.c_void_p:
        address = ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)
        return library.keep(self, "memory", library.make("memory_create", handle, library.engine, address))


def convolution(
    source: Memory,
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    result: Memory,
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
    attributes: Attributes,
) -> Primitive:
    """Prepare a convolution.

    Args:
        source, result: (batch, channels, *spatial).
        weights: int8, (out channels, in channels / groups, *spatial).
        bias: float32, (out channels,), or None.
        geometry: stride, padding, dilation (as in `torch.nn.Conv2d`) and number of groups.
        attributes: scales of source, weights and result; operations behind the convolution.

    Raises:
        KernelUnavailable: oneDNN has no such convolution.
    """
    lib = _loaded()
    stride, padding, dilation, groups = geometry
    if groups > 1:
        weights = weights.unflatten(0, (groups, -1))
    bias_memory = None if bias is None else Memory.of(bias)
    wanted = Memory(weights.shape, weights.dtype)
    pads = _dims(padding)
    description = lib.make(
        "convolution_forward_primitive_desc_create", lib.engine, _INFERENCE, _DIRECT, source.handle, wanted.handle,
        None if bias_memory is None else bias_memory.handle, result.handle, _dims(stride),
        _dims([one - 1 for one in dilation]), pads, pads, attributes.settled(),
    )  # fmt: skip
    return _with_weights(description, source, weights, bias_memory, bias, result, attributes)


def linear(
    source: Memory, weights: torch.Tensor, bias: torch.Tensor | None, result: Memory, attributes: Attributes
) -> Primitive:
    """Prepare a linear layer: source (rows, in features), int8 weights (out features, in features).

    Raises:
        KernelUnavailable: oneDNN has no such layer.
    """
    lib = _loaded()
    bias_memory = None if bias is None else Memory.of(bias)
    wanted = Memory(weights.shape, weights.dtype)
    description = lib.make(
        "inner_product_forward_primitive_desc_create", lib.engine, _INFERENCE, source.handle, wanted.handle,
        None if bias_memory is None else bias_memory.handle, result.handle, attributes.settled(),
    )  # fmt: skip
    return _with_weights(description, source, weights, bias_memory, bias, result, attributes)


def max_pooling(
    source: Memory, result: Memory, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
    before: Sequence[int], behind: Sequence[int],
) -> Primitive:  # fmt: skip
    """Prepare a maximum over windows; `before` and `behind` are the paddings on either side of each dimension.

    Raises:
        KernelUnavailable: oneDNN has no such pooling.
    """
    lib, nothing = _loaded(), Attributes()
    description = lib.make(
        "pooling_forward_primitive_desc_create", lib.engine, _INFERENCE, _MAX_POOLING, source.handle, result.handle,
        _dims(stride), _dims(kernel), _dims([one - 1 for one in dilation]), _dims(before), _dims(behind),
        nothing.settled(),
    )  # fmt: skip
    return _finished(description, {SOURCE: source, RESULT: result}, {})


def reorder(source: Memory, result: Memory, attributes: Attributes) -> Primitive:
    """Prepare a copy into another layout or dtype.

    Raises:
        KernelUnavailable: oneDNN has no such copy.
    """
    lib = _loaded()
    description = lib.make(
        "reorder_primitive_desc_create", source.handle, lib.engine, result.handle, lib.engine, attributes.settled()
    )
    return _finished(description, {SOURCE: source, RESULT: result}, _attribute_tensors(attributes))


class ByShape:
    """A function that has a primitive of its own for each shape of its first input, the latest few.

    Args:
        prepare: returns what runs a primitive for inputs like the given one; may raise `KernelUnavailable`.
        otherwise: returns what takes inputs of all shapes, where there is no primitive.
    """

    limit = 8

    def __init__(self, prepare: Callable[[torch.Tensor], Run], otherwise: Callable[[torch.Tensor], Run]) -> None:
        self.prepare, self.otherwise = prepare, otherwise
        self.general: Run | None = None
        self.runs: dict[tuple[torch.Size, int], Run] = {}

    def __call__(self, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        """Run on inputs of any shape."""
        run = self.runs.get((x.shape, torch.get_num_threads()))
        return run(x, *more) if run is not None else self._add(x)(x, *more)

    def _add(self, x: torch.Tensor) -> Run:
        try:
            run = self.prepare(x)
        except KernelUnavailable:
            run = self.general = self.general or self.otherwise(x)
        if len(self.runs) >= self.limit:
            self.runs.pop(next(iter(self.runs)), None)
        self.runs[x.shape, torch.get_num_threads()] = run
        return run


def _with_weights(
    description: ctypes.c_void_p,
    source: Memory,
    weights: torch.Tensor,
    bias_memory: Memory | None,
    bias: torch.Tensor | None,
    result: Memory,
    attributes: Attributes,
) -> Primitive:
    """Bring weights into the layout that a primitive wants, and finish the primitive."""
    lib = _loaded()
    chosen = lib.description(description, _WEIGHTS_DESCRIPTION)
    packed = torch.empty(lib.size(chosen), dtype=torch.uint8)
    plain = weights.contiguous()
    given = Memory.of(plain)
    nothing = Attributes()
    pack = lib.make("reorder_primitive_desc_create", given.handle, lib.engine, chosen, lib.engine, nothing.settled())
    copy = _finished(pack, {}, {SOURCE: (given, plain), RESULT: (chosen, packed)})
    fixed: dict[int, tuple[Any, torch.Tensor]] = {WEIGHTS: (chosen, packed), **_attribute_tensors(attributes)}
    if bias is not None:
        fixed[BIAS] = (bias_memory, bias)
    copy()
    return _finished(description, {SOURCE: source, RESULT: result}, fixed)


def _attribute_tensors(attributes: Attributes) -> dict[int, tuple[Memory, torch.Tensor]]:
    return {argument: (Memory.of(tensor), tensor) for argument, tensor in attributes.tensors.items()}


def _finished(
    description: ctypes.c_void_p,
    variable: dict[int, Memory],
    fixed: dict[int, tuple[Any, torch.Tensor]],
) -> Primitive:
    primitive = Primitive(description, variable, fixed)
    # The description of packed weights belongs to that of the primitive, which has to live as long.
    primitive.library.keep(primitive, "primitive_desc", description)
    return primitive


def _dims(numbers: Sequence[int]) -> Any:
    return (ctypes.c_int64 * 12)(*(int(number) for number in numbers))


def _loaded() -> _Library:
    found = library()
    if found is None:
        raise KernelUnavailable(f"oneDNN's library could not be loaded; it comes with the package {PACKAGE}")
    return found
