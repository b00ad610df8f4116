"""Optimisers and schedules of the learning rate, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fxcompress.errors import InputError, OptionError
from fxcompress.train.calls import read_call

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adagrad": torch.optim.Adagrad,
}

#: What an optimiser gets unless something else is said.
_DEFAULTS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9, "nesterov": True}}

OptimiserFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
ScheduleFactory = Callable[[torch.optim.Optimizer, "int | None"], Any]


def check_optimiser(text: str) -> None:
    """Raise `OptionError` unless `text` is the name of an optimiser, with options that it has."""
    name, options = read_call(text, OPTIMISERS, "optimiser")
    for option in ("lr", "weight_decay", "params"):
        if option in options:
            raise OptionError(f"{option} is no option of the optimiser {name!r} here; give learning_rate, weight_decay")


def make_optimiser(
    text: str, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return an optimiser by name, for example "sgd(momentum=0.8)". "sgd" alone has Nesterov momentum 0.9.

    Raises:
        OptionError: no optimiser of that name, or values that make no sense to it.
    """
    check_optimiser(text)
    name, options = read_call(text, OPTIMISERS, "optimiser")
    given = {"lr": learning_rate, "weight_decay": weight_decay} | (options or _DEFAULTS.get(name, {}))
    try:
        return OPTIMISERS[name](parameters, **given)
    except (ValueError, TypeError) as error:
        raise OptionError(f"the optimiser {text!r} cannot be made: {error}") from error


# Schedules: what the learning rate is multiplied with when a share `done` of the steps is over.


def constant() -> Callable[[float], float]:
    """The learning rate stays."""
    return lambda done: 1.0


def linear(end: float = 0.0) -> Callable[[float], float]:
    """The learning rate falls in a straight line to `end` times what it was."""
    return lambda done: 1.0 + (end - 1.0) * done


def cosine(end: float = 0.0) -> Callable[[float], float]:
    """The learning rate falls along half a cosine to `end` times what it was (Loshchilov and Hutter, SGDR, 2017)."""
    return lambda done: end + (1.0 - end) * (1.0 + math.cos(math.pi * done)) / 2


def step(at: tuple[float, ...] = (0.5, 0.75), factor: float = 0.1) -> Callable[[float], float]:
    """The learning rate is multiplied with `factor` after each of these shares of the training."""
    return lambda done: factor ** sum(done >= share for share in at)


SCHEDULES: dict[str, Callable[..., Callable[[float], float]]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "step": step,
}


def check_schedule(text: str) -> None:
    """Raise `OptionError` unless `text` is the name of a schedule, with options that it has."""
    name, options = read_call(text, SCHEDULES, "schedule")
    try:
        SCHEDULES[name](**options)(0.5)
    except TypeError as error:
        raise OptionError(f"the schedule {text!r} cannot be made: {error}") from error


def make_schedule(text: str, warmup: float, optimiser: torch.optim.Optimizer, steps: int | None) -> LambdaLR:
    """Return a schedule by name, to be stepped after every step of the optimiser.

    Args:
        text: for example "cosine(end=0.01)".
        warmup: share of the steps during which the rate rises from nearly zero to the full one.
        optimiser: whose learning rate is set.
        steps: how many there will be; None if nobody knows, which only a constant rate can do with.

    Raises:
        InputError: the number of steps is needed and not known.
    """
    name, options = read_call(text, SCHEDULES, "schedule")
    if steps is None and (name != "constant" or warmup):
        raise InputError(
            f"the schedule {text!r} needs to know how many steps there will be, and the data has no length: "
            f"give steps=..., or data with a len()"
        )
    total, rising = steps or 1, round(warmup * (steps or 1))
    factor = SCHEDULES[name](**options)

    def multiplier(index: int) -> float:
        if index < rising:
            return (index + 1) / (rising + 1)
        return factor(min((index - rising) / max(total - rising, 1), 1.0))

    return LambdaLR(optimiser, multiplier)
