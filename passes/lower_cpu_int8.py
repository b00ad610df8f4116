"""The rewriting behind `Lower` for CPUs: quantise-dequantise pairs into 8-bit modules on plain uint8 tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxcompress.emit.cpu_int8 import (
    Dequantize,
    Int8Add,
    Int8Affine,
    Int8Attention,
    Int8AvgPool,
    Int8Conv,
    Int8DynamicLinear,
    Int8Embedding,
    Int8Linear,
    Int8MaxPool,
    Int8Mul,
    Int8WeightOnlyLinear,
    Kernel,
    Quantize,
    QuantizedLayer,
    QuantizeRows,
)
from fxcompress.emit.cpu_int8 import activation_of as kernel_activation
from fxcompress.errors import OptionError
from fxcompress.graph import edit, ops
from fxcompress.graph.metadata import TensorInfo, info, set_info, tensors
from fxcompress.pipeline.base import Note, PassResult
from fxcompress.quant.arithmetic import quantize
from fxcompress.quant.cpu import cpu_features
from fxcompress.quant.folding import scale_and_shift
from fxcompress.quant.spec import DYNAMIC, REDUCED_WEIGHT_LIMIT, STATIC, WEIGHT_ONLY, Grid, QuantSpec


def lower_cpu_int8(graph_module: fx.GraphModule) -> PassResult:
    """Rewrite a quantise-dequantise graph for 8-bit CPU kernels.

    1. A convolution or linear layer with a quantised input and weight becomes one module, together with the residual
       add and the activation behind it and the quantisation of the result. Read by float operators only, the module
       produces float32 at once.
    2. Sums, products with a gate, batch norms, average and max pooling between quantised values become modules on
       integers, and so does attention.
    3. Operators that only move numbers are applied to the integers.
    4. Everything else stays float. Between the two stand `Quantize` and `Dequantize`, wherever one is needed.
    5. A linear layer whose rows are quantised as they come (`fake_quantize_rows`) becomes a `QuantizeRows`, shared by
       all that read the same value, and a layer on its integers. One whose weight alone is quantised keeps its float
       input; an embedding becomes a table of bytes, the same as that of an output layer with the same weight.
    6. A residual whose memory nobody needs any more is overwritten by the sum.
    """
    lowering = Int8Lowering(graph_module)
    edits = lowering.run()
    return PassResult(graph_module, edits > 0, edits, tuple(lowering.notes))


@dataclass(frozen=True)
class Integers:
    """A node of the new graph that holds integers, and the grid that they lie on."""

    node: fx.Node
    grid: Grid


@dataclass(frozen=True)
class Region:
    """A layer and what its kernel computes as well.

    layer: the node of the convolution or linear function. path: of the layer. mode: how it gets its input.
    addend: node that is added to the result. activation: as `Int8Layer` takes it, with its node.
    pair: the quantisation of the result; None: the result stays float.
    """

    layer: fx.Node
    path: str
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    mode: str = STATIC
    add: fx.Node | None = None
    addend: fx.Node | None = None
    activation: tuple[Any, ...] | None = None
    activation_node: fx.Node | None = None
    pair: fx.Node | None = None

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes that one module replaces, in order."""
        return [node for node in (self.layer, self.add, self.activation_node, self.pair) if node is not None]


