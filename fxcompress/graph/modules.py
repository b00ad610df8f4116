"""Small float modules and functions that a graph may hold besides those of torch.

Each module offers `config()` and `from_config()`, so that an artefact can rebuild it without running code from the
file.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import nn


def set_item(input: Any, index: Any, value: Any) -> Any:
    """Return a copy of a tensor, list or dict in which `input[index]` is `value`."""
    result = input.clone() if isinstance(input, torch.Tensor) else copy.copy(input)
    result[index] = value
    return result


class AutogradFunction:
    """Calls a `torch.autograd.Function`, so that its own gradient stays. There is one object for each class."""

    _made: ClassVar[dict[type, AutogradFunction]] = {}

    def __init__(self, function: type) -> None:
        self.function = function
        self.__name__, self.__module__ = f"{function.__name__}_apply", function.__module__

    @classmethod
    def of(cls, function: type) -> AutogradFunction:
        """Return the object for a class."""
        return cls._made.setdefault(function, cls(function))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the function."""
        return self.function.apply(*args, **kwargs)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"{self.function.__qualname__}.apply"

    def __reduce__(self) -> Any:
        return AutogradFunction.of, (self.function,)

    def __deepcopy__(self, memo: dict[int, Any]) -> AutogradFunction:
        return self


class StochasticDepth(nn.Module):
    """Drops whole samples ("row") or the whole batch ("batch") of a residual branch during training.

    Source: Huang et al., Deep Networks with Stochastic Depth, 2016. Same arithmetic as torchvision's operator.

    Args:
        p: probability of dropping, 0 <= p <= 1.
        mode: "row" or "batch".
    """

    def __init__(self, p: float, mode: str = "row") -> None:
        super().__init__()
        self.p = float(p)
        self.mode = mode

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the input, in training with samples dropped and the others divided by 1 - p."""
        if not self.training or self.p == 0.0:
            return input
        size = [input.shape[0] if self.mode == "row" else 1] + [1] * (input.ndim - 1)
        noise = torch.empty(size, dtype=input.dtype, device=input.device).bernoulli_(1.0 - self.p)
        return input * (noise.div_(1.0 - self.p) if self.p < 1.0 else noise)

    def extra_repr(self) -> str:
        """Options for the printed module."""
        return f"p={self.p}, mode={self.mode}"

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"p": self.p, "mode": self.mode}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> StochasticDepth:
        """Build the module that `config()` described."""
        return cls(config["p"], config["mode"])


class PartialLayerNorm(nn.Module):
    """Layer normalisation over the last axis, of which only some entries are stored.

    After channel removal the entries that are left must be normalised as if the removed ones, which carried constants,
    were still there. With n entries of which the missing ones sum to s1 and their squares to s2:

        mean = (sum(x) + s1) / n,    var = (sum((x - mean)^2) + s2 - 2 mean s1 + (n - len(x)) mean^2) / n

    Args:
        stored: number of entries stored, the size of the last axis of the input.
        width: number of entries n of the layer before removal.
        eps: added to the variance.
        affine: whether there is a weight and a bias, each of shape (stored,).
        bias: whether there is a bias beside the weight.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    missing_sum: torch.Tensor
    missing_square: torch.Tensor

    def __init__(self, stored: int, width: int, eps: float = 1e-5, affine: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.stored, self.width, self.eps = int(stored), int(width), float(eps)
        self.register_parameter("weight", nn.Parameter(torch.ones(stored)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(stored)) if affine and bias else None)
        self.register_buffer("missing_sum", torch.zeros(()))
        self.register_buffer("missing_square", torch.zeros(()))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise `input` of shape (..., stored)."""
        mean = (input.sum(-1, keepdim=True) + self.missing_sum) / self.width
        centred = input - mean
        missing = self.missing_square - 2 * mean * self.missing_sum + (self.width - self.stored) * mean.square()
        variance = (centred.square().sum(-1, keepdim=True) + missing) / self.width
        result = centred * torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            result = result * self.weight
        return result if self.bias is None else result + self.bias

    def extra_repr(self) -> str:
        """Options for the printed module."""
        return f"{self.stored} of {self.width}, eps={self.eps}, affine={self.weight is not None}"

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"stored": self.stored, "width": self.width, "eps": self.eps,
                "affine": self.weight is not None, "bias": self.bias is not None}  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PartialLayerNorm:
        """Build the module that `config()` described."""
        return cls(config["stored"], config["width"], config["eps"], config["affine"], config["bias"])


class PartialGroupNorm(nn.Module):
    """Group normalisation with one group, of whose channels only some are stored; see `PartialLayerNorm`.

    The removed channels carried constants. With p positions, n channels, s1 the sum of the missing constants and s2
    that of their squares, the missing entries sum to p s1 and their squares to p s2.

    Args:
        stored: number of channels stored, the size of axis 1 of the input.
        width: number of channels n of the layer before removal.
        eps: added to the variance.
        affine: whether there is a weight and a bias, each of shape (stored,).
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    missing_sum: torch.Tensor
    missing_square: torch.Tensor

    def __init__(self, stored: int, width: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.stored, self.width, self.eps = int(stored), int(width), float(eps)
        self.register_parameter("weight", nn.Parameter(torch.ones(stored)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(stored)) if affine else None)
        self.register_buffer("missing_sum", torch.zeros(()))
        self.register_buffer("missing_square", torch.zeros(()))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise `input` of shape (batch, stored, ...)."""
        dims = tuple(range(1, input.ndim))
        positions = input[0, 0].numel()
        mean = (input.sum(dims, keepdim=True) + positions * self.missing_sum) / (self.width * positions)
        centred = input - mean
        missing = self.missing_square - 2 * mean * self.missing_sum + (self.width - self.stored) * mean.square()
        squares = centred.square().sum(dims, keepdim=True) + positions * missing
        result = centred * torch.rsqrt(squares / (self.width * positions) + self.eps)
        if self.weight is None or self.bias is None:
            return result
        shape = (1, -1, *[1] * (input.ndim - 2))
        return result * self.weight.view(shape) + self.bias.view(shape)

    def extra_repr(self) -> str:
        """Options for the printed module."""
        return f"{self.stored} of {self.width}, eps={self.eps}, affine={self.weight is not None}"

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"stored": self.stored, "width": self.width, "eps": self.eps, "affine": self.weight is not None}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PartialGroupNorm:
        """Build the module that `config()` described."""
        return cls(config["stored"], config["width"], config["eps"], config["affine"])


class PartialRMSNorm(nn.Module):
    """Normalisation by the root mean square over the last axis, of which only some entries are stored.

    The removed entries carried zeros, so that only their number matters: x / sqrt(sum(x^2) / width + eps).

    Args:
        stored: number of entries stored, the size of the last axis of the input.
        width: number of entries of the layer before removal.
        eps: added to the mean square; None: the smallest step of the input's dtype at 1.
        affine: whether there is a weight of shape (stored,).
    """

    weight: nn.Parameter | None

    def __init__(self, stored: int, width: int, eps: float | None = None, affine: bool = True) -> None:
        super().__init__()
        self.stored, self.width, self.eps = int(stored), int(width), eps
        self.register_parameter("weight", nn.Parameter(torch.ones(stored)) if affine else None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise `input` of shape (..., stored)."""
        eps = torch.finfo(input.dtype).eps if self.eps is None else self.eps
        result = input * torch.rsqrt(input.square().sum(-1, keepdim=True) / self.width + eps)
        return result if self.weight is None else result * self.weight

    def extra_repr(self) -> str:
        """Options for the printed module."""
        return f"{self.stored} of {self.width}, eps={self.eps}, affine={self.weight is not None}"

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"stored": self.stored, "width": self.width, "eps": self.eps, "affine": self.weight is not None}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PartialRMSNorm:
        """Build the module that `config()` described."""
        return cls(config["stored"], config["width"], config["eps"], config["affine"])


#: Every module class of this file, by the name that the artefact writes.
MODULES: dict[str, Any] = {
    "StochasticDepth": StochasticDepth,
    "PartialLayerNorm": PartialLayerNorm,
    "PartialRMSNorm": PartialRMSNorm,
    "PartialGroupNorm": PartialGroupNorm,
}
