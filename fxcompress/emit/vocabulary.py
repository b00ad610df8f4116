"""What a saved file may name: functions, tensor methods and module classes.

A file holds names only. What a name stands for is decided here, by tables that the file cannot change, so that reading
a file never imports, evaluates or unpickles anything. A caller may add functions and modules of their own.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxcompress.emit import cpu_int8
from fxcompress.emit.cuda import layers as cuda_layers
from fxcompress.emit.cuda import pointwise as cuda_pointwise
from fxcompress.errors import ArtifactError
from fxcompress.graph import modules as graph_modules
from fxcompress.graph import ops

Function = Callable[..., Any]


@runtime_checkable
class Configurable(Protocol):
    """A module class that can be rebuilt from a file.

    `config()` returns its constructor arguments as plain Python values; `from_config(config)` is a class method that
    builds an equal module. Parameters and buffers are filled in afterwards by the reader.
    """

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments, as numbers, strings, None, and tuples, lists and dicts of these."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> nn.Module:
        """Return the module that `config()` described."""


#: The constructor arguments of the classes of torch.nn, each of which the module keeps as an attribute. The names of a
#: row share the arguments in its text; {n} stands for 1, 2 and 3.
_ARGUMENTS = {
    "Conv{n}d": "in_channels out_channels kernel_size stride padding dilation groups bias padding_mode",
    "ConvTranspose{n}d": "in_channels out_channels kernel_size stride padding output_padding groups bias dilation "
    "padding_mode",
    "Linear": "in_features out_features bias",
    "BatchNorm{n}d InstanceNorm{n}d SyncBatchNorm": "num_features eps momentum affine track_running_stats",
    "GroupNorm": "num_groups num_channels eps affine",
    "LayerNorm": "normalized_shape eps elementwise_affine bias",
    "RMSNorm": "normalized_shape eps elementwise_affine",
    "LocalResponseNorm": "size alpha beta k",
    "PReLU": "num_parameters",
    "Embedding": "num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq sparse",
    "Dropout Dropout{n}d AlphaDropout FeatureAlphaDropout": "p inplace",
    "RReLU": "lower upper inplace",
    "MultiheadAttention": "embed_dim num_heads dropout bias add_bias_kv add_zero_attn kdim vdim batch_first",
    "RNN": "input_size hidden_size num_layers nonlinearity bias batch_first dropout bidirectional",
    "GRU": "input_size hidden_size num_layers bias batch_first dropout bidirectional",
    "LSTM": "input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size",
    "ReLU ReLU6 Hardswish Hardsigmoid SiLU Mish SELU": "inplace",
    "Sigmoid Tanh Softsign LogSigmoid Identity": "",
    "Hardtanh": "min_val max_val inplace",
    "GELU": "approximate",
    "LeakyReLU": "negative_slope inplace",
    "ELU CELU": "alpha inplace",
    "Softplus": "beta threshold",
    "Threshold": "threshold value inplace",
    "Softmax LogSoftmax": "dim",
    "Flatten": "start_dim end_dim",
    "Unflatten": "dim unflattened_size",
    "PixelShuffle": "upscale_factor",
    "GLU": "dim",
    "Unfold": "kernel_size dilation padding stride",
    "Fold": "output_size kernel_size dilation padding stride",
    "PixelUnshuffle": "downscale_factor",
    "ChannelShuffle": "groups",
    "Upsample": "size scale_factor mode align_corners recompute_scale_factor",
    "UpsamplingNearest2d UpsamplingBilinear2d": "size scale_factor",
    "MaxPool{n}d": "kernel_size stride padding dilation return_indices ceil_mode",
    "AvgPool1d": "kernel_size stride padding ceil_mode count_include_pad",
    "AvgPool2d AvgPool3d": "kernel_size stride padding ceil_mode count_include_pad divisor_override",
    "AdaptiveAvgPool{n}d": "output_size",
    "AdaptiveMaxPool{n}d": "output_size return_indices",
    "ZeroPad{n}d ReflectionPad{n}d ReplicationPad{n}d CircularPad{n}d": "padding",
    "ConstantPad{n}d": "padding value",
}

#: Functions and methods that no pass knows, so that nothing happens to them, and that a model may call all the same.
#: All are pure functions of tensors and numbers: none takes a callable, opens a file or writes into its arguments.
_MORE_FUNCTIONS: dict[Any, str] = {
    torch: "acos acosh all allclose angle any argmin argsort asin asinh atan atan2 atanh atleast_1d atleast_2d "
    "atleast_3d baddbmm bincount block_diag broadcast_tensors bucketize cartesian_prod cdist clone complex conj "
    "copysign cosh count_nonzero cross cummax cummin cumprod deg2rad diag diag_embed diagonal diff dist dot dstack "
    "equal erfc erfinv exp2 eye fmax fmin fmod frac full full_like gather ger heaviside histc hstack hypot "
    "imag index_add index_copy index_fill inner isclose isfinite isinf kthvalue lgamma linspace log10 log2 logaddexp "
    "logcumsumexp logical_and logical_or logical_xor logit logspace logsumexp masked_scatter masked_select max median "
    "meshgrid min mm mode moveaxis movedim multinomial mv nanmean nanmedian nansum nonzero numel outer polar prod "
    "quantile rad2deg rand rand_like randint randn randn_like randperm real renorm repeat_interleave rot90 scatter "
    "scatter_add searchsorted sgn signbit sinc sinh softmax sort std_mean swapaxes swapdims t take take_along_dim tan "
    "tensor_split tensordot tile topk trace tril tril_indices triu triu_indices trunc unique vander "
    "var_mean vdot view_as_complex view_as_real vsplit vstack xlogy addmm addmv addbmm addr addcdiv bitwise_and "
    "bitwise_not bitwise_or bitwise_xor conv_tbc instance_norm layer_norm group_norm batch_norm rms_norm",
    nn.functional: "affine_grid bilinear cosine_similarity embedding_bag fold glu grid_sample gumbel_softmax "
    "hardshrink instance_norm local_response_norm lp_pool1d lp_pool2d max_unpool1d max_unpool2d max_unpool3d one_hot "
    "pairwise_distance pdist rrelu softmin softshrink tanhshrink unfold",
    operator: "and_ invert is_ is_not lshift not_ or_ pos rshift truth xor",
    math: "ceil exp floor gcd isqrt log log2 pow prod",
    builtins: "bool len max min round slice sum tuple",
}
_MORE_METHODS = (  # a text, as the rows above
    "all any argmin argsort bitwise_and bitwise_not bitwise_or byte cpu cross cummax cummin cumprod diagonal diff dot "
    "element_size expm1 flip fmod gather index_add index_copy index_fill is_contiguous is_floating_point "
    "isfinite isinf kthvalue log10 log2 logical_and logical_or logical_xor logsumexp masked_scatter masked_select max "
    "median min mm movedim moveaxis mv ndimension new_full new_tensor nonzero norm numel permute prod "
    "quantile repeat_interleave reshape reshape_as rot90 scatter scatter_add short sinh sort stride t take "
    "take_along_dim tan tensor_split tile topk tril triu trunc unfold unique view_as"
)

#: Arguments that a module does not keep as an attribute of that name.
_DERIVED: dict[tuple[type[nn.Module], str], Callable[[Any], Any]] = {
    (nn.MultiheadAttention, "bias"): lambda module: module.in_proj_bias is not None,
    (nn.MultiheadAttention, "add_bias_kv"): lambda module: module.bias_k is not None,
    **{(rnn, "bias"): lambda module: bool(module.bias) for rnn in (nn.RNN, nn.GRU, nn.LSTM)},
}

#: More layers than this in one recurrent module are taken for an attack on the memory of the reader.
_MOST_LAYERS = 1024


def _class_names(row: str) -> list[str]:
    return [name.format(n=n) for name in row.split() for n in (range(1, 4) if "{n}" in name else (0,))]


_TORCH_MODULES: dict[type[nn.Module], tuple[str, ...]] = {
    getattr(nn, name): tuple(arguments.split()) for row, arguments in _ARGUMENTS.items() for name in _class_names(row)
}


@dataclass(frozen=True)
class Vocabulary:
    """The names that a file may use, and what they stand for.

    functions: callables of `call_function` nodes, by name.
    methods: tensor methods of `call_method` nodes.
    modules: module classes with `config` and `from_config`, by name; classes of torch.nn are known beside them.
    names: the names of the functions, by `id`.
    """

    functions: dict[str, Function]
    methods: frozenset[str]
    modules: dict[str, type[nn.Module]]
    names: dict[int, str] = field(repr=False)

    @classmethod
    def of(cls, functions: Mapping[str, Function] | None, modules: Mapping[str, type[nn.Module]] | None) -> Vocabulary:
        """Return the names known to fxcompress and those that the caller adds.

        Raises:
            ArtifactError: a name is taken already, or a class cannot be rebuilt.
        """
        known_functions, known_modules = _known_functions(), _own_modules()
        for name, function in (functions or {}).items():
            if name in known_functions or not callable(function):
                raise ArtifactError(f"functions: {name!r} is a name of fxcompress's own or not callable; rename it")
            known_functions[name] = function
        for name, module in (modules or {}).items():
            if name in known_modules or not issubclass(module, Configurable):
                raise ArtifactError(
                    f"modules: {name!r} is a name of fxcompress's own, or its class lacks config() and from_config()"
                )
            known_modules[name] = module
        names = {id(function): name for name, function in known_functions.items()}
        methods = frozenset((*ops.METHODS, *ops.BY_METHOD, *_MORE_METHODS.split()))
        return cls(known_functions, methods, known_modules, names)

    def function_name(self, function: Function, where: str) -> str:
        """Return the name of a function; `where` says in an error which node calls it."""
        name = self.names.get(id(function))
        if name is None:
            shown = getattr(function, "__qualname__", None) or str(function)
            raise ArtifactError(
                f"{where} calls {getattr(function, '__module__', None) or 'an unknown module'}.{shown}, which is not "
                f"in the list of what a file may call; name it to save and load: functions={{'my_name': {shown}}}"
            )
        return name

    def function(self, name: object, where: str) -> Function:
        """Return the function of a name in a file."""
        if not isinstance(name, str) or name not in self.functions:
            raise ArtifactError(
                f"{where} calls {_shorten(name)}, which this version of fxcompress does not allow in a file; "
                f"a function of your own is given to load by its name: functions={{...}}"
            )
        return self.functions[name]

    def describe_module(self, module: nn.Module, path: str) -> dict[str, Any]:
        """Return `{"type": name, "config": constructor arguments}` of a module that is called by the graph."""
        arguments = _TORCH_MODULES.get(type(module))
        if arguments is not None:
            return {
                "type": type(module).__name__,
                "config": {name: _argument(module, name) for name in arguments},
            }
        for name, known in self.modules.items():
            if type(module) is known:
                return {"type": name, "config": cast(Configurable, module).config()}
        raise ArtifactError(
            f"layer {path!r} is a {type(module).__module__}.{type(module).__qualname__}, which a file cannot hold: it "
            f"could only be rebuilt by running its own code. Give its class methods config() and from_config() and "
            f"name it to save and load: modules={{'{type(module).__name__}': ...}}"
        )

    def build_module(self, type_name: object, config: object, path: str) -> nn.Module:
        """Build the module that `describe_module` described; its tensors hold nothing yet."""
        if not isinstance(type_name, str) or not isinstance(config, dict):
            raise ArtifactError(f"layer {path!r} is not described as it should be")
        known = getattr(nn, type_name, None) if type_name.isidentifier() else None
        if known in _TORCH_MODULES:
            if config.keys() != set(_TORCH_MODULES[known]):
                raise ArtifactError(f"layer {path!r} ({type_name}) has arguments {_shorten(sorted(config, key=str))}")
            _check_sizes(config, path)
            if config.get("num_layers", 0) > _MOST_LAYERS:
                raise ArtifactError(f"layer {path!r} ({type_name}) has {config['num_layers']} layers")
            with _WithoutData():
                return cast(nn.Module, known(**config))
        if type_name not in self.modules:
            raise ArtifactError(
                f"layer {path!r} is of type {_shorten(type_name)}, which this version of fxcompress does not allow in "
                f"a file; a class of your own is given to load by its name: modules={{...}}"
            )
        if type_name in _own_modules():
            _check_sizes(config, path)
        with _WithoutData():
            return cast(Any, self.modules[type_name]).from_config(config)  # type: ignore[no-any-return]


class _WithoutData(TorchFunctionMode):
    """While a layer is built, tensors made by their size alone get no memory: the file may ask for any size."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _MADE_BY_SIZE and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


