"""The operator table: which spellings of an operation exist, and which one is canonical.

`Canonicalize` rewrites every spelling into the canonical one; every later pass asks `kind(node)` and `arguments(node)`
and so meets each operation in one form only. The artefact uses the same table as its allow-list: a graph that holds
only what stands here can be saved and loaded.
"""

from __future__ import annotations

import ast
import builtins
import functools
import math
import operator
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress.graph import modules as own
from fxcompress.graph.metadata import TensorInfo, info
from fxcompress.quant.attention import fake_quantize_attention
from fxcompress.quant.normed_layers import PLAIN
from fxcompress.quant.rows import fake_quantize_rows

Function = Callable[..., Any]

_REQUIRED = object()


@dataclass(frozen=True)
class Op:
    """One operation.

    kind: the word that passes use for it.
    function: the canonical function.
    parameters: the names of its arguments and their defaults, in order; those without a default come first.
    aliases: other functions with the same meaning and argument names.
    methods: names of the tensor methods with the same meaning.
    elementwise: whether every output element depends on the input elements at its own (broadcast) position only.
    view: whether the result may share memory with the first argument.
    """

    kind: str
    function: Function
    parameters: dict[str, Any]
    aliases: tuple[Function, ...] = ()
    methods: tuple[str, ...] = ()
    elementwise: bool = False
    view: bool = False
    renamed: dict[str, str] = field(default_factory=dict)


def _parameters(text: str) -> dict[str, Any]:
    """Read `"input, dim=None, keepdim=False"` into names and defaults."""
    found: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, default = item.partition("=")
        found[name] = _literal(default) if equals else _REQUIRED
    return found


def _literal(text: str) -> Any:
    """Read a default: a Python literal, or a bare word as a string."""
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


OPS: list[Op] = []


def _op(
    kind: str,
    function: Function,
    parameters: str,
    aliases: tuple[Function, ...] = (),
    methods: str = "",
    elementwise: bool = False,
    view: bool = False,
    renamed: dict[str, str] | None = None,
) -> None:
    OPS.append(
        Op(kind, function, _parameters(parameters), aliases, tuple(methods.split()), elementwise, view, renamed or {})
    )


def _unary(kind: str, function: Function, *aliases: Function, parameters: str = "input", methods: str = "") -> None:
    _op(kind, function, parameters, aliases, methods, elementwise=True)


def _binary(kind: str, function: Function, *aliases: Function, methods: str = "") -> None:
    _op(kind, function, "input, other", aliases, methods, elementwise=True)


# Activations
_unary("relu", F.relu, torch.relu, methods="relu")
_unary("relu6", F.relu6)
_unary("hardtanh", F.hardtanh, parameters="input, min_val=-1.0, max_val=1.0")
_unary("hardswish", F.hardswish)
_unary("hardsigmoid", F.hardsigmoid)
_unary("silu", F.silu)
_unary("mish", F.mish)
_unary("gelu", F.gelu, parameters="input, approximate=none")
_unary("leaky_relu", F.leaky_relu, parameters="input, negative_slope=0.01")
_unary("elu", F.elu, parameters="input, alpha=1.0")
_unary("selu", F.selu, torch.selu)
_unary("celu", F.celu, torch.celu, parameters="input, alpha=1.0")
_unary("sigmoid", torch.sigmoid, F.sigmoid, methods="sigmoid")
_unary("tanh", torch.tanh, F.tanh, methods="tanh")
_unary("softplus", F.softplus, parameters="input, beta=1, threshold=20")
_unary("softsign", F.softsign)
_unary("logsigmoid", F.logsigmoid)
_unary("threshold", F.threshold, parameters="input, threshold, value")
# Elementwise arithmetic on one tensor
for _name in ("exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "sin", "cos", "erf", "abs", "square", "reciprocal",
              "sign", "floor", "ceil", "round", "isnan", "logical_not"):  # fmt: skip
    _aliases = (operator.abs, builtins.abs) if _name == "abs" else ()
    _unary(_name, getattr(torch, _name), *_aliases, methods=_name)
