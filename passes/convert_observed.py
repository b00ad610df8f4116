"""ConvertObserved: observers into quantise-dequantise pairs with fixed numbers."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx, nn

from fxcompress.analysis.quantization import data_inputs, moves
from fxcompress.errors import InputError, PassError
from fxcompress.graph import edit, ops
from fxcompress.graph.metadata import Stage, info, set_info
from fxcompress.passes.fuse_conv_bn import FoldBatchNorm
from fxcompress.passes.insert_observers import is_observer, make_functional, observers_of
from fxcompress.passes.join_conv_bn import fold_batch_norms, normed_layers
from fxcompress.pipeline.base import Pass, PassContext, PassResult
from fxcompress.quant.arithmetic import fake_quantize
from fxcompress.quant.attention import ObservedAttention, fake_quantize_attention
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.observers import ChannelMean
from fxcompress.quant.rows import DynamicQuantize, fake_quantize_rows
from fxcompress.quant.spec import QuantSpec
from fxcompress.rewrite.driver import apply


@dataclass(frozen=True)
class ConvertObserved(Pass):
    """Replace every observer by the fake quantisation of PyTorch, with the scale and zero point it proposes.

    1. An observer of values becomes `torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)` with
       plain numbers.
    2. An observer with a scale for each channel becomes `torch.fake_quantize_per_channel_affine`; its scales and zero
       points become buffers beside the weight: `conv1.weight_scale`, `conv1.weight_zero_point`.
    3. A bias makes up for what rounding the weights changes on average: the weight's error times the mean of the input,
       as a `ChannelMean` recorded it, is subtracted. A layer without a bias is given one. What a convolution pads its
       input with is left out of account.
       Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019.
    4. A bias is rounded to multiples of (scale of the input) x (scale of the weight), the steps in which products are
       summed: thousands of them make one step of the result. See `quant.spec.QuantSpec` for what that is good for.
       Numbers of fewer bits have larger steps, of which a fraction is taken. A bias that belongs to several layers
       stays as it is.
    5. After training with fake-quantisers, layers that were joined with their batch norms (`quant.normed_layers`)
       become plain ones with folded numbers, and batch norms behind layers without an 8-bit kernel are folded as well
       (`FoldBatchNorm`). The grids are those that training has left.
    6. A `DynamicQuantize` becomes `fake_quantize_rows(x, low, high)`, which measures and rounds every row.
    7. An `ObservedAttention` becomes `fake_quantize_attention`, whose softmax makes 8-bit weights.
    8. Refuses an observer that has seen no data, or NaN or infinity.

    The result still consists of plain PyTorch operators, lets gradients through, and is what every lowering is compared
    with.
    """

    name: ClassVar[str] = "convert-observed"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.OBSERVED})
    produces: ClassVar[Stage | None] = Stage.QDQ

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Fold batch norms, correct the biases, then convert the observers one by one."""
        numbers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        edits = _correct_biases(graph_module)
        fake = any(isinstance(observer, FakeQuantize) for observer in observers_of(graph_module).values())
        if fake or normed_layers(graph_module):
            edits += _fold_batch_norms(graph_module)
        for node in list(graph_module.graph.nodes):
            observer = ops.submodule(node)
            if isinstance(observer, DynamicQuantize):
                _convert_rows(node, observer.spec)
                edits += 1
            elif isinstance(observer, ObservedAttention):
                node.op, node.target = "call_function", fake_quantize_attention
                edits += 1
            elif is_observer(observer):
                path = str(node.target)
                if path not in numbers:
                    numbers[path] = _proposal(observer, node)
                _convert(graph_module, node, observer, *numbers[path])
                edits += 1
        if edits:
            _round_biases(graph_module)
        graph_module.delete_all_unused_submodules()
        return PassResult(graph_module, edits > 0, edits)


