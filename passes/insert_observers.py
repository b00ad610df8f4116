"""InsertObservers: observers where 8-bit layers will want numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import fx, nn

from fxcompress.analysis.layers import matching_layers
from fxcompress.analysis.quantization import Anchor, GridGroup, ModeOf, QuantizationPlan, plan_quantization
from fxcompress.errors import OptionError, did_you_mean
from fxcompress.graph import edit, ops
from fxcompress.graph.metadata import Stage, set_info
from fxcompress.graph.regions import regions
from fxcompress.passes.fuse_activation import FuseActivation
from fxcompress.passes.join_conv_bn import join_batch_norms, normed_layers
from fxcompress.pipeline.base import Contract, Note, Pass, PassContext, PassResult, check_choice, data_field
from fxcompress.quant.attention import ObservedAttention
from fxcompress.quant.cpu import cpu_features
from fxcompress.quant.fake_quantize import FakeQuantize, LearnedQuantize
from fxcompress.quant.normed_layers import PLAIN, NormedLayer
from fxcompress.quant.observers import OBSERVERS, ChannelMean, ExternalObserver, Observer
from fxcompress.quant.qconfig import Chooser, ObserverChoice, chooser
from fxcompress.quant.rows import DynamicQuantize
from fxcompress.quant.spec import BITS, DYNAMIC, MODES, STATIC, WEIGHT_ONLY, activation_spec, weight_spec
from fxcompress.quant.unobserved import Unobserved

_FUNCTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.Linear: F.linear,
    nn.Embedding: F.embedding,
}

#: Arguments of these functions that layers keep as attributes.
_GEOMETRY = ("stride", "padding", "dilation", "groups")
_ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _GEOMETRY),
    nn.Linear: (),
    nn.Embedding: ("padding_idx", "scale_grad_by_freq", "sparse"),
}


#: Observers with a range for each channel, which are for weights.
_PER_CHANNEL = ("per-channel", "per-channel-error")


@dataclass(frozen=True, kw_only=True)
class ObserverOptions(Pass):
    """The options that the passes with observers share; they are described at `InsertObservers`."""

    activation: Any = None
    weight: Any = None
    reduced_range: bool | None = None
    ignore: Any = ()
    weight_bits: int = 8
    activation_bits: int = 8
    mode: str = STATIC
    dynamic: Any = ()
    weight_only: Any = ()
    attention: bool | None = None
    qconfig: Any = data_field()

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_choice(name, "mode", self.mode, MODES)
        if self.mode != STATIC and self.activation is not None:
            raise OptionError(f"{name}: with mode={self.mode!r} no values are observed, so leave out activation=")
        if self.mode != STATIC and self.qconfig is not None:
            raise OptionError(f"{name}: a qconfig says for itself what is dynamic, so leave out mode={self.mode!r}")
        for option in ("activation", "weight"):
            given = getattr(self, option)
            if isinstance(given, str) and given not in OBSERVERS:
                raise OptionError(f"{name}: there is no observer {given!r}{did_you_mean(given, OBSERVERS)}")
        if self.activation in _PER_CHANNEL:
            raise OptionError(f"{name}: values have one scale each, so activation={self.activation!r} cannot be")
        for option, bits in (("weight_bits", self.weight_bits), ("activation_bits", self.activation_bits)):
            if not isinstance(bits, int) or bits not in BITS:
                raise OptionError(f"{name}: {option} must be a whole number from {BITS[0]} to {BITS[-1]}, not {bits!r}")
        for option in ("ignore", "dynamic", "weight_only"):
            given = getattr(self, option)
            object.__setattr__(self, option, (given,) if isinstance(given, str) else tuple(given))


@dataclass(frozen=True)
class InsertObservers(ObserverOptions):
    """Put observers on the weights of convolutions and linear layers, and on the values that 8-bit kernels will read.

    1. What becomes 8-bit is decided by `analysis.quantization`; the ledger has the reason for every layer and node that
       stays float.
    2. A layer becomes a function of an explicit weight, `F.conv2d(x, observer(conv1.weight), ...)`, so that observed,
       trained and quantised graphs have one shape and gradients reach the weight. The weight keeps its path.
    3. There is no observer between a layer and the activation or residual add that its kernel computes as well
       (`FuseActivation` marks them); the observer stands behind the last of them.
    4. Values that are joined or moved only (cat, reshape, max pooling, ...) share one observer. Outputs of the model
       read such values before the observer, so that they do not get coarser than they are.
    5. In front of each such layer stands a `ChannelMean`, from which `ConvertObserved` corrects the bias.
    6. Observers return what they are given, so the graph computes what it did before.
    7. Query, key and value of attention whose result an 8-bit layer reads have observers of their own, and
       `ConvertObserved` makes the weights of attention 8-bit as well (`quant.attention`).
    8. Of a linear layer in mode "dynamic" or "weight-only" the weight alone is observed, which takes no data. In front
       of the first kind stands a `DynamicQuantize`, one for all layers that read a value; `ConvertObserved` turns it
       into the measuring and rounding of every row, at every call. Biases are not corrected.

    With `qat`, for training (`Train`, `Distill`) before `ConvertObserved`:

    9. In the places of the observers are fake-quantisers (`quant.fake_quantize`). From the first batch in training mode
       on they round; what they have learned or observed by then stays late in training.
    10. A layer and the batch norm that `FoldBatchNorm` would fold into it are trained as the one layer they will be
       (`quant.normed_layers`). `ConvertObserved` folds them. Batch norms that were folded before are no hindrance.
       Those that a caller's model in training mode keeps in evaluation mode keep their statistics from the start.
    11. What kernels compute as well is found out here, behind the layers so joined.
    12. The first grids are those of `Calibrate`, if it runs before training, or of the first batch, which meets layers
       that round already.

    Args:
        activation: observer of values: "histogram", "minmax", "moving-average" or "percentile"; or an observer class of
            `fxcompress.quant.observers` or of `torch.ao`, or a function that makes one. None: "histogram", or
            "moving-average" where it is followed throughout training (`qat` without `learn_steps`).
        weight: the same for weights, also "per-channel" and "per-channel-error". None: the first of these, or the
            second for less than 8 bits.
        reduced_range: weights in [-64, 64], which sums without saturation on CPUs without VNNI. None: if this machine
            needs it.
        ignore: layers that stay float, as dotted paths or patterns ("features.0", "head.*").
        weight_bits: from 2 to 8. Kernels compute with 8 bits in any case, of which fewer are then used.
        activation_bits: from 2 to 8, for values.
        mode: how layers get their input: "static", on grids that calibration fixes; "dynamic", with a scale and zero
            point for every row (token), measured at every call; "weight-only", in float, so that weights alone are
            8-bit, for layers that wait for memory. The last two are for linear layers, the last one for embeddings as
            well; they leave everything else float and need no calibration.
        dynamic, weight_only: linear layers (and embeddings) in another mode than the rest, as dotted paths or patterns.
            With mode="static" and dynamic="*" convolutions are static and all linear layers dynamic.
        attention: whether attention multiplies bytes where a static layer reads its result. None: where there are
            kernels for that, which is on CPUs.
        qat: whether to put trainable fake-quantisers in the place of plain observers.
        learn_steps: with `qat`, whether steps and offsets are learned as weights are (`LearnedQuantize`), or follow the
            observers.
        freeze_norms, freeze_observers: with `qat`, the share of the training steps after which batch norms keep their
            running statistics, and fake-quantisers their grids; 1 for never.
        correct_bias: whether biases shall make up for what rounding the weights changes on average. Not with `qat`,
            where training does it.
        qconfig: a `QConfig` or `QConfigMapping` of `torch.ao`, in the place of `activation` and `weight`.
    """

    qat: bool = False
    learn_steps: bool = True
    freeze_norms: float = 0.8
    freeze_observers: float = 0.9
    correct_bias: bool = True

    name: ClassVar[str] = "insert-observers"
    produces: ClassVar[Stage | None] = Stage.OBSERVED
    contract: ClassVar[Contract] = Contract.EXACT

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("freeze_norms", "freeze_observers"):
            if not 0 <= getattr(self, option) <= 1:
                raise OptionError(
                    f"InsertObservers: {option} is a share of the training in [0, 1], not {getattr(self, option)!r}"
                )

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Plan, then insert."""
        notes: list[Note] = []
        if self.qat:
            notes += join_batch_norms(graph_module, context.model).notes("not joined")
            notes += FuseActivation().run(graph_module, context).notes
        here = context.target == "cpu" and not cpu_features().vnni
        reduced = here if self.reduced_range is None else self.reduced_range
        choose = chooser(self.qconfig, self._default_choice(reduced))
        ignored = matching_layers(graph_module, self.ignore)

        def accepts(path: str, module: nn.Module) -> str | None:
            if path in ignored:
                return "ignored on request"
            return None if choose(path, module) else "no QConfig for it"

        attention = context.target == "cpu" if self.attention is None else self.attention
        plan = plan_quantization(graph_module, accepts, self._modes(graph_module, choose), attention)
        edits = _Insertion(graph_module, plan, choose, self).run()
        notes += [Note(name, f"float: {reason}") for name, reason in plan.reasons.items()]
        if reduced and any(anchor.mode != WEIGHT_ONLY for anchor in plan.anchors) and self.weight_bits == 8:
            notes.append(Note("target cpu", "weights in 7 bits: without VNNI, sums of products of 8 bits saturate"))
        modified = edits > 0 or bool(normed_layers(graph_module))
        return PassResult(graph_module, modified, edits, tuple(notes))

    def _modes(self, graph_module: fx.GraphModule, choose: Chooser) -> ModeOf:
        """Return the function from path and module of a layer to its mode."""
        named = dict.fromkeys(matching_layers(graph_module, self.dynamic, option="dynamic"), DYNAMIC)
        for path in matching_layers(graph_module, self.weight_only, option="weight_only"):
            named[path] = WEIGHT_ONLY

        def mode_of(path: str, module: nn.Module) -> str:
            choice = choose(path, module)
            can = PLAIN.get(type(module), type(module)) in (nn.Linear, nn.Embedding)
            return named[path] if can and path in named else choice.mode if choice else STATIC

        return mode_of

    def _default_choice(self, reduced: bool) -> ObserverChoice:
        followed = self.qat and not self.learn_steps
        activation = ("moving-average" if followed else "histogram") if self.activation is None else self.activation
        weight = _PER_CHANNEL[self.weight_bits < 8] if self.weight is None else self.weight
        weights, values = weight_spec(self.weight_bits, reduced), activation_spec(self.activation_bits)
        return ObserverChoice(activation, weight, weights, values, self.mode)

    def fake_quantizer(self, observer: Any, **options: Any) -> nn.Module:
        """Return a fake-quantiser that starts with, or follows, an observer; the observer itself without `qat`."""
        if not self.qat or not isinstance(observer, (Observer, ExternalObserver)):
            return cast("nn.Module", observer)
        kind = LearnedQuantize if self.learn_steps else FakeQuantize
        return kind(observer, freeze_at=self.freeze_observers, **options)


