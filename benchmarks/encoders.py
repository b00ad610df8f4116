"""Latency of transformers on the CPU: float, static int8, dynamic int8, weight-only int8.

    python benchmarks/encoders.py --json benchmarks/results/encoders.json

An encoder of BERT-base's size (12 layers of 768, 128 tokens), the same for a single token, where every layer has one
row and waits for its weights, and torchvision's vit_b_16; random weights, batch 1. Engines take turns as in
`cpu_int8.py`. torch.ao leaves the projections of `nn.MultiheadAttention` in float.

(A file called transformers.py would stand in the way of the package of that name.)
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks  # type: ignore[import-not-found]  # beside this file
import torch
from rich.console import Console
from torch import nn

from fxcompress.bench import Builder, Workload, compare, compiled, eager, result, write_json
from fxcompress.bench_views import timing_table
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.pipeline.progress import progress_bar

LAYERS, WIDTH, HEADS, TOKENS = 12, 768, 12, 128


def encoder(tokens: int = TOKENS) -> tuple[nn.Module, torch.Tensor]:
    """Return an encoder in evaluation mode, and embedded tokens (1, tokens, width)."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    return model.eval(), torch.randn(1, tokens, WIDTH)


def encoder_of_one_token() -> tuple[nn.Module, torch.Tensor]:
    """Return the same with one token: all layers have one row."""
    return encoder(1)


def vit_b_16() -> tuple[nn.Module, torch.Tensor]:
    """Return torchvision's network, and an image."""
    made: tuple[nn.Module, torch.Tensor] = networks.conditioned("vit_b_16")
    return made


def torch_ao_dynamic(model: nn.Module, inputs: ExampleInputs) -> Callable[[], Any]:
    """torch.ao's dynamic quantisation of linear layers: one scale for the whole input, measured at every call."""
    from torch.ao.quantization import quantize_dynamic

    torch.backends.mha.set_fastpath_enabled(False)  # it reads float weights
    torch.backends.quantized.engine = "x86"
    return functools.partial(inputs.call, quantize_dynamic(model.eval(), {nn.Linear}))


ENGINES: dict[str, Builder] = {
    "float": eager,
    "torch.ao dynamic int8": torch_ao_dynamic,
    "fxcompress int8": functools.partial(compiled, passes="int8"),
    "fxcompress dynamic int8": functools.partial(compiled, passes="int8-dynamic"),
    "fxcompress weight-only int8": functools.partial(compiled, passes="int8-weight-only"),
    "fxcompress static and dynamic int8": functools.partial(compiled, passes="fuse, quantize{dynamic='*'}"),
}
MODELS = ("encoder", "encoder_of_one_token", "vit_b_16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--engines", nargs="*", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--batches", type=int, nargs="*", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engines = {name: ENGINES[name] for name in options.engines}
    results: list[dict[str, Any]] = []
    for model in options.models:
        workload = Workload(f"{Path(__file__)}:{model}", (), tuple(options.batches), options.threads)
        with progress_bar() as progress:
            timings = compare(workload, engines, options.rounds, options.seconds, progress)
        Console(width=140).print(timing_table(timings, model))
        made = result(workload, timings)
        made["workload"]["model"] = model
        results.append(made)
        if options.json is not None:
            write_json(options.json, results)  # after each model: what has been measured is not lost


if __name__ == "__main__":
    main()
