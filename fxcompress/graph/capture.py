"""Capture: from a model to a `torch.fx` graph with module-level nodes, shapes and notes.

The caller's model is copied first and never touched.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune

from fxcompress.errors import CaptureError, InputError
from fxcompress.graph import batch, compare, edit, opaque, ops, regions, views
from fxcompress.graph import modules as own
from fxcompress.graph.degrade import first_line, keep_culprit, place_of_error, reason_of
from fxcompress.graph.examples import DataDependentError, ExampleValues
from fxcompress.graph.inputs import ExampleInputs, check_device
from fxcompress.graph.metadata import GraphInfo, graph_info, set_info
from fxcompress.graph.shapes import evaluation, propagate
from fxcompress.graph.specialise import notes as specialisation_notes
from fxcompress.graph.tracer import (
    AliasError,
    ConstantWrittenError,
    Kept,
    StateWrittenError,
    TablesComputed,
    Tracer,
    UnregisteredModuleError,
    drop_questions,
    replaced_buffers,
)


def trace(model: nn.Module, example_inputs: object, *, training: bool | None = None) -> fx.GraphModule:
    """Trace a model into a graph, with shape, dtype and device of every value.

    Layers of torch.nn stay whole (`call_module`); everything else is traced into. A graph is for inputs of the rank,
    dtypes and device of the example; where the code looks at sizes, the example answers, and a note says so. What
    cannot be traced is kept as one opaque node, or stays Python around the graphs inside it (`graph.regions`).
    Transformer layers are captured without their fast path, which leaves out padded positions. Masks that
    `torch.nn.utils.prune` and parametrizations left on the model are made permanent in the copy; masks are remembered.
    A `torch.fx.GraphModule` keeps its graph.

    Args:
        model: any module; it is copied, never modified.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        training: the mode to capture in, which fixes branches on `self.training`; None: the mode the model is in.

    Raises:
        CaptureError: control flow depends on data, and the message names file and line; or parameters of lazy layers
            have no shape yet.
        InputError: the inputs do not fit the model, or its forward raises on them.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
    inputs = ExampleInputs.of(example_inputs)
    _require_shapes(model)
    check_device(inputs, model)
    duplicate = _copy(model)
    if training is not None:
        duplicate.train(training)
    if isinstance(duplicate, fx.GraphModule):
        _drop_unused_modules(duplicate)
        regions.refresh(duplicate, inputs)
        _propagate(duplicate, inputs)
        return duplicate
    return _capture(duplicate, inputs)


def _capture(model: nn.Module, inputs: ExampleInputs) -> fx.GraphModule:
    """Trace a copy of a model, and what can be traced inside the parts that stay Python."""
    is_layer = _is_leaf(model)
    notes: list[str] = []
    masks = _make_masks_permanent(model, notes)
    _make_parametrizations_permanent(model, notes)
    _replace_stochastic_depth(model)
    _note_hooks(model, notes)
    if model.training:
        notes.append("captured in training mode: branches on self.training are fixed as they are in training")
    try:
        graph_module = _layer_alone(model, inputs) if is_layer else _graph_of(model, inputs)
    except CaptureError as error:
        graph_module = regions.calling(model, inputs, regions.ROOT, reason_of(error.__cause__ or error))
        masks = {f"{regions.ROOT}.{path}": mask for path, mask in masks.items()}
        _find_regions(graph_module, inputs)
        if not graph_info(graph_module).regions:
            raise
    known = graph_info(graph_module)
    known.masks = {f"layer.{path}": mask for path, mask in masks.items()} if is_layer else masks
    known.notes = notes + known.notes
    first = next((value for value in (*inputs.args, *inputs.kwargs.values()) if isinstance(value, torch.Tensor)), None)
    regions.settle(graph_module, max(int(first.shape[0]), 1) if first is not None and first.ndim else 1)
    return graph_module


def _layer_alone(layer: nn.Module, inputs: ExampleInputs) -> fx.GraphModule:
    _fixed_inputs(layer, inputs)  # for its check
    graph_module = regions.calling(layer, inputs, "layer")
    propagate(graph_module, inputs)
    return graph_module


def _graph_of(model: nn.Module, inputs: ExampleInputs) -> fx.GraphModule:
    """Return the graph of a module, its opaque parts looked into.

    Raises:
        CaptureError: the module's own forward cannot be traced.
    """
    graph_module = _trace_module(model, inputs)
    _drop_unused_modules(graph_module)
    _find_regions(graph_module, inputs)
    _propagate(graph_module, inputs)
    return graph_module