class Int8Lowering:
    """Builds the new graph node by node. Every old node has a float value, integers, or both, made when asked for.

    What another target does in another way is a method of its own, see the first ones.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.old = graph_module.graph
        self.new = fx.Graph()
        self.new.set_codegen(self.old._codegen)
        self.floats: dict[fx.Node, fx.Node] = {}
        self.integers: dict[fx.Node, Integers] = {}
        self.rows: dict[fx.Node, fx.Node] = {}  # a rounding of rows -> its kernel, whose result has three tensors
        self.waiting: dict[fx.Node, Callable[[], None]] = {}  # last node of a rewrite -> what emits it
        self.skipped: set[fx.Node] = set()
        self.modules: dict[str, Kernel] = {}
        self.reserved = {str(node.target) for node in self.old.nodes if node.op in ("call_module", "get_attr")}
        self.tables: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # real, integers, scales
        self.notes: list[Note] = []

    # What differs between targets

    def quantize(self, grid: Grid) -> Kernel:
        """Return the module that turns real numbers into integers."""
        return Quantize(grid.config())

    def dequantize(self, grid: Grid) -> Kernel:
        """Return the module that turns integers into real numbers."""
        return Dequantize(grid.config())

    def integer(self, number: int) -> int:
        """Return how an integer of a grid is written in tensors."""
        return number

    def activation(self, node: fx.Node) -> tuple[Any, ...] | None:
        """Return the activation that a node computes as a layer's kernel takes it; None if it does not."""
        return kernel_activation(ops.kind(node), ops.arguments(node))

    def max_pool(self, numbers: dict[str, list[int]], ceil_mode: bool) -> Kernel:
        """Return the module of maxima over windows."""
        return Int8MaxPool(**numbers, ceil_mode=ceil_mode)

    def average(self, grid: Grid, output: Grid, kind: str, dimensions: int, arguments: dict[str, Any]) -> Kernel:
        """Return the module of averages."""
        return Int8AvgPool(grid.config(), output.config(), kind, dimensions, arguments)

    def binary(self, kind: str, grids: list[Any], output: Grid, relu: bool) -> Kernel:
        """Return the module of a sum or product; grids: of the operands, None for real ones."""
        build = Int8Add if kind == "add" else Int8Mul
        return build(grids[0], grids[1], output.config(), relu)

    def attention(self, grids: list[Any], output: Grid | None, options: dict[str, Any]) -> Kernel | None:
        """Return the module of attention on bytes; None where there is none."""
        query, key, value = grids
        return Int8Attention(query, key, value, None if output is None else output.config(), **options)

    # The walk

    def run(self) -> int:
        """Build the graph, put it into the module, and return how many modules of kernels it has."""
        if not any(ops.kind(node).startswith("fake_quantize") for node in self.old.nodes):
            return 0
        for node in self.old.nodes:
            self._visit(node)
        for node in reversed(self.new.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.new.erase_node(node)
        self._overwrite_residuals()
        self._install()
        return len(self.modules)

    def _visit(self, node: fx.Node) -> None:
        kind = ops.kind(node)
        if node in self.waiting:
            self.waiting[node]()
        elif node in self.skipped or self._start_layer(node, kind):
            return
        elif kind == "fake_quantize":
            self._quantize(node)
        elif kind == "fake_quantize_rows":
            self._quantize_rows(node)
        elif kind in _STARTS and getattr(self, _STARTS[kind])(node):
            return
        elif self._moves_integers(node):
            _MOVERS[kind](self, node)
        else:
            self._copy(node)

    # Values of old nodes in the new graph

    def _float(self, old: fx.Node) -> fx.Node:
        if old not in self.floats:
            held = self.integers[old]
            self.floats[old] = self._call(f"{held.node.name}_dequantize", self.dequantize(held.grid), [held.node], old)
        return self.floats[old]

    def _any(self, old: fx.Node) -> fx.Node:
        """The value in whichever form there is, for operators that read its shape only."""
        return self.floats[old] if old in self.floats else self.integers[old].node

    def _copy(self, node: fx.Node) -> None:
        shape_only = ops.kind(node) in ("size", "ndim", "numel") or node.args[1:] in (("shape",), ("ndim",))
        self.floats[node] = self.new.node_copy(node, self._any if shape_only else self._float)

    def _call(self, name: str, module: Kernel, inputs: list[fx.Node], old: fx.Node) -> fx.Node:
        path = self._path(name)
        self.modules[path] = module
        node = self.new.create_node("call_module", path, tuple(inputs), {}, name=path.replace(".", "_"))
        set_info(node, layer=info(old).layer)
        return node

    def _path(self, wanted: str) -> str:
        """A path for a new module: free in the old graph, or left by the layer that the module replaces."""
        path, number = wanted, 0
        while path in self.modules or path in self.reserved or self._is_parent(path):
            number += 1
            path = f"{wanted}_{number}"
        return path

    def _is_parent(self, path: str) -> bool:
        """Whether a path leads to something that is no layer about to be replaced."""
        try:
            found = edit.attribute(self.graph_module, path)
        except Exception:  # nothing is there
            return False
        return not (isinstance(found, nn.Module) and not list(found.children()))

    # Layers

    def _start_layer(self, node: fx.Node, kind: str) -> bool:
        if kind == "embedding_function":
            return self._embed(node)
        return kind in ("conv_function", "linear_function") and self._start_region(node)

    def _start_region(self, layer: fx.Node) -> bool:
        """Find out what the kernel of a layer computes, and wait for the last of it. False: the layer stays float."""
        region = self._region(layer)
        if isinstance(region, str):
            self.notes.append(Note(info(layer).layer or layer.name, f"float: {region}"))
            return False
        region = self._extended(region)
        self.skipped.update(region.nodes)
        self._wait(region.nodes[-1], lambda: self._emit_layer(region))
        if region.nodes[-1] is layer:
            self.waiting[layer]()
        return True

    def _wait(self, last: fx.Node, emit: Callable[[], None]) -> None:
        self.waiting[last] = emit

    def _region(self, layer: fx.Node) -> Region | str:
        """Return the layer alone, or why it cannot be 8-bit."""
        given = ops.arguments(layer)
        value, bias = given["input"], given["bias"]
        mode = STATIC if value in self.integers else DYNAMIC if value in self.rows else WEIGHT_ONLY
        if mode != STATIC and ops.kind(layer) != "linear_function":
            return "its input is not quantised"
        if bias is not None and bias.op != "get_attr":
            return "its bias is computed"
        found = self._weight(layer)
        if isinstance(found, str):
            return found
        path, numbers = found
        real_bias = None if bias is None else edit.attribute(self.graph_module, str(bias.target)).detach().float()
        return Region(layer, path, *numbers, real_bias, mode)

    def _weight(self, layer: fx.Node) -> tuple[str, tuple[torch.Tensor, torch.Tensor]] | str:
        """Return the path of a layer, its integers and their scales; or why it has none."""
        pair = ops.arguments(layer)["weight"]
        if not isinstance(pair, fx.Node) or ops.kind(pair) not in ("fake_quantize", "fake_quantize_channel"):
            return "its weight is not quantised"
        weight = pair.args[0]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return "its weight is computed"
        numbers = self._quantized_weight(weight, ops.arguments(pair))
        return numbers if isinstance(numbers, str) else (str(weight.target).rpartition(".")[0] or layer.name, numbers)

    def _quantized_weight(self, weight: fx.Node, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | str:
        real = edit.attribute(self.graph_module, str(weight.target)).detach()
        scale, zero_point = given["scale"], given["zero_point"]
        if isinstance(scale, fx.Node):
            scale, zero_point = (edit.attribute(self.graph_module, str(one.target)) for one in (scale, zero_point))
        else:
            scale, zero_point = torch.tensor(scale), torch.tensor(zero_point)
        if given.get("axis", 0) != 0:
            return "its weight has scales along another axis than that of its output channels"
        if zero_point.any():
            return "its weight has a zero point"
        try:
            spec = QuantSpec(torch.int8, given["quant_min"], given["quant_max"], channel_axis=0 if scale.ndim else None)
        except OptionError as error:
            return str(error)
        numbers = quantize(real, scale, zero_point, spec), scale.float().expand(len(real)).contiguous()
        for other, *known in self.tables:  # a weight of several layers
            if other.is_set_to(real) and all(map(torch.equal, known, numbers)):
                return known[0], known[1]
        self.tables.append((real, *numbers))
        return numbers

    def _extended(self, region: Region) -> Region:
        """Add what follows: a residual add, an activation, the quantisation of the result."""
        last, shape = region.layer, info(region.layer).value
        follower = only_reader(last)
        if follower is not None and ops.kind(follower) == "add" and follower not in self.skipped:
            addend = _other_operand(follower, last)
            if addend is not None and info(addend).value == shape and isinstance(shape, TensorInfo):
                region = replace(region, add=follower, addend=addend)
                last, follower = follower, only_reader(follower)
        if follower is not None:
            activation = self.activation(follower)
            if activation is not None:
                region = replace(region, activation=activation, activation_node=follower)
                last, follower = follower, only_reader(follower)
        if follower is not None and is_pair(follower):
            region = replace(region, pair=follower)
        return region

    def _emit_layer(self, region: Region) -> None:
        if region.addend is not None and region.pair is not None and region.addend not in self.integers:
            self._emit_apart(region)
            return
        output = None if region.pair is None else grid_of(region.pair)
        residual: Any = None
        inputs = [self._layer_input(region)]
        if region.addend is not None:
            held = self.integers.get(region.addend)
            residual = "float" if output is None or held is None else held.grid.config()
            inputs.append(self._float(region.addend) if output is None or held is None else held.node)
        module = self._layer_module(region, output, residual)
        node = self._call(region.path, module, self._padded(region, inputs), region.layer)
        self._hold(region.nodes[-1], node, output)
        self._note_layer(region, module)

    def _layer_input(self, region: Region) -> fx.Node:
        value = ops.arguments(region.layer)["input"]
        if region.mode == STATIC:
            return self.integers[value].node
        return self.rows[value] if region.mode == DYNAMIC else self._float(value)

    def _emit_apart(self, region: Region) -> None:
        """A sum with a float value that is quantised afterwards: only the layer itself is 8-bit."""
        alone = replace(region, add=None, addend=None, activation=None, activation_node=None, pair=None)
        self._emit_layer(alone)
        for node in region.nodes[1:]:
            self._quantize(node) if node is region.pair else self._copy(node)

    def _layer_module(self, region: Region, output: Grid | None, residual: Any) -> QuantizedLayer:
        given = ops.arguments(region.layer)
        shared = {
            "bias": region.bias is not None,
            "output": None if output is None else output.config(),
            "activation": region.activation,
            "residual": residual,
        }
        shape = region.weight.shape
        if region.mode == STATIC:
            shared["input"] = self.integers[given["input"]].grid.config()
        module: QuantizedLayer
        if ops.kind(region.layer) == "linear_function":
            module = _LINEAR[region.mode](shape[1], shape[0], **shared)
        else:
            spatial = len(shape) - 2
            stride, dilation = numbers_of(given["stride"], spatial), numbers_of(given["dilation"], spatial)
            before, behind = padding_of(given["padding"], shape[2:], dilation)
            groups = int(given["groups"])
            padding = before if before == behind else [0] * spatial
            module = Int8Conv(shape[1] * groups, shape[0], list(shape[2:]), stride, padding, dilation, groups, **shared)
        module.weight, module.weight_scale = region.weight, region.weight_scale
        if module.bias is not None and region.bias is not None:
            module.bias.copy_(region.bias)
        return module.to(region.weight.device)

    def _embed(self, layer: fx.Node) -> bool:
        """Make an embedding of bytes. False: it stays float."""
        found = self._weight(layer)
        if isinstance(found, str):
            return False
        path, numbers = found
        module = Int8Embedding(*numbers[0].shape)
        module.weight, module.weight_scale = numbers
        self.floats[layer] = self._call(path, module, [self._float(ops.arguments(layer)["input"])], layer)
        self.notes.append(Note(path, "int8 weight"))
        return True

    def _padded(self, region: Region, inputs: list[fx.Node]) -> list[fx.Node]:
        """Pad in front of a convolution that wants more on one side than on the other."""
        if ops.kind(region.layer) == "linear_function":
            return inputs
        given = ops.arguments(region.layer)
        kernel = region.weight.shape[2:]
        before, behind = padding_of(given["padding"], kernel, numbers_of(given["dilation"], len(kernel)))
        if before == behind:
            return inputs
        amounts = [amount for pair in zip(reversed(before), reversed(behind), strict=True) for amount in pair]
        zero_point = self.integer(self.integers[given["input"]].grid.zero_point)
        padded = self.new.call_function(F.pad, (inputs[0], amounts), {"value": zero_point})
        set_info(padded, layer=info(region.layer).layer)
        return [padded, *inputs[1:]]

    def _note_layer(self, region: Region, module: QuantizedLayer) -> None:
        features = cpu_features()
        text = _NOTES[region.mode]
        if region.mode == WEIGHT_ONLY:
            pass  # float arithmetic in any case
        elif not features.kernels:
            text = "int8 numbers in float arithmetic: this machine has no int8 kernels"
        elif not features.vnni and int(module.weight.abs().max()) > REDUCED_WEIGHT_LIMIT:
            text = f"int8 numbers in float arithmetic: without VNNI, weights beyond {REDUCED_WEIGHT_LIMIT} saturate"
        self.notes.append(Note(region.path, text))
        for node in (region.add, region.activation_node):
            if node is not None:
                text = "float" if region.mode == WEIGHT_ONLY else "int8"
                self.notes.append(Note(node.name, f"{text}: computed by {region.path}"))

    # Sums, products, pooling

    def _start_computing(self, node: fx.Node) -> bool:
        """Find out whether a node computes on integers, and wait for the quantisation of its result."""
        last, relu = only_reader(node), None
        if last is not None and ops.kind(node) in ("add", "batch_norm") and ops.kind(last) == "relu":
            relu, last = last, only_reader(last)
        values = [value for value in node.all_input_nodes if value in self.integers]
        enough = len(values) >= 1 if ops.kind(node) == "mul" else len(values) == len(node.all_input_nodes)
        if last is None or not is_pair(last) or not enough:
            return False
        pair = last
        if ops.kind(node) == "batch_norm" and cast("_BatchNorm", ops.submodule(node)).training:
            return False
        if ops.kind(node) in ("add", "mul") and not all(
            isinstance(ops.arguments(node)[side], fx.Node) for side in ("input", "other")
        ):
            return False
        self.skipped.update({node, pair} | ({relu} if relu else set()))
        self._wait(pair, lambda: self._emit_computing(node, relu, pair))
        return True

    def _emit_computing(self, node: fx.Node, relu: fx.Node | None, pair: fx.Node) -> None:
        output = grid_of(pair)
        given = ops.arguments(node)
        module: Kernel
        if ops.kind(node) in ("add", "mul"):
            operands = [given["input"], given["other"]]
            grids = [self.integers[value].grid.config() if value in self.integers else None for value in operands]
            module = self.binary(ops.kind(node), grids, output, relu is not None)
            inputs = [self.integers[one].node if one in self.integers else self._float(one) for one in operands]
        elif ops.kind(node) == "batch_norm":
            held = self.integers[given["input"]]
            scale, shift = (part.detach() for part in scale_and_shift(cast("_BatchNorm", ops.submodule(node))))
            module = Int8Affine(len(scale), held.grid.config(), output.config(), relu is not None)
            module.scale.copy_(scale)
            module.shift.copy_(shift)
            module.to(scale.device)
            inputs = [held.node]
        else:
            held = self.integers[given["input"]]
            dimensions = _SPATIAL.get(node.target, 0)
            rest = {name: value for name, value in given.items() if name not in ("input", "dtype")}
            module = self.average(held.grid, output, ops.kind(node), dimensions, rest)
            inputs = [held.node]
        result = self._call(node.name, module, inputs, node)
        self._hold(pair, result, output)
        self.notes.append(Note(node.name, "int8"))
        if relu is not None:
            self.notes.append(Note(relu.name, f"int8: computed by {node.name}"))

    # Attention

    def _start_attention(self, node: fx.Node) -> bool:
        """Wait for the quantisation of the result, if there is one. False: attention stays float."""
        given = ops.arguments(node)
        operands = [given[name] for name in ("query", "key", "value")]
        grids = [self._grid_read(one) for one in operands]
        if None in grids or given["dropout_p"]:
            return False
        pair = only_reader(node)
        pair = pair if pair is not None and is_pair(pair) else None
        output = None if pair is None else grid_of(pair)
        options = {name: given[name] for name in ("scale", "is_causal", "enable_gqa")}
        module = self.attention([grid.config() for grid in grids if grid is not None], output, options)
        if module is None:
            return False

        def emit() -> None:
            values = [self._float(one.args[0] if is_pair(one) else one) for one in operands]
            if given["attn_mask"] is not None:
                values.append(self._float(given["attn_mask"]))
            self._hold(pair or node, self._call(node.name, module, values, node), output)
            self.notes.append(Note(node.name, "int8"))

        if pair is None:
            emit()
        else:
            self.skipped.add(pair)
            self._wait(pair, emit)
        return True

    def _grid_read(self, value: fx.Node) -> Grid | None:
        """The grid of a value that may be real numbers on it."""
        held = self.integers.get(value)
        return None if held is None else held.grid

    def _hold(self, old: fx.Node, new: fx.Node, grid: Grid | None) -> None:
        if grid is None:
            self.floats[old] = new
        else:
            self.integers[old] = Integers(new, grid)

    # Quantisation, and numbers that only move

    def _quantize(self, pair: fx.Node) -> None:
        (value,) = pair.all_input_nodes
        grid = grid_of(pair)
        held = self.integers.get(value)
        if held is not None and held.grid == grid:
            self.integers[pair] = held
            return
        if value.op == "get_attr" and all(ops.kind(user).endswith("_function") for user in pair.users):
            return  # a weight: the layers that use it quantise it themselves
        node = self._call(f"{value.name}_quantize", self.quantize(grid), [self._float(value)], value)
        self.integers[pair] = Integers(node, grid)

    def _quantize_rows(self, pair: fx.Node) -> None:
        """Rows in both forms: integers, and real numbers for others than linear layers. What is not read goes later."""
        (value,) = pair.all_input_nodes
        given = ops.arguments(pair)
        self._copy(pair)
        try:
            module = QuantizeRows(given["quant_min"], given["quant_max"])
        except OptionError:  # signed numbers, which no pass of ours makes
            return
        self.rows[pair] = self._call(f"{value.name}_rows", module, [self._float(value)], value)

    def _moves_integers(self, node: fx.Node) -> bool:
        if ops.kind(node) not in _MOVERS or not isinstance(info(node).value, (TensorInfo, tuple, list)):
            return False
        values = [one for one in node.all_input_nodes if one in self.integers]
        others = [one for one in node.all_input_nodes if one not in self.integers]
        if not values or len({self.integers[one].grid for one in values}) > 1:
            return False
        if any(_is_float_tensor(one) for one in others):
            return False
        given = ops.arguments(node)
        if ops.kind(node) in ("max_pool", "adaptive_max_pool") and given["return_indices"]:
            return False
        if ops.kind(node) == "adaptive_max_pool" and set(numbers_of(given["output_size"], 1)) != {1}:
            return False
        if ops.kind(node) == "interpolate" and not str(given["mode"]).startswith("nearest"):
            return False
        return not (ops.kind(node) == "pad" and (given["mode"] != "constant" or given["value"]))

    def _grid_of_inputs(self, node: fx.Node) -> Grid:
        return next(self.integers[one].grid for one in node.all_input_nodes if one in self.integers)

    def _move(self, node: fx.Node) -> None:
        copy = self.new.node_copy(node, self._integers_or_float)
        self.integers[node] = Integers(copy, self._grid_of_inputs(node))
        self._note_moved(node)

    def _integers_or_float(self, old: fx.Node) -> fx.Node:
        return self.integers[old].node if old in self.integers else self._float(old)

    def _note_moved(self, node: fx.Node) -> None:
        self.notes.append(Note(str(node.target) if node.op == "call_module" else node.name, "int8"))

    def _alias(self, node: fx.Node) -> None:
        self.integers[node] = self.integers[node.all_input_nodes[0]]
        self._note_moved(node)

    def _pad(self, node: fx.Node) -> None:
        held = self.integers[node.all_input_nodes[0]]
        given = ops.arguments(node)
        amounts = fx.map_arg(given["pad"], self._integers_or_float)
        new = self.new.call_function(F.pad, (held.node, amounts), {"value": self.integer(held.grid.zero_point)})
        set_info(new, layer=info(node).layer)
        self.integers[node] = Integers(new, held.grid)
        self._note_moved(node)

    def _max_pool(self, node: fx.Node) -> None:
        held = self.integers[node.all_input_nodes[0]]
        given = ops.arguments(node)
        numbers = {
            name: numbers_of(given["kernel_size"] if given[name] is None else given[name], _SPATIAL[node.target])
            for name in ("kernel_size", "stride", "padding", "dilation")
        }
        module = self.max_pool(numbers, bool(given["ceil_mode"]))
        self.integers[node] = Integers(self._call(node.name, module, [held.node], node), held.grid)
        self._note_moved(node)

    def _global_max(self, node: fx.Node) -> None:
        held = self.integers[node.all_input_nodes[0]]
        axes = list(range(-_SPATIAL[node.target], 0))
        new = self.new.call_function(torch.amax, (held.node, axes), {"keepdim": True})
        set_info(new, layer=info(node).layer)
        self.integers[node] = Integers(new, held.grid)
        self._note_moved(node)

    # The end

    def _overwrite_residuals(self) -> None:
        """Let a sum use the memory of its residual where nothing reads it afterwards."""
        order = {node: index for index, node in enumerate(self.new.nodes)}
        for node in self.new.nodes:
            module = self._module(node)
            if isinstance(module, QuantizedLayer) and len(node.args) == 2:
                residual = node.args[1]
                assert isinstance(residual, fx.Node)  # for the type checker
                readers = [reader for reader in residual.users if reader is not node]
                module.overwrite = (
                    isinstance(self._module(residual), _OWNERS)
                    and node.args[0] is not residual
                    and all(order[reader] < order[node] and self._keeps_nothing(reader) for reader in readers)
                )

    def _module(self, node: fx.Node) -> Kernel | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _keeps_nothing(self, reader: fx.Node) -> bool:
        """Whether the result of a node has memory of its own."""
        return isinstance(self._module(reader), _OWNERS)

    def _install(self) -> None:
        self._keep_holders()
        used = {str(node.target) for node in self.new.nodes if node.op == "call_module"}
        self.modules = {path: module for path, module in self.modules.items() if path in used}
        for path, module in self.modules.items():
            edit.add_module(self.graph_module, path, module.eval())
        self.graph_module.graph = self.new
        self.graph_module.delete_all_unused_submodules()

    def _keep_holders(self) -> None:
        """Move kernels beside a layer whose weights are read by another call of it that stays float."""
        holders = {str(node.target).rpartition(".")[0] for node in self.new.nodes if node.op == "get_attr"}
        for path in holders & self.modules.keys():
            beside = self._path(f"{path}_int8")
            self.modules[beside] = self.modules.pop(path)
            for node in self.new.nodes:
                if node.op == "call_module" and node.target == path:
                    node.target = beside


#: Modules whose result never shares memory with their input.
_OWNERS = (
    Quantize, QuantizeRows, Dequantize, QuantizedLayer, Int8Attention, Int8Add, Int8Mul, Int8Affine, Int8AvgPool,
    Int8MaxPool,
)  # fmt: skip

#: Linear layers by how they get their input, and what the ledger says of them.
_LINEAR: dict[str, Callable[..., QuantizedLayer]] = {
    STATIC: Int8Linear, DYNAMIC: Int8DynamicLinear, WEIGHT_ONLY: Int8WeightOnlyLinear,
}  # fmt: skip
_NOTES = {
    STATIC: "int8",
    DYNAMIC: "int8: rows are measured at every call",
    WEIGHT_ONLY: "int8 weight, float arithmetic",
}

#: Number of spatial dimensions of pooling functions.
_SPATIAL: dict[Any, int] = {
    getattr(F, f"{name}{dimensions}d"): dimensions
    for name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
    for dimensions in (1, 2, 3)
}

#: Kinds that compute, and the methods that find out whether they do so on integers.
_STARTS = {
    **dict.fromkeys(("add", "mul", "avg_pool", "adaptive_avg_pool", "mean", "batch_norm"), "_start_computing"),
    "fake_quantize_attention": "_start_attention",
}

#: What becomes of operators that move numbers only.
_MOVERS: dict[str, Callable[[Int8Lowering, fx.Node], None]] = {
    **dict.fromkeys(
        ("flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "getitem", "split", "chunk", "unbind",
         "narrow", "select", "index_select", "unflatten", "flip", "roll", "pixel_shuffle", "pixel_unshuffle",
         "channel_shuffle", "cat", "stack", "expand", "expand_as", "repeat", "broadcast_to", "view_as", "identity",
         "amax", "interpolate"),
        Int8Lowering._move,
    ),
    "dropout": Int8Lowering._alias,
    "pad": Int8Lowering._pad,
    "max_pool": Int8Lowering._max_pool,
    "adaptive_max_pool": Int8Lowering._global_max,
}  # fmt: skip


def is_pair(node: fx.Node) -> bool:
    """Whether a node is a quantise-dequantise pair of a value."""
    return ops.kind(node) == "fake_quantize" and isinstance(node.args[1], float)


def grid_of(pair: fx.Node) -> Grid:
    """Return the grid of a quantise-dequantise pair, in unsigned numbers."""
    given = ops.arguments(pair)
    return Grid.unsigned(given["scale"], given["zero_point"], given["quant_min"], given["quant_max"])


def only_reader(node: fx.Node) -> fx.Node | None:
    """Return the node that reads another one, if there is one only."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other_operand(add: fx.Node, operand: fx.Node) -> fx.Node | None:
    """The addend beside `operand`; None if it is no tensor, or the same one."""
    given = ops.arguments(add)
    others = [given[side] for side in ("input", "other") if given[side] is not operand]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) and "alpha" not in given else None


def _is_float_tensor(node: fx.Node) -> bool:
    """Whether a node holds real numbers, in one tensor or several. Sizes, and what is computed of them, are none."""
    return any(value.dtype.is_floating_point for value in tensors(info(node).value))


def numbers_of(value: Any, count: int) -> list[int]:
    """Return one number for each of `count` dimensions."""
    return [int(value)] * count if isinstance(value, int) else [int(one) for one in value]


def padding_of(padding: Any, kernel: torch.Size, dilation: list[int]) -> tuple[list[int], list[int]]:
    """Return the padding before and behind each spatial dimension."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        return [amount // 2 for amount in total], [amount - amount // 2 for amount in total]
    return numbers_of(padding, len(kernel)), numbers_of(padding, len(kernel))
