"""Attention on bytes, as a module of a lowered CPU graph.

Here it is made of plain PyTorch operators, on the numbers that the bytes stand for; a kernel of our own is in
`emit.native`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxcompress.emit.cpu_numbers import Kernel, broadcast, integers, real
from fxcompress.errors import InputError
from fxcompress.quant.attention import fake_quantize_attention
from fxcompress.quant.spec import Grid


class Int8Attention(Kernel):
    """Products of attention on bytes, with 8-bit weights (`quant.attention`).

    It takes real numbers and brings them onto grids itself: query, key and value are mostly parts of one tensor, and
    need another order in memory anyway.

    Args:
        query, key, value: grids of the inputs. output: grid of the result; None for float32.
        scale, is_causal, enable_gqa: as in `F.scaled_dot_product_attention`.
    """

    def __init__(
        self,
        query: Sequence[Any],
        key: Sequence[Any],
        value: Sequence[Any],
        output: Sequence[Any] | None = None,
        scale: float | None = None,
        is_causal: bool = False,
        enable_gqa: bool = False,
    ) -> None:
        super().__init__()
        self.query, self.key, self.value = (Grid.from_config(one) for one in (query, key, value))
        self.output = None if output is None else Grid.from_config(output)
        self.scale = None if scale is None else float(scale)
        self.is_causal, self.enable_gqa = bool(is_causal), bool(enable_gqa)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the result for real numbers.

        Args:
            query, key, value: (batch, heads, length, features), or without some of the first dimensions.
            mask: numbers to add to the scores, or True where a query may look; broadcast to them.
        """
        result = fake_quantize_attention(
            _rounded(query, self.query), _rounded(key, self.key), _rounded(value, self.value), mask,
            is_causal=self.is_causal, scale=self.scale, enable_gqa=self.enable_gqa,
        )  # fmt: skip
        return result if self.output is None else integers(result, self.output)

    def outline(self, *inputs: torch.Tensor) -> torch.Tensor:
        """As in `Kernel`."""
        query, key, value, *mask = inputs
        batch = list(query.shape[:-2])
        if self.enable_gqa:
            key, value = (one.expand(*batch, *one.shape[-2:]) if one.shape[-3] == 1 else one for one in (key, value))
        if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
            raise InputError(
                f"attention: query, key and value of shapes {tuple(query.shape)}, {tuple(key.shape)} and "
                f"{tuple(value.shape)} do not fit each other"
            )
        shape = broadcast(query.shape[:-2], *([] if self.enable_gqa else [key.shape[:-2], value.shape[:-2]]))
        if mask:
            broadcast((*shape, query.shape[-2], key.shape[-2]), mask[0].shape)
        dtype = torch.float32 if self.output is None else torch.uint8
        return torch.empty((*shape, query.shape[-2], value.shape[-1]), dtype=dtype, device="meta")

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "query": self.query.config(), "key": self.key.config(), "value": self.value.config(),
            "output": None if self.output is None else self.output.config(),
            "scale": self.scale, "is_causal": self.is_causal, "enable_gqa": self.enable_gqa,
        }  # fmt: skip


def _rounded(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    return real(integers(x.detach().float().clone(), grid), grid)