_unary("neg", operator.neg, torch.neg, methods="neg")
_unary("clamp", torch.clamp, torch.clip, parameters="input, min=None, max=None", methods="clamp clip")
_unary("clamp_min", torch.clamp_min, parameters="input, min", methods="clamp_min")
_unary("clamp_max", torch.clamp_max, parameters="input, max", methods="clamp_max")
_unary("nan_to_num", torch.nan_to_num, parameters="input, nan=None, posinf=None, neginf=None", methods="nan_to_num")
# Elementwise arithmetic on two tensors, or on numbers (sizes)
_binary("add", operator.add, torch.add, methods="add")
_binary("sub", operator.sub, torch.sub, methods="sub subtract")
_binary("mul", operator.mul, torch.mul, methods="mul multiply")
_binary("div", operator.truediv, torch.div, torch.true_divide, methods="div true_divide divide")
_binary("floordiv", operator.floordiv, torch.floor_divide, methods="floor_divide")
_binary("mod", operator.mod, torch.remainder, methods="remainder")
_binary("pow", operator.pow, torch.pow, methods="pow")
_binary("maximum", torch.maximum, methods="maximum")
_binary("minimum", torch.minimum, methods="minimum")
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _binary(_name, getattr(operator, _name), getattr(torch, _name), methods=_name)
_op("where", torch.where, "condition, input, other", elementwise=True)
_op("masked_fill", torch.masked_fill, "input, mask, value", methods="masked_fill", elementwise=True)
_op("lerp", torch.lerp, "input, end, weight", methods="lerp", elementwise=True)
_op("addcmul", torch.addcmul, "input, tensor1, tensor2", methods="addcmul", elementwise=True)
# Sizes
_op("getitem", operator.getitem, "input, index", view=True)
_op("getattr", getattr, "input, name")
_op("set_item", own.set_item, "input, index, value")
for _name in ("min", "max", "int", "float"):
    if _name in ("int", "float"):
        _op(f"number_{_name}", getattr(builtins, _name), "input")
_op("math_sqrt", math.sqrt, "input")
_op("ordered_dict", OrderedDict, "input")
# Shapes
_op("cat", torch.cat, "tensors, dim=0", aliases=(torch.concat, torch.concatenate), renamed={"axis": "dim"})
_op("stack", torch.stack, "tensors, dim=0")
_op("split", torch.split, "tensor, split_size_or_sections, dim=0", methods="split", view=True,
    renamed={"split_size": "split_size_or_sections"})  # fmt: skip
_op("chunk", torch.chunk, "input, chunks, dim=0", methods="chunk", view=True)
_op("tensor_split", torch.tensor_split, "input, indices_or_sections, dim=0", methods="tensor_split", view=True,
    renamed={"indices": "indices_or_sections", "sections": "indices_or_sections"})  # fmt: skip
_op("unbind", torch.unbind, "input, dim=0", methods="unbind", view=True)
_op("narrow", torch.narrow, "input, dim, start, length", methods="narrow", view=True)
_op("select", torch.select, "input, dim, index", methods="select", view=True)
_op("index_select", torch.index_select, "input, dim, index", methods="index_select")
_op("gather", torch.gather, "input, dim, index", methods="gather")
_op("triu", torch.triu, "input, diagonal=0", methods="triu")
_op("tril", torch.tril, "input, diagonal=0", methods="tril")
_op("flatten", torch.flatten, "input, start_dim=0, end_dim=-1", methods="flatten", view=True)
_op("unflatten", torch.unflatten, "input, dim, sizes", methods="unflatten", view=True)
_op("reshape", torch.reshape, "input, shape", view=True)
_op("permute", torch.permute, "input, dims", view=True)
_op("transpose", torch.transpose, "input, dim0, dim1", (torch.swapaxes, torch.swapdims), "transpose swapaxes swapdims",
    view=True, renamed={"axis0": "dim0", "axis1": "dim1"})  # fmt: skip
_op("squeeze", torch.squeeze, "input, dim=None", methods="squeeze", view=True)
_op("unsqueeze", torch.unsqueeze, "input, dim", methods="unsqueeze", view=True)
_op("flip", torch.flip, "input, dims", methods="flip")
_op("roll", torch.roll, "input, shifts, dims=None", methods="roll")
_op("unfold", F.unfold, "input, kernel_size, dilation=1, padding=0, stride=1")
_op("fold", F.fold, "input, output_size, kernel_size, dilation=1, padding=0, stride=1")
_op("glu", F.glu, "input, dim=-1")
_op("pad", F.pad, "input, pad, mode=constant, value=None")
_op("pixel_shuffle", F.pixel_shuffle, "input, upscale_factor")
_op("pixel_unshuffle", F.pixel_unshuffle, "input, downscale_factor")
_op("repeat_interleave", torch.repeat_interleave, "input, repeats, dim=None, output_size=None",
    methods="repeat_interleave")  # fmt: skip