def _find_regions(graph_module: fx.GraphModule, inputs: ExampleInputs) -> None:
    regions.capture(graph_module, inputs, _graph_of, _is_leaf)


def _propagate(graph_module: fx.GraphModule, inputs: ExampleInputs) -> None:
    try:
        propagate(graph_module, inputs)
    except InputError:
        if not opaque.mark_data_dependent(graph_module, inputs):
            raise
        opaque.record(graph_module, inputs)
        propagate(graph_module, inputs)


def _require_shapes(model: nn.Module) -> None:
    lazy = [
        f"{path or 'the model itself'} ({type(module).__name__})"
        for path, module in model.named_modules()
        if any(is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values()))
    ]
    if lazy:
        more = f" and {len(lazy) - 3} more" if len(lazy) > 3 else ""
        raise CaptureError(
            f"the parameters of {', '.join(lazy[:3])}{more} have no shape yet: they get it at the first call. "
            f"Run the model once on inputs, model(*example_inputs), before compiling it (and load trained weights)"
        )


def _copy(model: nn.Module) -> nn.Module:
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    ]  # the masked weights of torch.nn.utils.prune are such: deepcopy refuses them
    try:
        return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    except Exception as error:
        raise CaptureError(
            f"the model {type(model).__name__} cannot be copied ({error}); tensors that are results of a computation "
            f"and stored on the model are the usual cause: register them as buffers"
        ) from error


def _trace_module(model: nn.Module, inputs: ExampleInputs) -> fx.GraphModule:
    notes: list[str] = []
    signature, arguments, concrete = _fixed_inputs(model, inputs)
    given = set(arguments)
    kept = Kept()
    tracer, graph = _trace_around(model, inputs, arguments, concrete, kept)
    notes += _follow_batch(model, arguments, concrete, kept, tracer, graph)
    notes += [f"{path}: computed by the forward, fixed at its value for the example" for path in sorted(kept.tables)]
    drop_questions(graph)
    _settle_fixed_inputs(graph, concrete, given, signature, notes)
    graph_module = fx.GraphModule(model, graph, class_name=type(model).__name__)
    for path, module in graph_module.named_modules():
        module.training = model.get_submodule(path).training
    graph_module.meta["fxcompress"] = GraphInfo(notes=notes)
    for node in graph.nodes:
        set_info(node, layer=_layer_of(node))
    return graph_module


def _trace_around(
    model: nn.Module, inputs: ExampleInputs, arguments: dict[str, Any], concrete: dict[str, Any], kept: Kept
) -> tuple[Tracer, fx.Graph]:
    """Trace a model; what cannot be traced into is kept as one node (and in `kept`), and the rest is traced anew.

    Raises:
        CaptureError: the model's own forward cannot be traced.
        InputError: it fails on the example inputs.
    """
    while True:
        tracer = Tracer(model, arguments, _is_leaf, kept)
        try:
            return tracer, _run(tracer, model, concrete)
        except Exception as error:
            if isinstance(error, ConstantWrittenError) and not kept.factories:
                kept.factories = True
                continue
            if isinstance(error, TablesComputed):
                for path, table in error.tables.items():
                    kept.tables[path] = _set_buffer(model, path, table)
                continue
            if not kept.modules and not kept.functions:
                _require_forward(model, inputs)
            if isinstance(error, StateWrittenError):  # a table that is replaced again is a state
                full = f"{error.path}.{error.name}" if error.path else error.name
                if full in kept.tables:
                    _set_buffer(model, full, kept.tables.pop(full))
            if isinstance(error, (AliasError, StateWrittenError)) and error.path not in ("", *kept.modules):
                kept.modules[error.path] = str(error)
                continue
            if not keep_culprit(error, model, kept):
                raise _untraceable(model, error) from error


def _set_buffer(model: nn.Module, path: str, value: torch.Tensor | None) -> torch.Tensor | None:
    """Put a value in the place of a buffer, and return the old one."""
    holder, name = edit.owner(model, path)
    old = holder._buffers[name]
    holder._buffers[name] = value
    return old


