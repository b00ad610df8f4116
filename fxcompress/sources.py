"""What the command line names by a word: models, example inputs, calibration data.

A model is the name of a torchvision model, `file.py:name` of a function or value, or a saved artefact (`*.fxc`).
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxcompress.emit.artifact import load
from fxcompress.errors import InputError, MissingExtraError, OptionError, did_you_mean
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import TensorInfo, info

#: torchvision models that do not take images of 224 x 224.
_SHAPES = {
    "inception_v3": (1, 3, 299, 299), "r3d_18": (1, 3, 8, 112, 112), "mc3_18": (1, 3, 8, 112, 112),
    "r2plus1d_18": (1, 3, 8, 112, 112), "s3d": (1, 3, 14, 224, 224), "mvit_v1_b": (1, 3, 16, 224, 224),
    "mvit_v2_s": (1, 3, 16, 224, 224), "swin3d_t": (1, 3, 8, 224, 224), "swin3d_s": (1, 3, 8, 224, 224),
    "swin3d_b": (1, 3, 8, 224, 224),
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model in evaluation mode, inputs that it takes, its name, and remarks that the user has to see."""

    name: str
    model: nn.Module
    example_inputs: ExampleInputs
    remarks: tuple[str, ...] = ()


def find_model(
    text: str, shapes: Sequence[str] = (), weights: str | None = None, num_classes: int | None = None, seed: int = 0
) -> Source:
    """Return the model that `text` names.

    Args:
        text: a torchvision model, `file.py:function` (which returns a module, or a module and example inputs), or the
            path of an artefact.
        shapes: shapes of the inputs, as "1,3,224,224"; needed where the model does not say.
        weights: for torchvision models: "default" (downloaded), or the path of a `state_dict`; else they are random.
        num_classes: for torchvision models: outputs of the classifier.
        seed: for random weights and inputs.

    Raises:
        InputError, OptionError: nothing has that name, or it cannot be used; the message says what can.
        MissingExtraError: torchvision is not installed.
    """
    torch.manual_seed(seed)
    inputs = ExampleInputs(tuple(torch.randn(_shape(shape)) for shape in shapes)) if shapes else None
    if text.endswith(".fxc"):
        module = load(text)
        return Source(Path(text).name, module, inputs or _recorded_inputs(module))
    if ".py:" in text:
        model, own_inputs = _from_file(text)
        inputs = inputs or own_inputs
        if inputs is None:
            raise InputError(f"{text} is a model without example inputs; return both, or give --input-shape")
        return Source(type(model).__name__, model.eval(), inputs)
    return _from_torchvision(text, inputs, weights, num_classes)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise OptionError(f"an input shape is written as sizes with commas, such as 1,3,224,224, not {text!r}")
    return shape


def _recorded_inputs(module: fx.GraphModule) -> ExampleInputs:
    """Return random inputs of the shapes that a saved graph was compiled for."""
    values = [info(node).value for node in module.graph.nodes if node.op == "placeholder"]
    if not values or not all(isinstance(value, TensorInfo) for value in values):
        raise InputError("the artefact does not say which inputs it takes; give --input-shape")
    return ExampleInputs(tuple(_random(value.shape, value.dtype) for value in values))


def _random(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(tuple(shape), dtype=dtype)
    return torch.zeros(tuple(shape), dtype=dtype)


# Files of the user


def _from_file(text: str) -> tuple[nn.Module, ExampleInputs | None]:
    made = named_value(text)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InputError(f"{text} returned a {type(model).__name__}; it must be or return a torch.nn.Module, or a "
                         f"tuple (module, example_inputs)")  # fmt: skip
    return model, None if inputs is None else ExampleInputs.of(inputs)


def named_value(text: str) -> Any:
    """Return the value that `file.py:name` names, or what the function of that name returns without arguments.

    Raises:
        InputError: there is no such file or name, or one of them raised.
    """
    file, _, name = text.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise InputError(f"{text}: there is no file {str(path)!r}")
    module = _import_file(path)
    if not hasattr(module, name):
        known = [word for word, value in vars(module).items() if not isinstance(value, type(sys)) and word[0] != "_"]
        raise InputError(f"{path.name} has no function or value {name!r}{did_you_mean(name, known)}")
    value = getattr(module, name)
    if not callable(value) or isinstance(value, nn.Module):
        return value
    try:
        return value()
    except Exception as error:
        raise InputError(f"{text} raised {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> Any:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise InputError(f"{str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault(path.stem, module)  # so that what it defines can be pickled by data loaders
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # so that it can import its neighbours, as a script can
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"importing {path.name} raised {type(error).__name__}: {error}") from error
    return module


# torchvision


def _from_torchvision(
    name: str, inputs: ExampleInputs | None, weights: str | None, num_classes: int | None
) -> Source:  # fmt: skip
    try:
        from torchvision import models
    except ImportError:
        raise MissingExtraError("torchvision", "models", f"the model {name!r}") from None
    if name not in models.list_models():
        raise InputError(
            f"{name!r} is no torchvision model, no artefact (*.fxc) and no file.py:function"
            f"{_near(name, models.list_models())}"
        )
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if weights != "default" and name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    if weights != "default" and "weights_backbone" in _parameters(models.get_model_builder(name)):
        options["weights_backbone"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision warns about its own defaults
        model = models.get_model(name, weights="DEFAULT" if weights == "default" else None, **options)
    remarks: tuple[str, ...] = ()
    if weights is None:
        remarks = (f"{name} has random weights: its accuracy means nothing. Give --weights default, or a file",)
    elif weights != "default":
        _read_weights(model, Path(weights))
    shape = _SHAPES.get(name, (1, 3, 224, 224))
    return Source(name, model.eval(), inputs or ExampleInputs((torch.randn(shape),)), remarks)


def _near(name: str, known: list[str]) -> str:
    suggestion = did_you_mean(name, known)
    return suggestion if "did you mean" in suggestion else ""  # the list of all of them would fill a screen


def _parameters(builder: Any) -> set[str]:
    import inspect

    return set(inspect.signature(builder).parameters)


def _read_weights(model: nn.Module, path: Path) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{str(path)!r} holds no weights for this model: {type(error).__name__}: {reason}") from error


# Data


def find_calibration(text: str, inputs: ExampleInputs, batches: int = 4, batch_size: int = 8) -> Any:
    """Return calibration data: what `file.py:name` names, or for "random" noise of the shape of the inputs.

    Noise makes a pipeline run, and its scales fit no real data.
    """
    if text != "random":
        return named_value(text)
    noise = [inputs.map(lambda tensor: _random((batch_size, *tensor.shape[1:]), tensor.dtype)) for _ in range(batches)]
    return [batch.args if not batch.kwargs else batch.kwargs for batch in noise]