_op("channel_shuffle", torch.channel_shuffle, "input, groups", aliases=(F.channel_shuffle,))
_op("broadcast_to", torch.broadcast_to, "input, size", methods="broadcast_to", view=True)
# Pooling and resizing
for _n in (1, 2, 3):
    _op("max_pool", getattr(F, f"max_pool{_n}d"),
        "input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False",
        aliases=(getattr(torch, f"max_pool{_n}d"),))  # fmt: skip
    _op("avg_pool", getattr(F, f"avg_pool{_n}d"),
        "input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True"
        + (", divisor_override=None" if _n > 1 else ""))  # fmt: skip
    _op("adaptive_avg_pool", getattr(F, f"adaptive_avg_pool{_n}d"), "input, output_size")
    _op("adaptive_max_pool", getattr(F, f"adaptive_max_pool{_n}d"), "input, output_size, return_indices=False")
_op(
    "interpolate",
    F.interpolate,
    "input, size=None, scale_factor=None, mode=nearest, align_corners=None, "
    "recompute_scale_factor=None, antialias=False",
)
_op("grid_sample", F.grid_sample, "input, grid, mode=bilinear, padding_mode=zeros, align_corners=None")
# Reductions and normalisations without parameters
_op("mean", torch.mean, "input, dim=None, keepdim=False, dtype=None", methods="mean", renamed={"axis": "dim"})
_op("sum", torch.sum, "input, dim=None, keepdim=False, dtype=None", methods="sum", renamed={"axis": "dim"})
_op("amax", torch.amax, "input, dim=None, keepdim=False", methods="amax")
_op("amin", torch.amin, "input, dim=None, keepdim=False", methods="amin")
_op("max", torch.max, "input, dim=None, keepdim=False", methods="max")
_op("min", torch.min, "input, dim=None, keepdim=False", methods="min")
_op("prod", torch.prod, "input, dim=None, keepdim=False, dtype=None", methods="prod")
_op("logsumexp", torch.logsumexp, "input, dim, keepdim=False", methods="logsumexp")
_op("var", torch.var, "input, dim=None, correction=1, keepdim=False", methods="var")
_op("std", torch.std, "input, dim=None, correction=1, keepdim=False", methods="std")
_op("norm", torch.linalg.vector_norm, "x, ord=2, dim=None, keepdim=False")
_op("softmax", F.softmax, "input, dim=None, dtype=None", methods="softmax", aliases=(torch.softmax,))
_op("log_softmax", F.log_softmax, "input, dim=None, dtype=None", methods="log_softmax", aliases=(torch.log_softmax,))
_op("normalize", F.normalize, "input, p=2, dim=1")
_op("argmax", torch.argmax, "input, dim=None, keepdim=False", methods="argmax")
_op("cumsum", torch.cumsum, "input, dim", methods="cumsum")
# Products
_op("matmul", torch.matmul, "input, other", aliases=(operator.matmul,), methods="matmul")
_op("bmm", torch.bmm, "input, mat2", methods="bmm")
_op("einsum", torch.einsum, "equation, operands")
_ATTENTION = "query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False"
_op("attention", F.scaled_dot_product_attention, _ATTENTION)
# Layers by function, where their weights are computed and so no module can hold them
_op("linear_function", F.linear, "input, weight, bias=None")
for _n in (1, 2, 3):
    _op("conv_function", getattr(F, f"conv{_n}d"),
        "input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1",
        aliases=(getattr(torch, f"conv{_n}d"),))  # fmt: skip
    _op("conv_transpose_function", getattr(F, f"conv_transpose{_n}d"),
        "input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1",
        aliases=(getattr(torch, f"conv_transpose{_n}d"),))  # fmt: skip
_op(
    "batch_norm_function",
    F.batch_norm,
    "input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05",
)
_op("layer_norm_function", F.layer_norm, "input, normalized_shape, weight=None, bias=None, eps=1e-05")
_op("group_norm_function", F.group_norm, "input, num_groups, weight=None, bias=None, eps=1e-05")
_op("rms_norm_function", F.rms_norm, "input, normalized_shape, weight=None, eps=None")
_op("prelu_function", F.prelu, "input, weight", aliases=(torch.prelu,))
_op("dropout_function", F.dropout, "input, p=0.5, training=True", elementwise=True)
_op("dropout_function", torch.dropout, "input, p, train", elementwise=True)
for _name in ("dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"):
    _op("dropout_function", getattr(F, _name), "input, p=0.5, training=True", elementwise=True)