_MADE_BY_SIZE = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.eye}


def _check_sizes(config: dict[str, Any], path: str) -> None:
    """Refuse a stride of 0 and the like: some kernels divide by it, and take the whole process with them."""
    for name, smallest in _SMALLEST.items():
        value = config.get(name)
        for size in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(size, (int, float)) and size < smallest:
                raise ArtifactError(f"layer {path!r} has {name}={value!r}")


_SMALLEST = {"kernel_size": 1, "stride": 1, "dilation": 1, "groups": 1, "padding": 0, "output_padding": 0}


def _argument(module: nn.Module, name: str) -> Any:
    derived = _DERIVED.get((type(module), name))
    if derived is not None:
        return derived(module)
    value = getattr(module, name)
    if name == "bias" and not isinstance(value, bool):
        return value is not None
    return value


def _known_functions() -> dict[str, Function]:
    found: dict[str, Function] = {}
    for namespace, row in _MORE_FUNCTIONS.items():
        for name in row.split():
            if hasattr(namespace, name):  # a few are missing in some versions of torch
                found[f"{namespace.__name__.removeprefix('_')}.{name}"] = getattr(namespace, name)
    return {**found, **ops.known_functions()}


def _own_modules() -> dict[str, type[nn.Module]]:
    return {**graph_modules.MODULES, **cpu_int8.MODULES, **cuda_layers.MODULES, **cuda_pointwise.MODULES}


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
