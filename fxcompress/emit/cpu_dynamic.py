"""Layers with int8 weights whose inputs lie on no fixed grid, as modules of a lowered CPU graph.

In the dynamic form `QuantizeRows` measures and rounds every row when it arrives, and `Int8DynamicLinear` multiplies
integers. In the weight-only form the weight is 8-bit where it is stored and float where it is multiplied: a layer with
few rows waits for its weights, of which there is then a quarter to read.

Here both are plain PyTorch operators; kernels of our own are in `emit.native`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fxcompress.emit.cpu_layers import QuantizedLayer, Run
from fxcompress.emit.cpu_numbers import Kernel, without_kernels
from fxcompress.emit.layers import Linear
from fxcompress.errors import OptionError
from fxcompress.quant.rows import quantize_rows

#: The integers of rows, the scale and the zero point of each.
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

#: Sums of more products of bytes would not fit 32 bits.
MOST_FEATURES = 2**16


class QuantizeRows(Kernel):
    """Every row of a float tensor to uint8, on a grid of its own.

    Args:
        quant_min, quant_max: the smallest and the largest integer used, within 0..255.
    """

    def __init__(self, quant_min: int, quant_max: int) -> None:
        super().__init__()
        self.quant_min, self.quant_max = int(quant_min), int(quant_max)
        if not 0 <= self.quant_min < self.quant_max <= 255:
            raise OptionError(f"QuantizeRows: 0 <= {quant_min} < {quant_max} <= 255 must hold")

    def forward(self, input: torch.Tensor) -> Rows:
        """Return integers (..., features), scales (..., 1), float32, and zero points (..., 1), int32."""
        q, scale, zero_point = quantize_rows(input, self.quant_min, self.quant_max)
        return q.to(torch.uint8), scale, zero_point

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {"quant_min": self.quant_min, "quant_max": self.quant_max}


class _FloatInputLinear(Linear, QuantizedLayer):
    """What the two linear layers share.

    Args:
        in_features, out_features: as in `torch.nn.Linear`.
        bias, output, activation, residual, overwrite: see `QuantizedLayer`.
    """

    def _with_bias(self, products: torch.Tensor) -> torch.Tensor:
        return products if self.bias is None else products + self.bias


class Int8DynamicLinear(_FloatInputLinear):
    """Linear layer on what `QuantizeRows` makes of an input (..., in_features).

    With q the integers of a row, s its scale and z its zero point, w an output channel's weight and t its scale:

        y = s t (sum w q - z sum w) + bias
    """

    def forward(self, rows: Rows, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return the layer's result for quantised rows, and for a second input if it takes one."""
        if without_kernels(rows[0]):
            return self._finish(self._in_floats(*rows), residual)
        if self._run is None:
            # Of a single feature, PyTorch's product of integers (2.14) is wrong: it reads a column as a row.
            fits = self._has_kernel() and 1 < self.in_features <= MOST_FEATURES
            self._run = self._with_integers() if fits else self._in_floats
        return self._finish(self._run(*rows), residual)

    def column_sums(self) -> torch.Tensor:
        """Return the sum of each output channel's weights, int32."""
        return self.weight.sum(1, dtype=torch.int32)

    def _with_integers(self) -> Run:
        columns, sums = self.weight.t(), self.column_sums()

        def run(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
            signed = q.bitwise_xor(128).view(torch.int8)  # q - 128, as the operator takes signed numbers only
            products = torch._int_mm(signed.reshape(-1, self.in_features), columns)
            centred = products.view(*q.shape[:-1], self.out_features) - (zero_point - 128) * sums
            return self._with_bias(centred * (scale * self.weight_scale))

        return run

    def _in_floats(self, q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        return F.linear((q.float() - zero_point) * scale, self._real_weight(), self.bias)


class Int8WeightOnlyLinear(_FloatInputLinear):
    """Linear layer on a float input (..., in_features)."""

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return the layer's result for real numbers, and for a second input if it takes one."""
        return self._finish(self._multiplied(input.float()), residual)

    def _multiplied(self, x: torch.Tensor) -> torch.Tensor:
        """Products and bias; the weight is real for as long as that takes. (`torch._weight_int8pack_mm` is slower.)"""
        return self._with_bias(F.linear(x, self.weight.float()) * self.weight_scale)


class Int8Embedding(Kernel):
    """Rows of an int8 table as float32 numbers, each row with a scale of its own.

    Args:
        num_embeddings, embedding_dim: as in `torch.nn.Embedding`.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros((num_embeddings, embedding_dim), dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(num_embeddings))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows (..., embedding_dim) of indices (...)."""
        scale = F.embedding(input, self.weight_scale.float().unsqueeze(1))
        return F.embedding(input, self.weight).float() * scale

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {"num_embeddings": self.weight.shape[0], "embedding_dim": self.weight.shape[1]}