class _Insertion:
    """Applies a plan to a graph."""

    def __init__(
        self, graph_module: fx.GraphModule, plan: QuantizationPlan, choose: Chooser, options: InsertObservers
    ) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.plan = plan
        self.choose = choose
        self.options = options
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.container = edit.unique_path(graph_module, "observers")
        self.layers = {anchor.path: graph_module.get_submodule(anchor.path) for anchor in plan.anchors}
        self.weights: dict[str, fx.Node] = {}  # path of a layer -> its observed weight
        self.means: dict[str, ChannelMean] = {}  # path of a layer -> the means of its input
        self.modes = {anchor.path: anchor.mode for anchor in plan.anchors}
        self.rows: dict[fx.Node, fx.Node] = {}  # value -> the same behind its `DynamicQuantize`
        self.paths: dict[nn.Module, str] = {}  # of the observers

    def run(self) -> int:
        """Return how many observers were inserted."""
        for anchor in self.plan.anchors:
            layer = self.layers[anchor.path]
            if not isinstance(layer, NormedLayer):
                self._make_functional(anchor)
            elif layer.quantizer is None:
                layer.quantizer = self._weight_quantizer(anchor.path)
                layer.freeze_norm(min(layer.freeze_at, self.options.freeze_norms))
            if anchor.mode == DYNAMIC:
                self._measure_rows(self.nodes[anchor.node], anchor.path)
        for group in self.plan.groups:
            self._observe(group)
        for name in self.plan.attention:
            self._observe_attention(self.nodes[name])
        quantizers = [layer.quantizer for layer in self.layers.values() if isinstance(layer, NormedLayer)]
        devices = [layer.get_parameter("weight").device for layer in self.layers.values()]
        for module in (*self.paths, *filter(None, quantizers)):
            module.train(self.graph_module.training).to(devices[0])
        return len(self.paths) + len(quantizers)

    def _make_functional(self, anchor: Anchor) -> None:
        node = self.nodes[anchor.node]
        with self.graph.inserting_before(node):
            if anchor.path not in self.weights:
                self.weights[anchor.path] = self._observed_weight(anchor.path)
            value = self._averaged(node.args[0], anchor.path)
        make_functional(self.graph_module, node, value, self.weights[anchor.path])

    def _measure_rows(self, layer: fx.Node, path: str) -> None:
        """Put a `DynamicQuantize` in front of a layer. Layers that read the same value share it."""
        value = layer.args[0]
        assert isinstance(value, fx.Node)  # for the type checker
        if isinstance(ops.submodule(value), DynamicQuantize):
            return
        if value not in self.rows:
            module = DynamicQuantize(self._choice(path).activation_spec, self.options.qat)
            with self.graph.inserting_before(layer):
                self.rows[value] = self._call(f"{value.name}_rows", module, value)
            set_info(self.rows[value], layer=path)
        layer.replace_input_with(value, self.rows[value])

    def _averaged(self, value: Any, path: str) -> Any:
        """The input of a layer, behind its `ChannelMean` if there shall be one."""
        if not self.options.correct_bias or self.options.qat or self.modes[path] != STATIC:
            return value
        if path not in self.means:
            layer: Any = self.layers[path]
            linear = isinstance(layer, nn.Linear)
            channels, axis = (layer.in_features, -1) if linear else (layer.in_channels, 1 - layer.weight.ndim)
            self.means[path] = ChannelMean(channels, axis)
        averaged = self._call(f"{path.replace('.', '_')}_input", self.means[path], value)
        set_info(averaged, layer=path)
        return averaged

    def _observed_weight(self, path: str) -> fx.Node:
        weight = self.graph.get_attr(f"{path}.weight")
        observed = self._call(f"{path.replace('.', '_')}_weight", self._weight_quantizer(path), weight)
        for node in (weight, observed):
            set_info(node, layer=path)
        return observed

    def _weight_quantizer(self, path: str) -> Any:
        """A new observer of the weight of a layer, or the fake-quantiser for it."""
        observer: Any = self._choice(path).weight_observer()
        axis = getattr(observer.spec, "channel_axis", None)
        weight: Any = self.layers[path].weight
        channels = None if axis is None else weight.shape[axis]
        return self.options.fake_quantizer(observer, is_weight=True, channels=channels)

    def _observe(self, group: GridGroup) -> None:
        observer = self.options.fake_quantizer(self._choice(group.layer).activation_observer())
        for name in group.values:
            value = self.nodes[name]
            readers = [reader for reader in value.users if reader.name not in group.outside]
            with self.graph.inserting_after(value):
                observed = self._call(group.name, observer, value)
            for reader in readers:
                reader.replace_input_with(value, observed)

    def _observe_attention(self, node: fx.Node) -> None:
        """Put an `ObservedAttention` in the place of the function."""
        module = ObservedAttention(self.options.qat)
        self.paths[module] = edit.unique_path(self.graph_module, f"{self.container}.{node.name}")
        edit.add_module(self.graph_module, self.paths[module], module)
        node.op, node.target = "call_module", self.paths[module]

    def _choice(self, path: str) -> ObserverChoice:
        choice = self.choose(path, self.layers[path])
        if choice is None:  # the plan holds layers with a choice only
            raise OptionError(f"no observers were chosen for layer {path!r}")
        return choice.in_mode(self.modes[path])

    def _call(self, name: str, observer: nn.Module, value: fx.Node) -> fx.Node:
        """Call an observer, which gets a path at its first call."""
        if observer not in self.paths:
            self.paths[observer] = edit.unique_path(self.graph_module, f"{self.container}.{name}")
            edit.add_module(self.graph_module, self.paths[observer], observer)
        return self.graph.call_module(self.paths[observer], (value,))


