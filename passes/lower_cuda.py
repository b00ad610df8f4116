"""The rewriting behind `Lower` and `LowerFloat` for GPUs: layers into modules that run Triton's or CUDA's kernels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress.emit.cpu_numbers import Kernel
from fxcompress.emit.cuda import comparison, tuning
from fxcompress.emit.cuda.launch import SHIFT
from fxcompress.emit.cuda.layers import REALS, CudaConv, CudaLayer, CudaLinear, activation_of, joined
from fxcompress.emit.cuda.pointwise import (
    CudaAdd,
    CudaAvgPool,
    CudaEnter,
    CudaLayerNorm,
    CudaLeave,
    CudaMaxPool,
    CudaMul,
)
from fxcompress.graph import edit, ops
from fxcompress.graph.metadata import TensorInfo, info, set_info, tensors
from fxcompress.passes.lower_cpu_int8 import (
    Int8Lowering,
    Region,
    grid_of,
    is_pair,
    numbers_of,
    only_reader,
    padding_of,
)
from fxcompress.pipeline.base import Note, PassResult
from fxcompress.quant.spec import STATIC, Grid

#: What layers may be computed with, for each `dtype` of `fxcompress.compile`: real numbers, and others that may win.
DTYPES = {"fp16": ("fp16", ()), "bf16": ("bf16", ()), "int8": ("fp16", ("int8",)), "fp8": ("fp16", ("fp8",))}


def lower_cuda(
    graph_module: fx.GraphModule,
    dtype: str,
    progress: Callable[[str, int, int | None], None] = lambda description, done, total: None,
) -> PassResult:
    """Rewrite a float or quantise-dequantise graph for a GPU.

    1. A convolution with one or two spatial dimensions, or a linear layer, becomes one module, together with the
       residual add and the activation behind it and the quantisation of the result.
    2. What it is computed with is measured, if there is a choice: 8-bit numbers where they are quantised, 8-bit
       floating point with "fp8", else 16 bits. Where nothing can be measured, the numbers asked for are taken.
    3. Sums, products with a gate, pooling and layer norms with an 8-bit result become kernels on integers; layer norms,
       gates and averages over whole images also in 16 bits.
    4. Operators that only move numbers are applied to the integers.
    5. Everything else is computed in 16 bits by PyTorch. Inputs are converted where they come in, and results keep the
       dtype that they had.
    6. Linear layers that read the same value, with real results, become one.
    7. Images with one to three channels get a fourth one, of zeros, in front of a convolution: loads are wide then.

    Args:
        graph_module: the graph; its shapes must be known.
        dtype: one of `DTYPES`.
        progress: called as progress(description, done, total).
    """
    lowering = _CudaLowering(graph_module, dtype, progress)
    edits = lowering.run()
    tuning.save()
    return PassResult(graph_module, True, edits, tuple(lowering.notes))


class _CudaLowering(Int8Lowering):
    """Builds the new graph node by node, as for CPUs; real values have 16 bits.

    raw: nodes of the new graph that hold real numbers as they come in, of any dtype, by the old node. outside: old
    nodes that hold several such values.
    """

    def __init__(
        self, graph_module: fx.GraphModule, dtype: str, progress: Callable[[str, int, int | None], None]
    ) -> None:
        super().__init__(graph_module)
        self.real, self.others = DTYPES[dtype]
        self.progress = progress
        self.raw: dict[fx.Node, fx.Node] = {}
        self.outside: set[fx.Node] = set()
        self.real_layers: set[fx.Node] = set()
        calls = Counter(str(node.target) for node in self.old.nodes if node.op == "call_module")
        self.reserved -= {path for path, count in calls.items() if count == 1}  # a kernel may take its layer's path

    # What differs from CPUs

    def quantize(self, grid: Grid) -> Kernel:
        """Return the module that turns real numbers into integers."""
        return CudaEnter(grid.config(), self.real)

    def dequantize(self, grid: Grid) -> Kernel:
        """Return the module that turns integers into real numbers."""
        return CudaLeave(grid.config(), self.real)

    def integer(self, number: int) -> int:
        """Return how an integer of a grid is written in tensors: signed."""
        return number - SHIFT

    def activation(self, node: fx.Node) -> tuple[Any, ...] | None:
        """Return the activation that a node computes as a layer's kernel takes it; None if it does not."""
        return activation_of(ops.kind(node), ops.arguments(node))

    def max_pool(self, numbers: dict[str, list[int]], ceil_mode: bool) -> Kernel:
        """Return the module of maxima over windows."""
        return CudaMaxPool(**numbers, ceil_mode=ceil_mode)

    def average(self, grid: Grid, output: Grid, kind: str, dimensions: int, arguments: dict[str, Any]) -> Kernel:
        """Return the module of averages."""
        return CudaAvgPool(grid.config(), output.config(), kind, dimensions, arguments, self.real)

    def binary(self, kind: str, grids: list[Any], output: Grid, relu: bool) -> Kernel:
        """Return the module of a sum or product; grids: of the operands, None for real ones."""
        build = CudaAdd if kind == "add" else CudaMul
        return build(grids[0], grids[1], output.config(), relu, self.real)

    # The walk

    def attention(self, grids: list[Any], output: Grid | None, options: dict[str, Any]) -> Kernel | None:
        """As in `Int8Lowering`."""
        return None

    def run(self) -> int:
        """Build the graph, put it into the module, and return how many modules of kernels it has."""
        for node in self.old.nodes:
            self._visit(node)
        for node in reversed(self.new.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.new.erase_node(node)
        self._widen_inputs()
        self._join_linears()
        self._install()
        self._to_real()
        return len(self.modules)

    def _visit(self, node: fx.Node) -> None:
        kind = ops.kind(node)
        if node in self.waiting or node in self.skipped:
            super()._visit(node)
        elif node.op == "placeholder":
            self._enter(node)
        elif node.op == "output":
            self._leave(node)
        elif kind == "fake_quantize_channel" and node.all_input_nodes[0].op == "get_attr":
            return  # a weight: its readers take its numbers
        elif (kind in ("conv", "linear") and self._start_real(node)) or (
            kind == "layer_norm" and self._start_norm(node)
        ):
            return
        else:
            super()._visit(node)

    def _start_layer(self, node: fx.Node, kind: str) -> bool:
        return kind != "embedding_function" and super()._start_layer(node, kind)

    def _start_computing(self, node: fx.Node) -> bool:
        return ops.kind(node) != "batch_norm" and super()._start_computing(node)

    def _quantize_rows(self, node: fx.Node) -> None:
        """Rows that would be rounded as they come stay real: there is no kernel for them."""
        self.floats[node] = self._float(node.all_input_nodes[0])
        self.notes.append(Note(node.name, f"{self.real}: no kernel for rows that are quantised as they come"))

    def _moves_integers(self, node: fx.Node) -> bool:
        return ops.kind(node) != "interpolate" and super()._moves_integers(node)  # there is no such kernel for int8

    # Values that come in and go out

    def _enter(self, node: fx.Node) -> None:
        copy = self.new.node_copy(node, self._float)
        self._hold_raw(node, copy)

    def _hold_raw(self, old: fx.Node, copy: fx.Node) -> None:
        """Remember a value of a dtype that it brings: real numbers are converted where they are read."""
        if _is_real(old):
            self.raw[old] = copy
            return
        self.floats[old] = copy
        if _holds_real(old):
            self.outside.add(old)

    def _float(self, old: fx.Node) -> fx.Node:
        if old not in self.floats and old in self.raw:
            held = self.raw[old]
            self.floats[old] = self._call(f"{held.name}_enter", CudaEnter(None, self.real), [held], old)
        elif old not in self.floats and old not in self.integers and is_quantizer(old):
            self.floats[old] = self._rounded_weight(old)
        return super()._float(old)

    def _rounded_weight(self, pair: fx.Node) -> fx.Node:
        """A quantised weight whose reader has no kernel, as the real numbers that it stands for."""
        source = pair.all_input_nodes[0]
        numbers = self._quantized_weight(source, ops.arguments(pair))
        if isinstance(numbers, str):
            return self._float(source)
        path = edit.unique_path(self.graph_module, f"{source.target}_rounded".replace(".", "_"))
        real = numbers[0].float() * numbers[1].view(-1, *[1] * (numbers[0].ndim - 1))
        self.graph_module.register_buffer(path, real)
        return self.new.get_attr(path)

    def _any(self, old: fx.Node) -> fx.Node:
        return self.raw[old] if old in self.raw else super()._any(old)

    def _quantize(self, pair: fx.Node) -> None:
        (value,) = pair.all_input_nodes
        if value in self.raw:
            module = self.quantize(grid_of(pair))
            node = self._call(f"{value.name}_quantize", module, [self.raw[value]], value)
            self._hold(pair, node, grid_of(pair))
            return
        super()._quantize(pair)

    def _leave(self, output: fx.Node) -> None:
        self.floats[output] = self.new.node_copy(output, self._as_it_was)

    def _as_it_was(self, old: fx.Node) -> fx.Node:
        """A value in the dtype that it has in the old graph."""
        value = info(old).value
        if old in self.raw:
            return self.raw[old]
        if not isinstance(value, TensorInfo) or not value.dtype.is_floating_point:
            return self._any(old)
        if value.dtype == REALS[self.real]:
            return self._float(old)
        node = self.new.call_method("to", (self._float(old), value.dtype))
        set_info(node, layer=info(old).layer)
        return node

    def _copy(self, node: fx.Node) -> None:
        kind = ops.kind(node)
        if info(node).opaque is not None:
            self._hold_raw(node, self.new.node_copy(node, self._as_it_was))
            return
        if node.op == "get_attr":
            self.floats[node] = self.new.node_copy(node, self._float)
            return
        module = self._real_kernel(node, kind)
        if module is not None:
            inputs = [self._float(one) for one in node.all_input_nodes]
            self.floats[node] = self._call(node.name, module, inputs, node)
            return
        super()._copy(node)
        copy = self.floats[node]
        copy.args = fx.node.map_aggregate(copy.args, self._narrowed)
        copy.kwargs = fx.node.map_aggregate(copy.kwargs, self._narrowed)
        if copy.op == "call_method" and copy.target in ("float", "double"):
            copy.target = {"fp16": "half", "bf16": "bfloat16"}[self.real]
        inputs = node.all_input_nodes
        if not any(map(_holds_real, inputs)) or any(one in self.outside for one in inputs):
            # made here, or taken out of an input of the model
            del self.floats[node]
            self._hold_raw(node, copy)

    def _narrowed(self, argument: Any) -> Any:
        return REALS[self.real] if argument in (torch.float32, torch.float64) else argument

    def _real_kernel(self, node: fx.Node, kind: str) -> Kernel | None:
        """A kernel of our own for an operator on real numbers, where it is worth one."""
        given = ops.arguments(node)
        if kind in ("adaptive_avg_pool", "mean"):
            rest = {name: value for name, value in given.items() if name not in ("input", "dtype")}
            module = CudaAvgPool(None, None, kind, 2 if node.target is F.adaptive_avg_pool2d else 0, rest, self.real)
            source = info(given["input"]).value if isinstance(given["input"], fx.Node) else None
            fits = isinstance(source, TensorInfo) and module.takes(len(source.shape)) and given.get("dtype") is None
            return module if fits else None
        if kind == "mul" and len(node.all_input_nodes) == 2:
            shapes = [info(one).value.shape for one in node.all_input_nodes if _is_real(one)]
            gated = len(shapes) == 2 and all(len(shape) == 4 for shape in shapes) and shapes[0] != shapes[1]
            return CudaMul(None, None, None, False, self.real) if gated else None
        return None

    # Layers

    def _start_region(self, layer: fx.Node) -> bool:
        """A layer with a quantised weight: in 8 bits if its input is quantised as well, else with those numbers."""
        found = self._region(layer)
        if isinstance(found, Region) and found.mode != STATIC:
            found = "its input is not quantised"
        region = self._real_region(layer) if isinstance(found, str) else found
        if region is None:
            self.notes.append(Note(info(layer).layer or layer.name, f"{self.real}, by PyTorch: {found}"))
            return False
        if isinstance(found, str):
            self.real_layers.add(layer)
        if region.weight.ndim > 4:
            self.notes.append(Note(info(layer).layer or layer.name, f"{self.real}, by PyTorch: three dimensions"))
            return False
        self._start(region)
        return True

    def _real_region(self, layer: fx.Node) -> Region | None:
        """A layer that is called as a function, with the real numbers of its weight; None if they are computed."""
        given = ops.arguments(layer)
        weight, bias = given["weight"], given["bias"]
        if isinstance(weight, fx.Node) and is_quantizer(weight):
            numbers = self._quantized_weight(weight.all_input_nodes[0], ops.arguments(weight))
            if isinstance(numbers, str):
                return None
            real = numbers[0].float() * numbers[1].view(-1, *[1] * (numbers[0].ndim - 1))
            source = weight.all_input_nodes[0]
        elif isinstance(weight, fx.Node) and weight.op == "get_attr":
            real, source = edit.attribute(self.graph_module, str(weight.target)).detach(), weight
        else:
            return None
        if bias is not None and (not isinstance(bias, fx.Node) or bias.op != "get_attr"):
            return None
        held = None if bias is None else edit.attribute(self.graph_module, str(bias.target)).detach()
        path = str(source.target).rpartition(".")[0] or layer.name
        return Region(layer, path, real, torch.ones(len(real), device=real.device), held)

    def _start_real(self, layer: fx.Node) -> bool:
        """A layer that is called as a module."""
        module: Any = ops.submodule(layer)
        weight = module.weight
        if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Linear) or not isinstance(weight, torch.Tensor):
            return False
        value = info(layer.all_input_nodes[0]).value if len(layer.all_input_nodes) == 1 else None
        if not isinstance(value, TensorInfo) or not weight.dtype.is_floating_point:
            return False
        if isinstance(module, (nn.Conv1d, nn.Conv2d)) and (
            module.padding_mode != "zeros" or len(value.shape) != weight.ndim
        ):
            self.notes.append(Note(str(layer.target), f"{self.real}, by PyTorch: padding_mode={module.padding_mode!r}"))
            return False
        bias = None if module.bias is None else module.bias.detach()
        scale = torch.ones(len(weight), device=weight.device)
        self.real_layers.add(layer)
        self._start(Region(layer, str(layer.target), weight.detach(), scale, bias))
        return True

    def _start(self, region: Region) -> None:
        region = self._extended(region)
        self.skipped.update(region.nodes)
        self._wait(region.nodes[-1], lambda: self._emit_layer(region))
        if region.nodes[-1] is region.layer:
            self.waiting[region.layer]()

    def _emit_layer(self, region: Region) -> None:
        source = origin = region.layer.all_input_nodes[0]
        held = self.integers.get(source)
        if is_pair(source) and source.all_input_nodes[0] in self.raw:
            origin = source.all_input_nodes[0]  # an input of the model: real layers read it as it comes
        layers = self._candidates(region)
        shape, addend = info(source).value.shape, region.addend
        addend_shape = None if addend is None else info(addend).value.shape
        self.progress(f"measuring {region.path}", 0, None)
        arrives_as = "input" if origin is not source else "real" if held is None else "int8"
        found = comparison.verdicts(layers, shape, addend_shape, arrives_as)
        module = found[0].layer
        values = [held.node if held is not None and module.numbers == "int8" else self._float(origin)]
        values = self._padded_for(region, module, values)
        if addend is not None:
            quantized = isinstance(module.residual, Grid)
            values.append(self.integers[addend].node if quantized else self._float(addend))
        node = self._call(region.path, module, values, region.layer)
        self._hold(region.nodes[-1], node, module.output)
        why = "" if found[0].microseconds is None else f": {found[0]}; {', '.join(map(str, found[1:]))}"
        self.notes.append(Note(region.path, f"{module.numbers}{why}"))
        for other in (region.add, region.activation_node):
            if other is not None:
                self.notes.append(Note(other.name, f"{module.numbers}: computed by {region.path}"))

    def _candidates(self, region: Region) -> list[CudaLayer]:
        """The same layer with each kind of numbers that it may be computed with, the most wanted first."""
        source = region.layer.all_input_nodes[0]
        real_weight = region.weight
        found: list[CudaLayer] = []
        if region.layer not in self.real_layers:
            found.append(self._layer(region, "int8", self.integers[source].grid))
            found[0].fill(region.weight, region.bias, region.weight_scale)
            real_weight = region.weight.float() * region.weight_scale.view(-1, *[1] * (region.weight.ndim - 1))
        if "fp8" in self.others and _suits_fp8(real_weight) and self._is_pointwise(region):
            found.append(self._layer(region, "fp8", None))
            found[-1].fill(real_weight, region.bias)
        found.append(self._layer(region, self.real, None))
        found[-1].fill(real_weight, region.bias)
        return [layer.to(region.weight.device).eval() for layer in found]

    def _is_pointwise(self, region: Region) -> bool:
        if region.weight.ndim == 2:
            return True
        stride, before, behind, _, groups = self._geometry(region)
        return all(size == 1 for size in (*region.weight.shape[2:], *stride, groups)) and not any((*before, *behind))

    def _layer(self, region: Region, numbers: str, grid: Grid | None) -> CudaLayer:
        held = None if region.addend is None else self.integers.get(region.addend)
        residual: Any = None if region.addend is None else "float" if held is None else held.grid.config()
        output = None if region.pair is None else grid_of(region.pair).config()
        shape = region.weight.shape
        shared: dict[str, Any] = {
            "bias": region.bias is not None, "numbers": numbers, "real": self.real, "output": output,
            "input": None if grid is None else grid.config(), "activation": region.activation, "residual": residual,
        }  # fmt: skip
        if len(shape) == 2:
            return CudaLinear(shape[1], shape[0], **shared)
        stride, before, behind, dilation, groups = self._geometry(region)
        padding = before if before == behind else [0] * len(before)
        return CudaConv(shape[1] * groups, shape[0], list(shape[2:]), stride, padding, dilation, groups, **shared)

    def _geometry(self, region: Region) -> tuple[list[int], list[int], list[int], list[int], int]:
        """Stride, padding before and behind, dilation and groups of a convolution."""
        module: Any = ops.submodule(region.layer)
        names = ("stride", "padding", "dilation", "groups")
        given = ops.arguments(region.layer) if module is None else {name: getattr(module, name) for name in names}
        kernel = region.weight.shape[2:]
        stride, dilation = numbers_of(given["stride"], len(kernel)), numbers_of(given["dilation"], len(kernel))
        before, behind = padding_of(given["padding"], kernel, dilation)
        return stride, before, behind, dilation, int(given["groups"])

    def _padded_for(self, region: Region, module: CudaLayer, inputs: list[fx.Node]) -> list[fx.Node]:
        """Pad in front of a convolution that wants more on one side than on the other."""
        if region.weight.ndim == 2:
            return inputs
        _, before, behind, _, _ = self._geometry(region)
        if before == behind:
            return inputs
        amounts = [amount for pair in zip(reversed(before), reversed(behind), strict=True) for amount in pair]
        filler = 0 if module.input is None else self.integer(module.input.zero_point)
        padded = self.new.call_function(F.pad, (inputs[0], amounts), {"value": filler})
        set_info(padded, layer=info(region.layer).layer)
        return [padded]

    # Norms

    def _start_norm(self, node: fx.Node) -> bool:
        module: Any = ops.submodule(node)
        if type(module) is not nn.LayerNorm:
            return False
        follower = only_reader(node)
        pair = follower if follower is not None and is_pair(follower) else None
        if pair is not None:
            self.skipped.add(node)
            self._wait(pair, lambda: self._emit_norm(node, module, pair))
            return True
        self._emit_norm(node, module, None)
        return True

    def _emit_norm(self, node: fx.Node, module: nn.LayerNorm, pair: fx.Node | None) -> None:
        weight, bias = module.weight, module.bias
        output = None if pair is None else grid_of(pair)
        config = None if output is None else output.config()
        kernel = CudaLayerNorm(module.normalized_shape, module.eps, weight is not None, bias is not None, config)
        for buffer, given in ((kernel.weight, weight), (kernel.bias, bias)):
            if buffer is not None and given is not None:
                buffer.copy_(given.detach())
        if weight is not None:
            kernel.to(weight.device)
        result = self._call(str(node.target), kernel, [self._float(node.all_input_nodes[0])], node)
        self._hold(pair or node, result, output)
        text = self.real if output is None else f"{self.real}, rounded to int8"
        self.notes.append(Note(str(node.target), text))

    # The end

    def _widen_inputs(self) -> None:
        """Give images with few channels one more, in front of convolutions: their loads are four numbers wide then."""
        for node in self.new.nodes:
            enter = self.modules.get(str(node.target)) if node.op == "call_module" else None
            if not isinstance(enter, CudaEnter) or not node.users:
                continue
            found = {str(user.target): self.modules.get(str(user.target)) for user in node.users}
            layers = {path: layer for path, layer in found.items() if isinstance(layer, CudaConv) and _is_first(layer)}
            if len(layers) != len(node.users):
                continue
            for path, layer in layers.items():
                self.modules[path] = wider = _widened(layer)
                enter.channels = wider.in_channels

    def _join_linears(self) -> None:
        """Make one layer of linear layers that read the same value: the projections of attention, for example."""
        for source in list(self.new.nodes):
            groups: dict[tuple[str, bool], list[fx.Node]] = defaultdict(list)
            for user in source.users:
                layer = self.modules.get(str(user.target)) if user.op == "call_module" else None
                if isinstance(layer, CudaLinear) and _is_plain(layer) and user.args == (source,):
                    groups[layer.numbers, layer.bias is not None].append(user)
            for nodes in groups.values():
                if len(nodes) > 1 and len({str(node.target) for node in nodes}) == len(nodes):
                    self._join(source, nodes)

    def _join(self, source: fx.Node, nodes: list[fx.Node]) -> None:
        layers = [layer for node in nodes if isinstance(layer := self.modules.pop(str(node.target)), CudaLinear)]
        path = str(nodes[0].target)
        self.modules[path] = joined(layers)
        with self.new.inserting_after(source):
            together = self.new.call_module(path, (source,))
        set_info(together, layer=info(nodes[0]).layer)
        start = 0
        for node, layer in zip(nodes, layers, strict=True):
            with self.new.inserting_before(node):
                part = self.new.call_function(torch.narrow, (together, -1, start, layer.out_features))
            set_info(part, layer=info(node).layer)
            node.replace_all_uses_with(part)
            self.new.erase_node(node)
            start += layer.out_features
            if node is not nodes[0]:
                self.notes.append(Note(str(node.target), f"{layer.numbers}: computed by {path}, which reads the same"))

    def _to_real(self) -> None:
        """Round parameters and buffers that PyTorch's operators read."""
        for path, module in self.graph_module.named_modules():
            if isinstance(module, Kernel) or path.startswith("_fx"):
                continue
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.dtype in (torch.float32, torch.float64):
                    rounded = tensor.detach().to(REALS[self.real])
                    if name in module._parameters:
                        module._parameters[name] = nn.Parameter(rounded, requires_grad=False)
                    else:
                        module._buffers[name] = rounded


