"""The modules of a lowered CPU graph: 8-bit layers, sums and pooling on plain uint8 and int8 tensors.

They depend on PyTorch's oneDNN operators and on nothing else: no quantised dtypes, no `torch.ao`.
"""

from __future__ import annotations

from fxcompress.emit.cpu_attention import Int8Attention
from fxcompress.emit.cpu_dynamic import Int8DynamicLinear, Int8Embedding, Int8WeightOnlyLinear, QuantizeRows
from fxcompress.emit.cpu_layers import Int8Conv, Int8Layer, Int8Linear, QuantizedLayer
from fxcompress.emit.cpu_numbers import Dequantize, Kernel, Quantize
from fxcompress.emit.cpu_pointwise import Int8Add, Int8Affine, Int8AvgPool, Int8MaxPool, Int8Mul
from fxcompress.emit.layers import ACTIVATIONS, activation_of

__all__ = [
    "ACTIVATIONS",
    "MODULES",
    "Dequantize",
    "Int8Add",
    "Int8Affine",
    "Int8Attention",
    "Int8AvgPool",
    "Int8Conv",
    "Int8DynamicLinear",
    "Int8Embedding",
    "Int8Layer",
    "Int8Linear",
    "Int8MaxPool",
    "Int8Mul",
    "Int8WeightOnlyLinear",
    "Kernel",
    "Quantize",
    "QuantizeRows",
    "QuantizedLayer",
    "activation_of",
]

#: Every module class of a lowered CPU graph, by the name that the artefact writes.
MODULES: dict[str, type[Kernel]] = {
    kernel.__name__: kernel
    for kernel in (
        Quantize, Dequantize, QuantizeRows, Int8Conv, Int8Linear, Int8DynamicLinear, Int8WeightOnlyLinear,
        Int8Embedding, Int8Attention, Int8Add, Int8Mul, Int8Affine, Int8MaxPool, Int8AvgPool,
    )
}  # fmt: skip