def _fold_batch_norms(graph_module: fx.GraphModule) -> int:
    """Bring layers that were trained with their batch norms into the form of all others. Returns their number."""
    joined = fold_batch_norms(graph_module)
    graph = graph_module.graph
    paths: dict[str, str] = {}  # of the fake-quantisers
    for node in list(graph.nodes):
        path = str(node.target)
        quantizer = joined[path].quantizer if node.op == "call_module" and path in joined else None
        if quantizer is None:
            continue
        if path not in paths:
            paths[path] = edit.unique_path(graph_module, f"observers.{path.replace('.', '_')}_weight")
            edit.add_module(graph_module, paths[path], quantizer)
        with graph.inserting_before(node):
            weight = graph.get_attr(f"{path}.weight")
            quantized = graph.call_module(paths[path], (weight,))
        for made in (weight, quantized):
            set_info(made, layer=path)
        make_functional(graph_module, node, node.args[0], quantized)
    return len(joined) + apply(graph_module, FoldBatchNorm().rules()).edits


def _correct_biases(graph_module: fx.GraphModule) -> int:
    """Correct the bias of every layer behind a `ChannelMean`, and take that out. Returns how many were taken out."""
    means = [node for node in graph_module.graph.nodes if isinstance(ops.submodule(node), ChannelMean)]
    calls: dict[str, list[fx.Node]] = defaultdict(list)  # a layer that is called several times has one mean
    for node in means:
        calls[str(node.target)] += list(node.users)
    for path, layers in calls.items():
        shift = _shift(graph_module, layers[0], edit.attribute(graph_module, path).mean()) if layers else None
        if shift is not None and shift.any():
            _subtract_from_bias(graph_module, layers, shift)
    for node in means:
        edit.replace_and_erase(node, node.all_input_nodes[0])
    return len(means)


def _shift(graph_module: fx.GraphModule, layer: fx.Node, mean: torch.Tensor | None) -> torch.Tensor | None:
    """What the rounding of its weight adds to each channel of a layer's result, if its input has this mean."""
    observed = ops.arguments(layer).get("weight")
    if mean is None or not isinstance(observed, fx.Node) or observed.all_input_nodes[0].op != "get_attr":
        return None
    rounder: Any = ops.submodule(observed)
    weight = edit.attribute(graph_module, str(observed.all_input_nodes[0].target)).detach()
    error = (fake_quantize(weight, *_proposal(rounder, observed), rounder.spec) - weight).double()
    groups = int(ops.arguments(layer).get("groups", 1))
    sums = error.flatten(2).sum(2) if error.ndim > 2 else error  # (channels, input channels of a group)
    return torch.einsum("goi,gi->go", sums.unflatten(0, (groups, -1)), mean.unflatten(0, (groups, -1))).flatten()


def _subtract_from_bias(graph_module: fx.GraphModule, layers: list[fx.Node], shift: torch.Tensor) -> None:
    """Subtract `shift` from the bias of a layer, in all of its calls. Others who read that bias read it as it was."""
    weight = str(ops.arguments(layers[0])["weight"].all_input_nodes[0].target)
    path = ".".join([*weight.split(".")[:-1], "bias"])
    owner, name = edit.owner(graph_module, path)
    old, like = getattr(owner, name, None), edit.attribute(graph_module, weight)
    readers = {reader for node in graph_module.graph.find_nodes(op="get_attr", target=path) for reader in node.users}
    if not readers <= set(layers):
        path = edit.unique_path(graph_module, path)
        name = path.split(".")[-1]
    corrected = (-shift if old is None else old.detach().double() - shift).to(like.dtype)
    setattr(owner, name, nn.Parameter(corrected, requires_grad=like.requires_grad))
    for layer in layers:
        _read_bias(layer, path)


def _read_bias(layer: fx.Node, path: str) -> None:
    """Let a layer read its bias from a path."""
    given, graph = ops.arguments(layer), layer.graph
    old = given["bias"]
    if old is not None and old.target == path:
        return
    with graph.inserting_before(layer):
        bias = graph.get_attr(path)
    set_info(bias, layer=info(layer).layer)
    op = ops.BY_FUNCTION[cast("ops.Function", layer.target)]
    layer.args, layer.kwargs = ops.canonical_arguments(op, {**given, "bias": bias})
    if old is not None and not old.users:
        graph.erase_node(old)