def is_quantizer(node: fx.Node) -> bool:
    """Whether a node is a quantise-dequantise pair with fixed numbers, per tensor or per channel."""
    return ops.kind(node) in ("fake_quantize", "fake_quantize_channel")


def _is_real(node: fx.Node) -> bool:
    """Whether a node produces real numbers, in one tensor."""
    value = info(node).value
    return isinstance(value, TensorInfo) and value.dtype.is_floating_point


def _holds_real(node: fx.Node) -> bool:
    """Whether a node produces real numbers, in one tensor or several."""
    return any(value.dtype.is_floating_point for value in tensors(info(node).value))


def _suits_fp8(weight: torch.Tensor) -> bool:
    """Whether a layer has sizes that 8-bit floating point can be worth its roundings for."""
    return weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0


def _is_plain(layer: CudaLinear) -> bool:
    """Whether a layer computes products and biases only, with a real result."""
    return layer.output is None and layer.residual is None and layer.activation is None


def _is_first(layer: CudaConv) -> bool:
    """Whether a layer reads few channels with a window."""
    plain = layer.groups == 1 and len(layer.kernel_size) == 2
    return plain and layer.in_channels % 4 != 0 and layer.window.flat


def _widened(layer: CudaConv) -> CudaConv:
    """The same layer with weights of zero for the channels that its input gets."""
    channels = -(-layer.in_channels // 4) * 4
    wider = CudaConv.from_config({**layer.config(), "in_channels": channels})
    weight = F.pad(layer.weight.float(), (0, 0, 0, 0, 0, channels - layer.in_channels))
    wider.fill(weight, layer.bias, layer.weight_scale)
    return wider.to(layer.weight.device).eval()  # type: ignore[no-any-return]
