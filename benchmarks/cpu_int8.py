"""Latency of torchvision's networks on the CPU: float, other int8 engines, and fxcompress int8.

    python benchmarks/cpu_int8.py --json benchmarks/results/cpu_int8.json
    python benchmarks/cpu_int8.py --peers --json benchmarks/results/cpu_peers.json     # needs the extra `bench`

Every engine runs in a process of its own, the engines take turns, and figures are medians over the rounds, see
`fxcompress.bench`. Weights are random (see `networks.py`): latency does not depend on them. SQNR is that of each
engine's output against the float model, so that no engine is fast by being wrong.
"""

from __future__ import annotations

import argparse
import functools
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fxcompress.bench import Builder, Workload, compare, compiled, eager, result, with_torch_compile, write_json
from fxcompress.bench_views import timing_table
from fxcompress.peers import PEERS, against_best
from fxcompress.pipeline.progress import progress_bar

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large")
PEER_MODELS = (
    *MODELS, "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x1_0", "densenet121", "convnext_tiny", "vit_b_16",
    "swin_t",
)  # fmt: skip

OURS = "fxcompress int8"
ENGINES: dict[str, Builder] = {
    "float": eager,
    "torch.compile": with_torch_compile,
    "torch.compile bf16": functools.partial(with_torch_compile, dtype=torch.bfloat16),
    PEERS["torch-ao"].title: PEERS["torch-ao"].build,
    OURS: functools.partial(compiled, passes="fuse, quantize"),
    "fxcompress half int8": functools.partial(
        compiled, passes="prune-channels{budget='macs:0.5', round_to=64}, fuse, quantize"
    ),
}
PEER_ENGINES: dict[str, Builder] = {
    "float": eager,
    **{peer.title: peer.build for peer in PEERS.values()},
    OURS: functools.partial(compiled, passes="fuse, quantize"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--peers", action="store_true", help="other projects' engines, on more networks")
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--engines", nargs="*", choices=sorted({*ENGINES, *PEER_ENGINES}))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    known = PEER_ENGINES if options.peers else ENGINES
    engines = {name: {**ENGINES, **PEER_ENGINES}[name] for name in options.engines or known}
    results: list[dict[str, Any]] = []
    for model in options.models or (PEER_MODELS if options.peers else MODELS):
        workload = Workload(
            f"{Path(__file__).with_name('networks.py')}:{model}", (), tuple(options.batches), options.threads
        )
        with progress_bar() as progress:
            timings = compare(workload, engines, options.rounds, options.seconds, progress)
        Console(width=140).print(timing_table(timings, model))
        made = result(workload, timings)
        made["workload"]["model"] = model
        made["against_best_peer"] = against_best(timings, OURS, (peer.title for peer in PEERS.values()))
        results.append(made)
        if options.json is not None:
            write_json(options.json, results)  # after each model: what has been measured is not lost
    ratios = [ratio for made in results for ratio in made["against_best_peer"].values()]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"time over that of the best other int8 engine: geometric mean {mean:.2f}, largest {max(ratios):.2f}")


if __name__ == "__main__":
    main()