def make_functional(graph_module: fx.GraphModule, node: fx.Node, value: Any, weight: fx.Node) -> None:
    """Turn the call of a layer into that of the function, with a value and a weight by nodes."""
    path, layer = str(node.target), cast("Any", ops.submodule(node))
    bias = None
    if getattr(layer, "bias", None) is not None:
        with graph_module.graph.inserting_before(node):
            bias = graph_module.graph.get_attr(f"{path}.bias")
        set_info(bias, layer=path)
    function: ops.Function = _FUNCTIONS[type(layer)]
    bound: dict[str, Any] = {"input": value, "weight": weight}
    if not isinstance(layer, nn.Embedding):
        bound["bias"] = bias
    bound |= {name: getattr(layer, name) for name in _ATTRIBUTES[type(layer)]}
    node.op, node.target = "call_function", function
    node.args, node.kwargs = ops.canonical_arguments(ops.BY_FUNCTION[function], bound)


def observers_of(graph_module: fx.GraphModule) -> dict[str, Any]:
    """Return the observers that a graph and its regions call, by path, with those inside layers joined with norms."""
    graphs = {"": graph_module, **{f"{region.path}.": region.graph_module for region in regions(graph_module)}}
    found: dict[str, Any] = {}
    for prefix, graph in graphs.items():
        for node in graph.graph.nodes:
            module, path = ops.submodule(node), f"{prefix}{node.target}"
            if isinstance(module, NormedLayer):
                module, path = module.quantizer, f"{path}.quantizer"
            if is_observer(module):
                found[path] = module
    return found


def observe_values(graph_module: fx.GraphModule) -> bool:
    """Whether an observer in a graph or its regions watches more than a tensor of the model's own."""
    graphs = (graph_module, *(region.graph_module for region in regions(graph_module)))
    return any(
        is_observer(ops.submodule(node))
        and not isinstance(ops.submodule(node), Unobserved)
        and node.all_input_nodes[0].op != "get_attr"
        for graph in graphs
        for node in graph.graph.nodes
    )


def is_observer(module: object) -> bool:
    """Whether a module is one of those that `InsertObservers` puts in."""
    return isinstance(module, (Observer, ExternalObserver, FakeQuantize, ChannelMean, Unobserved))