def _proposal(observer: Any, node: fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        scale, zero_point = observer.calculate_qparams()
    except InputError as error:
        reason = f"observer {node.target!r}: {error}; run Calibrate with data before ConvertObserved"
        raise InputError(reason) from error
    return scale.detach(), zero_point.detach()


def _convert(
    graph_module: fx.GraphModule, node: fx.Node, observer: Any, scale: torch.Tensor, zero_point: torch.Tensor
) -> None:
    spec = observer.spec
    (value,) = node.all_input_nodes
    graph = graph_module.graph
    with graph.inserting_before(node):
        if spec.channel_axis is None:
            arguments: tuple[Any, ...] = (value, float(scale), int(zero_point), spec.quant_min, spec.quant_max)
            pair = graph.call_function(torch.fake_quantize_per_tensor_affine, arguments)
        else:
            scales = _buffer(graph_module, value, "scale", scale)
            zero_points = _buffer(graph_module, value, "zero_point", zero_point)
            arguments = (value, scales, zero_points, spec.channel_axis, spec.quant_min, spec.quant_max)
            pair = graph.call_function(torch.fake_quantize_per_channel_affine, arguments)
    set_info(pair, layer=info(node).layer)
    edit.replace_and_erase(node, pair)


def _convert_rows(node: fx.Node, spec: QuantSpec) -> None:
    (value,) = node.all_input_nodes
    with node.graph.inserting_before(node):
        rounded = node.graph.call_function(fake_quantize_rows, (value, spec.quant_min, spec.quant_max))
    set_info(rounded, layer=info(node).layer)
    edit.replace_and_erase(node, rounded)


def _round_biases(graph_module: fx.GraphModule) -> None:
    readers: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        if ops.kind(node) in ("conv_function", "linear_function"):
            bias = ops.arguments(node)["bias"]
            if isinstance(bias, fx.Node) and bias.op == "get_attr":
                readers[str(bias.target)].append(node)
    for path, layers in readers.items():
        step = _step(graph_module, layers[0]) if len(layers) == 1 else None
        if step is not None:
            bias = edit.attribute(graph_module, path)
            edit.set_tensor(graph_module, path, (bias.double() / step).round().mul(step).to(bias.dtype))


def _step(graph_module: fx.GraphModule, layer: fx.Node) -> torch.Tensor | None:
    """The steps to which the bias of a layer is rounded, for each channel; None if they are not known."""
    given = ops.arguments(layer)
    source, weight = given["input"], given["weight"]
    while ops.kind(source) != "fake_quantize":  # numbers that were only moved since they were quantised
        inputs = data_inputs(source)
        if not inputs or not moves(source):
            return None
        source = inputs[0]
    if ops.kind(weight) not in ("fake_quantize", "fake_quantize_channel"):
        return None
    values, weights = ops.arguments(source), ops.arguments(weight)
    scale = weights["scale"]
    if isinstance(scale, fx.Node):
        scale = edit.attribute(graph_module, str(scale.target)).double()
    product = torch.as_tensor(scale * values["scale"], dtype=torch.float64)
    return product * 2.0 ** (_bits(values) + _bits(weights) - 16)


def _bits(pair: dict[str, Any]) -> int:
    """How many bits the integers of a quantise-dequantise pair take."""
    return int(pair["quant_max"] - pair["quant_min"]).bit_length()


def _buffer(graph_module: fx.GraphModule, value: fx.Node, suffix: str, numbers: torch.Tensor) -> fx.Node:
    """Register numbers beside the tensor that they belong to, and read them."""
    if value.op != "get_attr":
        raise PassError(f"{value.name!r} is computed and can have one scale only: observe it with one for the tensor")
    path = edit.unique_path(graph_module, f"{value.target}_{suffix}")
    owner, name = edit.owner(graph_module, path)
    owner.register_buffer(name, numbers)
    node = graph_module.graph.get_attr(path)
    set_info(node, layer=info(value).layer)
    return node
