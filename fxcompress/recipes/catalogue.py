"""The recipes themselves: a name, one sentence, and a pipeline as text.

    recipe = find_recipe("unstructured-l1")
    compact = fxc.compile(model, recipe.passes, example_inputs=x, train_data=loader, calibration=batches)

They are data. `prepared` fills in what text cannot hold: a seed, a teacher, other numbers of epochs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxcompress.errors import OptionError, did_you_mean
from fxcompress.pipeline.base import Pass
from fxcompress.pipeline.text import parse


@dataclass(frozen=True)
class Recipe:
    """One workflow.

    name: its word on the command line. sentence: what it does. passes: pipeline text. student: whether it starts with
    a smaller, untrained network, whose teacher is the trained one. processes: how many it is run with.
    """

    name: str
    sentence: str
    passes: str
    student: bool = False
    processes: int = 1


_RECIPES = (
    Recipe(
        "unstructured-l1",
        "The 40 % of all weights with the smallest magnitudes become zero and stay zero during fine-tuning.",
        "mask-weights{amount=0.4}, train{epochs=2, learning_rate=0.0001, schedule=cosine}, fuse",
    ),
    Recipe(
        "unstructured-60",
        "The same for 60 % of the weights.",
        "mask-weights{amount=0.6}, train{epochs=3, learning_rate=0.0002, schedule=cosine}, fuse",
    ),
    Recipe(
        "structured-l2",
        "The half of each layer's channels with the smallest L2 norms are removed, then the rest is fine-tuned.",
        "prune-channels{ratio=0.5, importance=l2, scope=layer}, "
        "train{epochs=4, learning_rate=0.001, schedule=cosine}, fuse",
    ),
    Recipe(
        "random-weights",
        "40 % of the weights of each layer, drawn at random, become zero: what a criterion has to beat.",
        "mask-weights{amount=0.4, method=random, scope=layer}, "
        "train{epochs=2, learning_rate=0.0005, schedule=cosine}, fuse",
    ),
    Recipe(
        "random-channels",
        "Half of each layer's channels, drawn at random, are removed: what a criterion has to beat.",
        "prune-channels{ratio=0.5, importance=random, scope=layer}, "
        "train{epochs=4, learning_rate=0.001, schedule=cosine}, fuse",
    ),
    Recipe(
        "global",
        "90 % of the weights become zero; those of all layers are ranked together.",
        "mask-weights{amount=0.9, scope=global}, train{epochs=3, learning_rate=0.001, schedule=cosine}, fuse",
    ),
    Recipe(
        "layer-wise",
        "90 % of the weights become zero; the same share in every layer.",
        "mask-weights{amount=0.9, scope=layer}, train{epochs=3, learning_rate=0.001, schedule=cosine}, fuse",
    ),
    Recipe(
        "one-shot",
        "80 % of the weights of each layer become zero at once, with all fine-tuning behind it.",
        "mask-weights{amount=0.8, scope=layer}, train{epochs=6, learning_rate=0.001, schedule=cosine}, fuse",
    ),
    Recipe(
        "iterative",
        "80 % of the weights of each layer become zero in three steps; half of the same fine-tuning is between them.",
        "iterate{prune=mask-weights{amount=0.8, scope=layer}, train=train{epochs=1, learning_rate=0.001}, steps=3}, "
        "train{epochs=3, learning_rate=0.001, schedule=cosine}, fuse",
    ),
    Recipe(
        "half-macs",
        "Channels of convolutions go until half of the MACs are left; the rest follows the uncompressed network.",
        "prune-channels{budget=macs:0.5, ignore=fc*}, distill{epochs=10, optimiser=sgd, learning_rate=0.03, "
        "weight_decay=0.0005, schedule=cosine, alpha=0.9}, fuse",
    ),
    Recipe(
        "quarter-macs",
        "Channels are removed in three steps, down to a quarter of the MACs; the uncompressed network teaches.",
        "iterate{prune=prune-channels{budget=macs:0.25}, "
        "train=distill{epochs=3, learning_rate=0.002, schedule=cosine, alpha=0.9}, steps=3}, fuse",
    ),
    Recipe(
        "ptq",
        "8-bit integers without training: scales are measured on a few hundred images.",
        "fuse, quantize",
    ),
    Recipe(
        "qat",
        "8-bit integers, with training that sees the rounding and learns the steps.",
        "qat{train=train{epochs=1, learning_rate=0.00003, schedule=cosine}}",
    ),
    Recipe(
        "qat-w4a8",
        "Weights of 4 bits and values of 8, with learned steps.",
        "qat{train=train{epochs=3, learning_rate=0.0005, schedule=cosine}, weight_bits=4}",
    ),
    Recipe(
        "student-alone",
        "A network of a third of the size, trained on the labels only: what distillation has to beat.",
        "train{epochs=20, learning_rate=0.004, schedule=cosine}, fuse",
        student=True,
    ),
    Recipe(
        "distillation",
        "A network of a third of the size, trained as long, follows the softened outputs of the trained one.",
        "distill{epochs=20, learning_rate=0.004, schedule=cosine, temperature=8.0, alpha=0.95}, fuse",
        student=True,
    ),
    Recipe(
        "prune-qat-distill",
        "Everything together: a quarter of the multiplications, 8-bit integers, the float network as the teacher.",
        "iterate{prune=prune-channels{budget=macs:0.25}, "
        "train=distill{epochs=2, learning_rate=0.001, schedule=cosine, alpha=0.9}, steps=3}, "
        "qat{train=distill{epochs=2, learning_rate=0.0003, schedule=cosine, alpha=0.9}}",
    ),
    Recipe(
        "several-processes",
        "Four processes share every batch, agree on channels and scales, and make one network.",
        "prune-channels{budget=macs:0.5}, train{epochs=2, learning_rate=0.001, schedule=cosine}, "
        "qat{train=distill{epochs=1, learning_rate=0.0003, schedule=cosine, alpha=0.9}}",
        processes=4,
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}


def find_recipe(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        OptionError: there is none; the nearest name is suggested.
    """
    if name not in RECIPES:
        raise OptionError(f"there is no recipe {name!r}{did_you_mean(name, RECIPES)}")
    return RECIPES[name]