_op(
    "embedding_function",
    F.embedding,
    "input, weight, padding_idx=None, max_norm=None, norm_type=2, scale_grad_by_freq=False, sparse=False",
)
# Constructors of tensors
_op("zeros", torch.zeros, "size, dtype=None, device=None")
_op("ones", torch.ones, "size, dtype=None, device=None")
_op("full", torch.full, "size, fill_value, dtype=None, device=None")
_op("full_like", torch.full_like, "input, fill_value", elementwise=True)
_op("tensor", torch.tensor, "data, dtype=None, device=None")
_op("eye", torch.eye, "n, m=None, dtype=None, device=None")
_op("linspace", torch.linspace, "start, end, steps, dtype=None, device=None")
_op("arange", torch.arange, "start, end=None, step=1, dtype=None, device=None")
_op("meshgrid", torch.meshgrid, "tensors, indexing=None")
_op("zeros_like", torch.zeros_like, "input", elementwise=True)
_op("ones_like", torch.ones_like, "input", elementwise=True)
# Quantise-dequantise pairs
_op("fake_quantize", torch.fake_quantize_per_tensor_affine, "input, scale, zero_point, quant_min, quant_max")
_op(
    "fake_quantize_channel",
    torch.fake_quantize_per_channel_affine,
    "input, scale, zero_point, axis, quant_min, quant_max",
)
_op("fake_quantize_rows", fake_quantize_rows, "input, quant_min, quant_max")
_op("fake_quantize_attention", fake_quantize_attention, _ATTENTION)

#: Methods that stay methods: torch has no function for them. name -> (kind, elementwise)
METHODS: dict[str, tuple[str, bool]] = {
    "size": ("size", False), "expand": ("expand", False), "expand_as": ("expand_as", False),
    "repeat": ("repeat", False), "contiguous": ("identity", True), "clone": ("identity", True),
    "detach": ("identity", True), "to": ("to", True), "type_as": ("to", True), "float": ("to", True),
    "half": ("to", True), "bfloat16": ("to", True), "double": ("to", True), "int": ("to", True),
    "long": ("to", True), "bool": ("to", True), "dim": ("ndim", False), "numel": ("numel", False),
    "view_as": ("view_as", False), "reshape_as": ("view_as", False), "new_zeros": ("zeros", False),
    "new_ones": ("ones", False),
    "items": ("items", False), "values": ("values", False), "keys": ("keys", False),
    "view": ("view_dtype", False), "item": ("item", False), "tolist": ("item", False),
}  # fmt: skip

#: Attributes of a tensor that a graph may read.
TENSOR_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "T", "mT"})

#: In-place spellings: the method or function with a trailing underscore, or the augmented operator.
INPLACE_OPERATORS: dict[Function, Function] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ifloordiv: operator.floordiv, operator.imod: operator.mod,
    operator.ipow: operator.pow, operator.imatmul: torch.matmul,
    F.relu_: F.relu, torch.relu_: F.relu, F.leaky_relu_: F.leaky_relu, F.hardtanh_: F.hardtanh, F.elu_: F.elu,
    F.selu_: F.selu, F.celu_: F.celu, torch.sigmoid_: torch.sigmoid, torch.tanh_: torch.tanh,
}  # fmt: skip

BY_FUNCTION: dict[Function, Op] = {}
BY_METHOD: dict[str, Op] = {}
for _entry in OPS:
    for _function in (_entry.function, *_entry.aliases):
        BY_FUNCTION.setdefault(_function, _entry)
    for _method in _entry.methods:
        BY_METHOD.setdefault(_method, _entry)

#: Layers that stay modules, by exact class. The word is the one that passes use.
MODULE_KINDS: dict[type[nn.Module], str] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv"),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "conv_transpose"),
    nn.Linear: "linear",
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), "batch_norm"),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), "instance_norm"),
    nn.GroupNorm: "group_norm",
    nn.LayerNorm: "layer_norm",
    own.PartialLayerNorm: "layer_norm",
    own.PartialGroupNorm: "group_norm",
    nn.RMSNorm: "rms_norm",
    own.PartialRMSNorm: "rms_norm",
    nn.LocalResponseNorm: "local_response_norm",
    nn.PReLU: "prelu",
    nn.Embedding: "embedding",
    **dict.fromkeys(
        (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout), "dropout"
    ),
    own.StochasticDepth: "dropout",
    nn.RReLU: "rrelu",
    nn.MultiheadAttention: "multihead_attention",
    nn.LSTM: "lstm",
    nn.GRU: "gru",
    nn.RNN: "rnn",
}

