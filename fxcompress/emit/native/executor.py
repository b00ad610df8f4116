"""Runs a lowered graph by plans: one for each combination of input shapes, made at the first call with it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_structure, tree_unflatten

from fxcompress.emit.cpu_numbers import Kernel, broadcast, channels_last_strides
from fxcompress.emit.native import memory, steps
from fxcompress.emit.native.batches import keeps_apart
from fxcompress.emit.native.handlers.pointwise import ELEMENTWISE
from fxcompress.emit.native.library import Library, library
from fxcompress.emit.native.memory import SLACK, View
from fxcompress.emit.native.paging import give_back, page_out
from fxcompress.emit.native.plan import Plan, PythonCall
from fxcompress.emit.native.planner import make_plan
from fxcompress.graph import ops
from fxcompress.graph.metadata import KernelChoices, graph_info
from fxcompress.quant.cpu import processor


class Unplannable(Exception):
    """The graph itself has to run: what it does depends on more than the shapes of its inputs."""


class Cache:
    """The executor of one graph, made when it is first needed; never copied and never pickled."""

    def __init__(self) -> None:
        self.made: Executor | None = None
        self.useless = False
        self.layers: list[nn.Module] = []
        self.parameters: list[nn.Parameter] = []

    def executor(self, graph_module: Any, arguments: tuple[Any, ...]) -> Executor | None:
        """Return what runs a graph on these arguments, or None if the graph itself shall.

        That is so where there are no kernels, nothing to run on them, or somebody looks on: a tracer, a hook, or
        autograd.
        """
        if self.useless or graph_module.executor != "auto" or torch.compiler.is_compiling():
            return None
        for leaf in tree_leaves(arguments):
            if isinstance(leaf, torch.Tensor):
                if type(leaf) is not torch.Tensor or leaf.device.type != "cpu" or leaf.requires_grad:
                    return None
                if leaf.is_neg() or leaf.is_conj():  # numbers that are not in memory as they are read
                    return None
            elif isinstance(leaf, fx.Proxy):
                return None
        if self.made is None:
            self._make(graph_module)
        if torch._C._get_tracing_state() is not None:
            return None
        if any(layer._forward_hooks or layer._forward_pre_hooks for layer in self.layers):
            return None
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters):
            return None
        return self.made

    def _make(self, graph_module: fx.GraphModule) -> None:
        kernels = library() if any(isinstance(module, Kernel) for module in graph_module.modules()) else None
        self.useless = kernels is None
        if kernels is not None:
            self.layers = [module for name, module in graph_module.named_modules() if name]
            self.parameters = list(graph_module.parameters())
            self.made = Executor(graph_module, kernels)

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return Cache()

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, ()


class Executor:
    """Calls a lowered graph's kernels without Python between them.

    It may be called from several threads at once; each call has memory of its own, which is kept for the next one.

    Args:
        graph_module: the lowered graph; its tensors must not change as long as the executor is used.
        library: the kernels.
        choices: what was measured to run fastest; None for what the graph knows, if it is of this machine.
    """

    #: Plans kept, for the latest combinations of shapes.
    limit = 64

    def __init__(self, graph_module: fx.GraphModule, library: Library, choices: KernelChoices | None = None) -> None:
        self.graph_module, self.library = graph_module, library
        self.choices = _choices_of(graph_module) if choices is None else choices
        self.packed = _Packed()
        self.plans: dict[Any, BoundPlan | None] = {}  # None: unplannable

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Run on inputs of any shape; the arguments are those of the graph's placeholders.

        Raises:
            Unplannable: the graph itself has to run.
        """
        inputs = positional(self.graph_module, arguments, keywords) if keywords else list(arguments)
        leaves, structure = tree_flatten(inputs)
        key = (structure, *(_signature(leaf) for leaf in leaves))
        try:
            known = key in self.plans
        except TypeError:  # an argument that has no hash
            raise Unplannable from None
        plan = self.plans.get(key) if known else self._add(key, inputs)
        if plan is None:
            raise Unplannable
        try:
            return plan([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
        except Unplannable:
            self.plans[key] = None
            raise

    def _add(self, key: Any, inputs: list[Any]) -> BoundPlan | None:
        """Plan for inputs of these shapes."""
        bound: BoundPlan | None = None
        with contextlib.suppress(Unplannable):
            inputs = positional(self.graph_module, tuple(inputs), {})
            recorded = record(self.graph_module, inputs)
            plan = make_plan(self.graph_module, recorded, self.packed, self.choices.calls)
            images = images_of(plan)
            cut = self.choices.cuts.get(shapes_of(inputs))
            single = self._plan_of_one(inputs, recorded, images) if images > 1 and cut != 0 else None
            bound = BoundPlan(plan, self.library, single, cut=cut)
            self.packed.settle()
        while len(self.plans) >= self.limit:
            self.plans.pop(next(iter(self.plans)), None)
        self.plans[key] = bound
        return bound

    def _plan_of_one(self, inputs: list[Any], recorded: dict[fx.Node, Any], images: int) -> Plan | None:
        """A plan for the first image of a batch, if it will do for each of them."""
        one = tree_map(lambda leaf: leaf[:1] if isinstance(leaf, torch.Tensor) else leaf, inputs)
        try:
            recorded_one = record(self.graph_module, one)
            if not keeps_apart(self.graph_module.graph, recorded, recorded_one, images):
                return None
            plan = make_plan(self.graph_module, recorded_one, self.packed, self.choices.calls)
        except Unplannable:  # sizes are written in the graph that fit no other batch
            return None
        return None if any(isinstance(item, PythonCall) for item in plan.items) else plan


def machine() -> str:
    """Return what choices of kernels are good for: this processor, with so many threads."""
    return f"{processor()}, {torch.get_num_threads()} threads"


def shapes_of(inputs: Sequence[Any]) -> str:
    """Return the shapes of the tensors among inputs in words, for example "16x3x224x224"."""
    return ", ".join("x".join(map(str, leaf.shape)) for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor))


def _choices_of(graph_module: fx.GraphModule) -> KernelChoices:
    known = graph_info(graph_module).kernels
    return known if known is not None and known.machine == machine() else KernelChoices("")


class _Packed(dict[Any, Any]):
    """What the kernels want of each layer: packed weights and the like, by layer, or by layer and way of packing.

    As soon as a layer has been packed, its own weights leave memory, so that no two layers are there twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paged: set[nn.Module] = set()
        self.freed = 0  #: bytes that the system has not been given back

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        layer = key[0] if isinstance(key, tuple) else key
        if layer in self.paged or not isinstance(layer, Kernel):
            return
        self.paged.add(layer)
        layer.repack()  # what the graph has prepared for itself
        self.freed += sum(page_out(buffer) for buffer in layer.buffers(recurse=False))
        if self.freed > _GIVEN_BACK_AT:
            self.settle()

    def settle(self) -> None:
        """Give the system what has become free."""
        if self.freed:
            give_back()
        self.freed = 0


#: Bytes that may be free before the system gets them back, which takes a while.
_GIVEN_BACK_AT = 1 << 20


def positional(graph_module: fx.GraphModule, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Any]:
    """Return the arguments in the order of the placeholders, with defaults where none are given.

    Raises:
        Unplannable: they are not the graph's arguments.
    """
    found = list(arguments)
    missing = list(graph_module.graph.find_nodes(op="placeholder"))[len(found) :]
    if keywords.keys() - {str(node.target) for node in missing}:
        raise Unplannable  # the graph says what is wrong
    for node in missing:
        if str(node.target) not in keywords and not node.args:
            raise Unplannable
        found.append(keywords.get(str(node.target), node.args[0] if node.args else None))
    return found


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return type(value), value


def record(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """Return what each node makes of these inputs, tensors without their memory.

    Nothing is computed. A graph that asks for numbers, or makes tensors whose shapes depend on them, is refused.

    Raises:
        Unplannable: it is such a graph, or these are not inputs of it.
    """
    for kind in (_MetaRecorder, _FakeRecorder):
        recorder = kind(graph_module)
        with torch.no_grad(), _silence(), contextlib.suppress(Exception):  # whatever users make of such tensors
            recorder.record(inputs)
            return recorder.values
    raise Unplannable


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep torch from logging errors that are expected."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what each node made, as tensors of the device "meta"."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.values: dict[fx.Node, Any] = {}

    def record(self, inputs: Sequence[Any]) -> None:
        """Run on tensors without numbers."""
        raise NotImplementedError

    def run_node(self, n: fx.Node) -> Any:
        output = super().run_node(n)
        self.values[n] = tree_map(_without_memory, output)
        return output


class _MetaRecorder(_Recorder):
    """On tensors of the device "meta" throughout: it is quick, and loads no further parts of PyTorch."""

    def record(self, inputs: Sequence[Any]) -> None:
        self.run(*tree_map(_without_memory, list(inputs)))

    def fetch_attr(self, target: str) -> Any:
        return _without_memory(super().fetch_attr(target))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.cat:
            return _joined(*args, **kwargs)
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        op = ops.BY_FUNCTION.get(target)
        if op is not None and op.kind in ELEMENTWISE and {one.dtype for one in tensors} == {torch.float32}:
            shape = broadcast(*(one.shape for one in tensors))
            return memory.meta_tensor(shape, torch.float32, channels_last_strides(shape) if len(shape) == 4 else None)
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: nn.Module = super().fetch_attr(target)
        if isinstance(module, Kernel):
            return module.outline(*args, **kwargs)
        state = {name: _without_memory(one) for name, one in (*module.named_parameters(), *module.named_buffers())}
        return functional_call(module, state, args, kwargs)


class _FakeRecorder(_Recorder):
    """On tensors that pretend to be on the CPU, for code that makes tensors there itself."""

    def record(self, inputs: Sequence[Any]) -> None:
        from torch._subclasses import fake_tensor  # loads much else

        self.unset = fake_tensor.unset_fake_temporarily
        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            faked = [mode.from_tensor(one) if isinstance(one, torch.Tensor) else one for one in tree_leaves(inputs)]
            self.run(*tree_unflatten(faked, tree_structure(list(inputs))))

    def run_node(self, n: fx.Node) -> Any:
        output = fx.Interpreter.run_node(self, n)
        with self.unset():
            self.values[n] = tree_map(_without_memory, output)
        return output


def _joined(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """As `torch.cat`, which loads PyTorch's compiler on the device "meta"."""
    pieces = [one for one in tensors if one.shape != (0,)] or list(tensors)
    shape = list(pieces[0].shape)
    others = [[size for i, size in enumerate(one.shape) if i != dim % len(shape)] for one in pieces]
    if any(other != others[0] for other in others):
        raise Unplannable
    shape[dim] = sum(one.shape[dim] for one in pieces)
    dtype = functools.reduce(torch.promote_types, (one.dtype for one in tensors))
    return memory.meta_tensor(shape, dtype, channels_last_strides(shape) if len(shape) == 4 else None)


def _without_memory(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return memory.meta_tensor(value.shape, value.dtype, value.stride())


class BoundPlan:
    """A plan with its memory laid out, or the part of it from item `start` on.

    Args:
        single: a plan for one image, if it will do for each of a batch.
        cut: how many of its items to run for each image; None: as `whole_from` says.
    """

    def __init__(
        self, plan: Plan, library: Library, single: Plan | None = None, start: int = 0, cut: int | None = None
    ) -> None:
        self.plan, self.library = plan, library
        self.single = None if single is None else _ImageByImage(self, BoundPlan(single, library), images_of(plan), cut)
        arena = [one for one in plan.buffers if one.place == "arena" and one.first >= 0 and one.last >= start]
        self.offsets, self.size = memory.arrange(arena)
        self.runs = _runs(plan.items[start:])
        self.outputs = [buffer for buffer in plan.buffers if buffer.place == "output"]
        self.inputs = [view.buffer.index for view in plan.inputs]
        self.free: list[_Memory] = []  # of calls that are over

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Run on the tensors among the arguments, in their order."""
        threads = torch.get_num_threads()
        if self.single is not None and self.single.pays(threads):
            return self.single(tensors, threads)
        room, held = self.place(tensors)
        for part in self.runs:
            if isinstance(part, PythonCall):
                self._call(part, room, held)
            else:
                self.library.run(part, len(part), room.pointers, threads)
        output = self.plan.output
        result = room.tensor(output, held) if isinstance(output, View) else tree_map(
            lambda leaf: room.tensor(leaf, held) if isinstance(leaf, View) else leaf, output
        )  # fmt: skip
        self.free.append(room)
        return result

    def place(self, tensors: Sequence[torch.Tensor]) -> tuple[_Memory, dict[int, torch.Tensor]]:
        """Return memory for one run on these tensors, and the tensors in it that are not of the arena."""
        room = _taken(self)
        held: dict[int, torch.Tensor] = dict(zip(self.inputs, tensors, strict=True))
        for buffer in self.outputs:
            held[buffer.index] = torch.empty(buffer.bytes + SLACK, dtype=torch.uint8)
        for index, tensor in held.items():
            room.pointers[index] = tensor.data_ptr()
        return room, held

    def _call(self, call: PythonCall, room: _Memory, held: dict[int, torch.Tensor]) -> None:
        pick: Callable[[Any], Any] = lambda leaf: room.tensor(leaf, held) if isinstance(leaf, View) else leaf  # noqa: E731
        arguments, keywords = tree_map(pick, (call.arguments, call.keywords))
        with torch.no_grad():
            result = call.function(*arguments, **keywords)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if [_kind_of(tensor) for tensor in made] != [_kind_of(view.meta) for view in call.results]:
            raise Unplannable  # a function whose results depend on more than shapes
        if any(tensor.device.type != "cpu" for tensor in made):
            raise Unplannable  # memory that no kernel reads
        for view, tensor in zip(call.results, made, strict=True):
            if tensor.stride() != view.meta.stride() or room.holds(tensor):
                tensor = torch.empty_strided(tensor.shape, view.meta.stride(), dtype=tensor.dtype).copy_(tensor)
            held[view.buffer.index] = tensor
            room.pointers[view.buffer.index] = tensor.data_ptr() - view.offset


def _kind_of(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def images_of(plan: Plan) -> int:
    """Return how many images (or other samples) a plan is for, if its steps can be run for each by itself; else 1.

    That is so if the first dimension of all inputs counts the images, every item is a step, and the images of a buffer
    lie one after the other. All kinds of steps keep images apart, but products of matrices that are not stacked.
    Whether the graph does is up to `keeps_apart`.
    """
    found = {view.meta.shape[0] if view.meta.ndim else 0 for view in plan.inputs}
    images = found.pop() if len(found) == 1 else 1
    if images < 2 or plan.mixes or any(isinstance(item, PythonCall) for item in plan.items):
        return 1
    if _reads_weights_for_few(plan, images):
        return 1
    for view in plan.views:
        if view.buffer.place != "constant" and (
            view.meta.ndim == 0
            or view.meta.shape[0] % images
            or view.buffer.bytes % images
            or view.strides()[0] * view.meta.shape[0] != view.buffer.bytes
            or view.offset >= view.strides()[0]
        ):
            return 1
    leaves = [leaf for leaf in tree_leaves(plan.output) if isinstance(leaf, View)]
    return images if all(leaf.buffer.place == "output" for leaf in leaves) else 1


def _reads_weights_for_few(plan: Plan, images: int) -> bool:
    """Whether most products are those of layers with a few rows in each image, and weights that are not near by.

    They would be read for each image anew: for all images together they need to be read once.
    """
    few = products = weights = 0
    for item in plan.items:
        if isinstance(item, steps.Convolution):
            rows = item.images * item.height * item.width
            size = item.channels * item.rows_of_window * item.columns_of_window * item.run
        elif isinstance(item, (steps.RowLinear, steps.WeightLinear)):
            rows, depth = item.rows, item.run if isinstance(item, steps.RowLinear) else item.depth
            size = item.channels * depth
        else:
            continue
        products += rows * size
        if rows < _FEW * images:
            few, weights = few + rows * size, weights + size
    return 2 * few > products and weights > _NEAR


#: Rows of one tile: with fewer, a kernel does not make the most of the weights that it reads.
_FEW = 6

#: Bytes of weights that a core has at hand all the time.
_NEAR = 64 << 10


class _ImageByImage:
    """Runs the plan for one image on each of a batch, every thread on images of its own; late items on all at once.

    What one image needs stays in a thread's cache, and threads do not wait for each other at every step. Where layers
    have more weights than images have numbers, these are read once for all images instead.
    """

    def __init__(self, whole: BoundPlan, single: BoundPlan, images: int, cut: int | None) -> None:
        self.whole, self.single, self.images = whole, single, images
        if cut is None or not (cut == len(whole.plan.items) or can_be_cut(whole.plan, single.plan, images)):
            cut = whole_from(whole.plan, single.plan, images)
        self.cut = cut = min(cut, len(whole.plan.items))
        (self.steps,) = _runs(single.plan.items[:cut]) or [(ctypes.c_void_p * 0)()]
        self.rest = BoundPlan(whole.plan, whole.library, start=cut) if cut < len(whole.plan.items) else None
        views = zip(single.plan.inputs, whole.plan.inputs, strict=True)
        self.moving = [(one.buffer.index, all_.buffer.index, all_.strides()[0]) for one, all_ in views]
        outputs = zip(tree_leaves(single.plan.output), tree_leaves(whole.plan.output), strict=True)
        for one, all_ in outputs:
            if isinstance(one, View):
                self.moving.append((one.buffer.index, all_.buffer.index, all_.buffer.bytes // images))
        for buffer in whole.plan.buffers:
            if buffer.place == "arena" and 0 <= buffer.first < cut <= buffer.last:
                self.moving.append((buffer.index, buffer.index, buffer.bytes // images))
        numbers = ctypes.c_int64 * len(self.moving)
        self.indices = numbers(*(one for one, _, _ in self.moving))
        self.strides = numbers(*(stride for _, _, stride in self.moving))

    def pays(self, threads: int) -> bool:
        """Whether no thread would stand idle for long."""
        return self.images % threads == 0 or self.images >= 4 * threads

    def __call__(self, tensors: Sequence[torch.Tensor], threads: int) -> Any:
        whole, single = self.whole, self.single
        rooms = [_taken(single) for _ in range(threads)]
        held = dict(zip(whole.inputs, tensors, strict=True))
        for buffer in whole.outputs:
            held[buffer.index] = torch.empty(buffer.bytes + SLACK, dtype=torch.uint8)
        tables = (ctypes.c_void_p * threads)(*(ctypes.addressof(room.pointers) for room in rooms))
        places = {index: tensor.data_ptr() for index, tensor in held.items()}
        shared = None if self.rest is None else _taken(self.rest)
        if shared is not None:
            for index, address in places.items():
                shared.pointers[index] = address
        bases = (ctypes.c_void_p * len(self.moving))(
            *(places[index] if shared is None else shared.pointers[index] for _, index, _ in self.moving)
        )
        whole.library.run_each(
            self.steps, len(self.steps), tables, self.images, len(self.moving), self.indices, bases, self.strides,
            threads,
        )  # fmt: skip
        single.free.extend(rooms)
        if self.rest is not None and shared is not None:
            for part in self.rest.runs:
                whole.library.run(part, len(part), shared.pointers, threads)
            self.rest.free.append(shared)
        pick = lambda leaf: _output(leaf, held) if isinstance(leaf, View) else leaf  # noqa: E731
        return tree_map(pick, whole.plan.output)


def whole_from(whole: Plan, single: Plan, images: int) -> int:
    """Return the first item that is better run on all images at once than on one after the other.

    Before it, the weights of a layer come from afar for every image; from it on, the values of all images do. The place
    is that where kernels wait for the fewest bytes.
    """
    everything = len(whole.items)
    if not can_be_cut(whole, single, images) or sum(map(_weights, whole.items)) < _AT_HAND:
        return everything
    weights = [_weights(item) * _waited_for(item) for item in single.items]
    values = [sum(whole.buffers[place.buffer].bytes for place in _places(item)) for item in whole.items]
    cost = sum(values)
    best, found = cost, 0
    for index in range(everything):
        cost += images * weights[index] - values[index]
        if cost <= best:
            best, found = cost, index + 1
    return found


def can_be_cut(whole: Plan, single: Plan, images: int) -> bool:
    """Whether the plans for a batch and for one image are alike, so that any item of one can follow on the other."""
    return (
        len(whole.buffers) == len(single.buffers)
        and [type(item) for item in whole.items] == [type(item) for item in single.items]
        and all(
            (one.place, images * one.bytes) == (all_.place, all_.bytes) or all_.place == "constant"
            for one, all_ in zip(single.buffers, whole.buffers, strict=True)
        )
    )


#: Bytes of weights that stay in a core's cache from one image to the next.
_AT_HAND = 512 << 10


#: Pixels of an image that keep a core busy for as long as the next weights take to come.
_BUSY = 64


def _waited_for(item: steps.Step | PythonCall) -> float:
    """The share of its weights that a layer waits for: kernels fetch the next ones while they multiply."""
    return min(1.0, _BUSY / (item.height * item.width)) if isinstance(item, steps.Convolution) else 1.0


def _weights(item: steps.Step | PythonCall) -> int:
    """Bytes of a layer's weights."""
    if isinstance(item, steps.Convolution):
        return int(item.channels * item.rows_of_window * item.columns_of_window * item.run)
    return 0


def _places(item: steps.Step | PythonCall) -> list[steps.Place]:
    """Where an item reads, and where it writes."""
    return [getattr(item, name) for name in ("source", "result") if hasattr(item, name)]


def _taken(bound: BoundPlan) -> _Memory:
    """Memory for one run of a plan."""
    try:
        return bound.free.pop()
    except IndexError:
        return _Memory(bound)


def _output(view: View, held: dict[int, torch.Tensor]) -> torch.Tensor:
    flat = held[view.buffer.index][: view.buffer.bytes].view(view.meta.dtype)
    return flat.as_strided(view.meta.shape, view.meta.stride(), view.meta.storage_offset())


class _Memory:
    """What one call works in: the arena, and where each buffer lies."""

    def __init__(self, bound: BoundPlan) -> None:
        self.arena = torch.empty(bound.size + memory.ALIGNMENT, dtype=torch.uint8)
        self.start = self.arena.data_ptr() + (-self.arena.data_ptr() % memory.ALIGNMENT)
        self.shift = self.start - self.arena.data_ptr()
        self.offsets = bound.offsets
        self.pointers = (ctypes.c_void_p * max(1, len(bound.plan.buffers)))()
        for index, offset in bound.offsets.items():
            self.pointers[index] = self.start + offset
        self.constants = bound.plan.constants
        for index, tensor in self.constants.items():
            self.pointers[index] = tensor.data_ptr()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the arena, which the next steps and calls write to."""
        return self.arena.data_ptr() <= tensor.data_ptr() < self.arena.data_ptr() + self.arena.numel()

    def tensor(self, view: View, held: dict[int, torch.Tensor]) -> torch.Tensor:
        """Return a view as a tensor."""
        meta, index = view.meta, view.buffer.index
        if index in self.constants:
            base = self.constants[index]
            return base.as_strided(meta.shape, meta.stride(), base.storage_offset() + meta.storage_offset())
        if index in self.offsets:
            start = self.shift + self.offsets[index]
            flat = self.arena[start : start + view.buffer.bytes].view(meta.dtype)
            return flat.as_strided(meta.shape, meta.stride(), flat.storage_offset() + meta.storage_offset())
        found = held[index]
        if view.buffer.place == "output":
            return _output(view, held)
        if found.shape == meta.shape and found.stride() == meta.stride():
            return found
        return found.as_strided(meta.shape, meta.stride(), found.storage_offset() + meta.storage_offset())


def _runs(items: Sequence[steps.Step | PythonCall]) -> list[Any]:
    """Steps that follow one another as one array of addresses."""
    found: list[Any] = []
    pending: list[steps.Step] = []

    def close() -> None:
        if pending:
            array = (ctypes.c_void_p * len(pending))(*(ctypes.addressof(step) for step in pending))
            array.steps = list(pending)  # type: ignore[attr-defined]  # they live as long as the array
            found.append(array)
            pending.clear()

    for item in items:
        if isinstance(item, PythonCall):
            close()
            found.append(item)
        else:
            pending.append(item)
    close()
    return found