def prepared(text: str, *, seed: int = 0, epochs: int | None = None, teacher: nn.Module | None = None) -> list[Pass]:
    """Read pipeline text, and fill in what it does not say.

    Args:
        text: of the pipeline.
        seed: of every pass that draws at random.
        epochs: of every pass that trains, instead of its own; for a trial.
        teacher: of every pass that has one, instead of the model before the first pass.
    """
    return [_filled(item, {"seed": seed, "epochs": epochs, "teacher": teacher}) for item in parse(text)]


def _filled(item: Pass, values: dict[str, Any]) -> Pass:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        if values.get(field.name) is not None:
            changes[field.name] = values[field.name]
        elif _holds_passes(value):
            changes[field.name] = tuple(_filled(inner, values) for inner in value)
    return dataclasses.replace(item, **changes)


def _holds_passes(value: object) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(inner, Pass) for inner in value)


# Recipes as a user would write them


def pipeline_lines(text: str) -> list[str]:
    """Return pipeline text with one pass a line, still readable as pipeline text."""
    lines = [str(item) for item in parse(text)]
    return [*(f"{line}," for line in lines[:-1]), lines[-1]]


def as_python(recipe: Recipe) -> str:
    """Return a recipe as the program that a user would write, given `model`, a loader and batches."""
    lines = [f"        {_expression(item, recipe.student)}," for item in parse(recipe.passes)]
    model = "student" if recipe.student else "model"
    head = [f"# {recipe.sentence}"]
    if recipe.student:
        head.append("# model: the trained network; student: a smaller one of the same outputs, not trained yet")
    if recipe.processes > 1:
        head.append(f"# start it with: torchrun --nproc_per_node {recipe.processes} program.py")
    return "\n".join([
        *head, "import fxcompress as fxc", "from fxcompress import passes as P", "", "compact = fxc.compile(",
        f"    {model},", "    [", *lines, "    ],", "    example_inputs=x,", "    train_data=train_loader,",
        "    calibration=batches,", ")",
    ])  # fmt: skip


def _expression(item: Pass, student: bool) -> str:
    given: list[str] = []
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if student and field.name == "teacher":
            given.append("teacher=model")
        elif not field.metadata.get("data") and value != default:
            given.append(f"{field.name}={_value(value, student)}")
    return f"P.{type(item).__name__}({', '.join(given)})"


def _value(value: object, student: bool) -> str:
    if isinstance(value, tuple) and _holds_passes(value):
        inner: Sequence[Pass] = value
        written = [_expression(one, student) for one in inner]
        return written[0] if len(written) == 1 else f"[{', '.join(written)}]"
    return repr(str(value)) if dataclasses.is_dataclass(value) else repr(value)  # a budget reads its own text