#: Modules without state, and the function that each one calls with the attributes named.
STATELESS_MODULES: dict[type[nn.Module], tuple[Function, str]] = {
    nn.ReLU: (F.relu, ""), nn.ReLU6: (F.relu6, ""), nn.Hardtanh: (F.hardtanh, "min_val max_val"),
    nn.Hardswish: (F.hardswish, ""), nn.Hardsigmoid: (F.hardsigmoid, ""), nn.SiLU: (F.silu, ""),
    nn.Mish: (F.mish, ""), nn.GELU: (F.gelu, "approximate"), nn.LeakyReLU: (F.leaky_relu, "negative_slope"),
    nn.ELU: (F.elu, "alpha"), nn.SELU: (F.selu, ""), nn.CELU: (F.celu, "alpha"), nn.Sigmoid: (torch.sigmoid, ""),
    nn.Tanh: (torch.tanh, ""), nn.Softplus: (F.softplus, "beta threshold"), nn.Softsign: (F.softsign, ""),
    nn.LogSigmoid: (F.logsigmoid, ""), nn.Threshold: (F.threshold, "threshold value"),
    nn.Softmax: (F.softmax, "dim"), nn.LogSoftmax: (F.log_softmax, "dim"),
    nn.Flatten: (torch.flatten, "start_dim end_dim"),
    nn.PixelShuffle: (F.pixel_shuffle, "upscale_factor"), nn.PixelUnshuffle: (F.pixel_unshuffle, "downscale_factor"),
    nn.Unfold: (F.unfold, "kernel_size dilation padding stride"),
    nn.Fold: (F.fold, "output_size kernel_size dilation padding stride"), nn.GLU: (F.glu, "dim"),
    nn.ChannelShuffle: (torch.channel_shuffle, "groups"),
    nn.Upsample: (F.interpolate, "size scale_factor mode align_corners recompute_scale_factor"),
    nn.UpsamplingNearest2d: (F.interpolate, "size scale_factor mode align_corners"),
    nn.UpsamplingBilinear2d: (F.interpolate, "size scale_factor mode align_corners"),
    **{getattr(nn, f"MaxPool{n}d"): (getattr(F, f"max_pool{n}d"),
       "kernel_size stride padding dilation ceil_mode return_indices") for n in (1, 2, 3)},
    **{getattr(nn, f"AvgPool{n}d"): (getattr(F, f"avg_pool{n}d"),
       "kernel_size stride padding ceil_mode count_include_pad" + (" divisor_override" if n > 1 else ""))
       for n in (1, 2, 3)},
    **{getattr(nn, f"AdaptiveAvgPool{n}d"): (getattr(F, f"adaptive_avg_pool{n}d"), "output_size") for n in (1, 2, 3)},
    **{getattr(nn, f"AdaptiveMaxPool{n}d"): (getattr(F, f"adaptive_max_pool{n}d"), "output_size return_indices")
       for n in (1, 2, 3)},
}  # fmt: skip

#: Padding modules: the mode of F.pad.
PADDING_MODULES: dict[type[nn.Module], str] = {
    **{getattr(nn, f"{mode}{n}d"): word for n in (1, 2, 3) for mode, word in (
        ("ZeroPad", "constant"), ("ConstantPad", "constant"), ("ReflectionPad", "reflect"),
        ("ReplicationPad", "replicate"), ("CircularPad", "circular"))},
}  # fmt: skip

#: Functions (registered with torch.fx.wrap) and module classes of the user's that capture keeps whole, because passes
#: have been told about them, for example with a rule for channels (`analysis.transfer`).
WHOLE: set[object] = set()

#: Kinds that compute one tensor elementwise, whatever the spelling.
ELEMENTWISE_KINDS = frozenset(
    {entry.kind for entry in OPS if entry.elementwise}
    | {kind for kind, elementwise in METHODS.values() if elementwise}
    | {"dropout", "rrelu"}
)

#: Kinds whose result may share memory with the first argument.
VIEW_KINDS = frozenset(
    {entry.kind for entry in OPS if entry.view} | {"identity", "expand", "expand_as", "view_as", "to"}
)

#: Kinds that hold parameters worth compressing.
ANCHOR_KINDS = frozenset({"conv", "conv_transpose", "linear"})