def _run(tracer: Tracer, model: nn.Module, concrete: dict[str, Any]) -> fx.Graph:
    with _state_restored(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # code warns about proxies that it takes for tensors
        graph = tracer.run(concrete)
        _require_state_kept(tracer, model)
        odd = views.unfollowed(graph, tracer.values)
        if odd is not None:
            raise AliasError(_layer_of(odd[0]), odd[1])
        return graph


def _require_state_kept(tracer: Tracer, model: nn.Module) -> None:
    """Refuse forwards that put a new value in the place of a buffer.

    Raises:
        TablesComputed: every such value depends on sizes only, and has not been computed before.
        StateWrittenError: the others.
    """
    replaced = replaced_buffers(model)
    tables: dict[str, torch.Tensor] = {}
    for path, node in replaced.items():
        holder, _, name = path.rpartition(".")
        try:
            value = None if path in tracer.kept.tables else tracer.values.concrete(node)
        except DataDependentError:
            value = None
        if not isinstance(value, torch.Tensor):
            raise StateWrittenError(holder, name)
        tables[path] = value.detach()
    if tables:
        raise TablesComputed(tables)


def _follow_batch(
    model: nn.Module, arguments: dict[str, Any], concrete: dict[str, Any], kept: Kept, tracer: Tracer, graph: fx.Graph
) -> list[str]:
    """Let numbers that came from the batch of the example follow the batch. Returns what was specialised all the same.

    Only where one of them is another one at another batch size is the model traced there.
    """
    items = tracer.specialisations
    example = batch.Batch.of(arguments) if items else None
    if example is None:
        return specialisation_notes(tracer.values, items)
    affected = batch.depending(items, ExampleValues(model, example.arguments))
    lines = specialisation_notes(tracer.values, [item for item in items if item not in affected])
    if not affected:
        return lines
    try:
        other = _run(Tracer(model, example.arguments, _is_leaf, kept), model, concrete)
        batch.follow(model, graph, other, example)
    except Exception as error:
        limit = f", so that the graph is for the batch size {example.size} only ({first_line(error)})"
        lines += [f"{line}{limit}" for line in specialisation_notes(tracer.values, affected)]
    return lines


@contextmanager
def _state_restored(model: nn.Module) -> Iterator[None]:
    """Give every module its attributes back: a forward may keep values, which are proxies while it is traced."""
    tables = ("_parameters", "_buffers", "_modules")
    states = [
        (module, dict(vars(module)), {name: dict(vars(module)[name]) for name in tables}) for module in model.modules()
    ]
    traced = False
    try:
        yield
        traced = True
    finally:
        for module, state, contents in states:
            for name in [name for name in vars(module) if name not in state]:
                if not (traced and module is model and name.startswith("_tensor_constant")):  # fx's own
                    delattr(module, name)
            vars(module).update(state)
            for name, content in contents.items():
                vars(module)[name].clear()
                vars(module)[name].update(content)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module is a layer of the table, with the forward that torch.nn gave it, or of a class kept whole."""
    if type(module) in ops.WHOLE:
        return True
    for base in type(module).__mro__:
        if base in ops.MODULE_KINDS or base in ops.STATELESS_MODULES or base in ops.PADDING_MODULES:
            return all(
                getattr(type(module), name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward")
            )
        if base.__module__.startswith("torch.nn.modules") and base is not nn.Module and not _is_container(base):
            return getattr(type(module), "forward", None) is getattr(base, "forward", None)
    # Kernels and observers of our own stay whole when a compiled module is traced as part of another model.
    return type(module).__module__.startswith(("fxcompress.quant", "fxcompress.emit", "fxcompress.graph.modules"))


def _is_container(base: type[nn.Module]) -> bool:
    return base.__module__.endswith((".container", ".transformer")) or base is nn.Identity


def _make_masks_permanent(model: nn.Module, notes: list[str]) -> dict[str, torch.Tensor]:
    """Apply what torch.nn.utils.prune left on the modules, and return its masks by parameter path."""
    masks: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                name = hook._tensor_name
                parameter = f"{path}.{name}" if path else name
                masks[parameter] = module.get_buffer(f"{name}_mask").bool()
                prune.remove(module, name)
                notes.append(f"{parameter}: mask of torch.nn.utils.prune applied and remembered")
    return masks


def _make_parametrizations_permanent(model: nn.Module, notes: list[str]) -> None:
    for path, module in list(model.named_modules()):
        if parametrize.is_parametrized(module) and isinstance(module.parametrizations, nn.ModuleDict):
            # A copy shares the class that torch made for the original, and removal would take the property off both.
            shared = type(module)
            module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
            for name in list(module.parametrizations):
                with evaluation(model):
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                notes.append(f"{path}.{name}: parametrization made permanent")


def _replace_stochastic_depth(model: nn.Module) -> None:
    """Replace torchvision's StochasticDepth, whose forward fixes the mode at tracing, by a layer that follows it."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "StochasticDepth" and type(child).__module__.startswith("torchvision."):
                layer = own.StochasticDepth(float(child.p), str(child.mode))  # type: ignore[arg-type]
                module.add_module(name, layer.train(child.training))


def _note_hooks(model: nn.Module, notes: list[str]) -> None:
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            notes.append(f"{path or 'the model'}: hooks are not part of the captured graph")
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
                hooks.clear()


def _fixed_inputs(model: nn.Module, inputs: ExampleInputs) -> tuple[inspect.Signature, dict[str, Any], dict[str, Any]]:
    """Return the signature of forward, the inputs given, and those that tracing fixes (no tensor, or not given).

    Inputs that forward takes as *args and **kwargs are there under the names that fx gives to their placeholders.
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise InputError(f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}") from error
    concrete: dict[str, Any] = {}
    arguments = dict(bound.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            arguments["*" * (1 + (parameter.kind is parameter.VAR_KEYWORD)) + name] = bound.arguments.get(
                name, {} if parameter.kind is parameter.VAR_KEYWORD else ()
            )
            continue
        value = bound.arguments.get(name, parameter.default)
        if not ExampleInputs((value,)).tensors():
            concrete[name] = value
    return signature, arguments, concrete


def _settle_fixed_inputs(
    graph: fx.Graph, concrete: dict[str, Any], given: set[str], signature: inspect.Signature, notes: list[str]
) -> None:
    """Remove the checks that fx adds for fixed inputs. Those that were given keep their place, with their value as
    default; the others, and the placeholders that fx made for parts of a value, go."""
    for node in list(graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "") in ("_assert", "_assert_is_none"):
            tested = node.args[0]
            graph.erase_node(node)
            if isinstance(tested, fx.Node) and tested.op == "call_function" and not tested.users:
                graph.erase_node(tested)
    kept: set[str] = set()
    later_is_required = False
    for node in reversed([node for node in graph.nodes if node.op == "placeholder"]):
        name = str(node.target).rpartition("_")[0]
        if str(node.target) in signature.parameters or name not in concrete or node.users:
            later_is_required = later_is_required or not (node.args or str(node.target).startswith("*"))
        elif name not in given or name in kept:
            graph.erase_node(node)
        else:
            kept.add(name)
            node.target, node.args = name, () if later_is_required else (concrete[name],)
            notes.append(f"input {name!r} is fixed at {concrete[name]!r}, the value of the example")


def _drop_unused_modules(graph_module: fx.GraphModule) -> None:
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def _layer_of(node: fx.Node) -> str:
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack and isinstance(next(reversed(stack.values())), tuple) else ""


def _require_forward(model: nn.Module, inputs: ExampleInputs) -> None:
    """Tell a forward that cannot be traced from one that fails on its own: raise `InputError` for the latter."""
    try:
        with evaluation(model), compare.buffers_kept(model), torch.no_grad():
            inputs.call(model)
    except Exception as error:
        raise InputError(
            f"the forward of {type(model).__name__} raises on the example inputs ({inputs.describe()}) "
            f"at {place_of_error(error)}: {type(error).__name__}: {error}"
        ) from error


def _untraceable(model: nn.Module, error: Exception) -> CaptureError:
    advice = "Move it into a submodule or a function of its own, which can stay as it is."
    if isinstance(error, UnregisteredModuleError):
        advice = "Make it in __init__, and as a submodule, so that its weights are the model's."
    elif isinstance(error, AliasError):
        return CaptureError(
            f"{type(model).__name__} cannot be traced: {error}. Write it without the in-place operation"
        )
    elif isinstance(error, DataDependentError):
        advice = (
            "Control flow there depends on values that are known only when the model runs. Replace it by torch.where, "
            "or move it into a submodule or a function of its own."
        )
    return CaptureError(f"{type(model).__name__} cannot be traced: {reason_of(error)}. {advice}")
