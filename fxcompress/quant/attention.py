"""Attention with 8-bit weights: what is left of softmax when its result has to be bytes.

The numerators of softmax, exp(score - largest score of the row), lie between 0 and 1 whatever the scores are, so that
their grid needs no calibration: steps of 1/255. They are divided by the sum of the *rounded* numerators, behind the
product with the values: weights add up to one again, and a row that looks everywhere alike, where every weight is as
small as a step, loses nothing. Products of bytes with bytes are all that is left to multiply.

Source: the softmax of integers is that of Kim et al., I-BERT: Integer-only BERT Quantization, 2021; dividing after the
product, that of Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from fxcompress.quant.unobserved import Unobserved

#: Steps between 0 and the largest weight of a row.
STEPS = 255


def attention_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Return scores (..., queries, keys) with masks as `F.scaled_dot_product_attention` has them.

    Args:
        query: (..., queries, features).
        key: (..., keys, features).
        attn_mask: numbers to add, or booleans, True for what may be looked at.
        is_causal: whether each query sees the keys up to its own place only.
        scale: of the products; None: 1 / sqrt(features).
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query, key.transpose(-2, -1)) * factor
    if is_causal:
        shape = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -math.inf)
    return scores + attn_mask


def fake_quantize_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Return attention with the numerators of softmax rounded to `STEPS`, in plain float operators.

    Gradients pass straight through the rounding. A query that may look at nothing gets zeros.

    Args:
        query, key, value, attn_mask, is_causal, scale, enable_gqa: as `F.scaled_dot_product_attention` takes them.
        dropout_p: is there for the same form of calls; weights are not dropped.
    """
    if has_torch_function((query, key, value)):  # a proxy of torch.fx, for which this is one operation
        given = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        traced: torch.Tensor = handle_torch_function(fake_quantize_attention, (query, key, value), *given)
        return traced
    if query.dtype in (torch.float16, torch.bfloat16):  # sums of steps need more
        made = fake_quantize_attention(
            query.float(), key.float(), value.float(), attn_mask, 0.0, is_causal, scale, enable_gqa
        )
        return made.to(query.dtype)
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = (one.repeat_interleave(times, -3) for one in (key, value))
    scores = attention_scores(query, key, attn_mask, is_causal, scale)
    largest = scores.detach().amax(-1, keepdim=True)
    numerators = STEPS * torch.exp(scores - torch.where(largest == -math.inf, 0.0, largest))
    rounded = numerators + (torch.round(numerators) - numerators).detach()
    return torch.matmul(rounded, value) / rounded.sum(-1, keepdim=True).clamp(min=1)


class ObservedAttention(Unobserved):
    """`F.scaled_dot_product_attention` that becomes `fake_quantize_attention` once training has started."""

    def forward(self, query: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        """Return attention; arguments are those of `F.scaled_dot_product_attention`."""
        function: Any = fake_quantize_attention if self.rounds(query) else F.scaled_dot_product_attention
        result: torch.Tensor = function(query, *others, **options)
        return result