def submodule(node: fx.Node) -> nn.Module | None:
    """Return the module that a `call_module` node calls, else None."""
    if node.op != "call_module" or node.graph.owning_module is None:
        return None
    found: nn.Module | None = node.graph.owning_module
    for name in str(node.target).split("."):  # the dicts themselves: getattr of thousands of names is slow
        found = found._modules.get(name) if found is not None else None
    return found


def kind(node: fx.Node) -> str:
    """Return the word for what a node does: "conv", "relu", "cat", ...; "opaque" for what the table does not know.

    Placeholders, outputs and attributes are "placeholder", "output" and "get_attr".
    """
    if node.op == "call_module":
        module: Any = type(submodule(node))
        return MODULE_KINDS.get(PLAIN.get(module, module), "opaque")
    if node.op == "call_function":
        entry = BY_FUNCTION.get(node.target)  # type: ignore[arg-type]
        return entry.kind if entry else "opaque"
    if node.op == "call_method":
        return METHODS.get(str(node.target), ("opaque", False))[0]
    return node.op


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a canonical function node by name, defaults filled in.

    Modules and methods give their positional arguments as "input" and, for methods, "rest".
    """
    if node.op == "call_function" and node.target in BY_FUNCTION:
        return bind(BY_FUNCTION[node.target], node.args, node.kwargs)
    return {"input": node.args[0] if node.args else None, "rest": tuple(node.args[1:]), **node.kwargs}


def bind(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Bind arguments to the parameters of `op`. Names unknown to the table are kept as they are."""
    found = {name: default for name, default in op.parameters.items() if default is not _REQUIRED}
    found.update(zip(op.parameters, args, strict=False))
    found.update({op.renamed.get(name, name): value for name, value in kwargs.items()})
    return found


def canonical_arguments(op: Op, bound: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return bound arguments as canonical args and kwargs: required ones by position, others by name if not default."""
    args = tuple(bound[name] for name, default in op.parameters.items() if default is _REQUIRED)
    kwargs = {
        name: value
        for name, value in bound.items()
        if name not in op.parameters or (op.parameters[name] is not _REQUIRED and not _same(value, op.parameters[name]))
    }
    return args, kwargs


def _same(value: Any, default: Any) -> bool:
    return not isinstance(value, fx.Node) and type(value) is type(default) and bool(value == default)


def normalised_index(index: Any, rank: int) -> list[Any] | None:
    """Return an index as one item per dimension (slice or int) and None for a new one; None if it holds tensors."""
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(isinstance(item, fx.Node) and isinstance(info(item).value, TensorInfo) for item in items):
        return None
    if not all(item is None or item is Ellipsis or isinstance(item, (slice, int, fx.Node)) for item in items):
        return None
    if any(isinstance(item, bool) for item in items):
        return None
    consumed = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis in [item for item in items if not isinstance(item, (slice, fx.Node))]:
        place = next(i for i, item in enumerate(items) if item is Ellipsis)
        return [*items[:place], *[slice(None)] * (rank - consumed), *items[place + 1 :]]
    return [*items, *[slice(None)] * (rank - consumed)]


def is_tensor_node(node: object) -> bool:
    """Whether `node` is a node known to produce one tensor."""
    return isinstance(node, fx.Node) and isinstance(info(node).value, TensorInfo)


@functools.cache
def known_functions() -> dict[str, Function]:
    """Return every function that a graph may call, by the name that the artefact writes."""
    return {function_name(function): function for function in BY_FUNCTION}


def function_name(function: Function) -> str:
    """Return a stable dotted name for a function of the table, e.g. "torch.nn.functional.relu"."""
    module = getattr(function, "__module__", None) or ""
    name = str(getattr(function, "__name__", function))
    if getattr(operator, name, None) is function:
        return f"operator.{name}"
    for prefix, namespace in (("torch.nn.functional", F), ("torch", torch), ("torch.linalg", torch.linalg),
                              ("builtins", builtins), ("math", math)):  # fmt: skip
        for candidate in (name, name.removeprefix("linalg_"), name.lstrip("_"), name.removesuffix("_fn")):
            if getattr(namespace, candidate, None) is function:
                return f"{prefix}.{candidate}"
    for candidate in dir(F):  # functions made by boolean_dispatch carry the name of their implementation
        if getattr(F, candidate) is function:
            return f"torch.nn.functional.{candidate}"
    return f"{module}.{name}"
