"""Promises over every registered pass, over random models."""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.graph.compare import run
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.pipeline import registry
from fxcompress.pipeline.base import Contract
from fxcompress.testing import assert_equivalent, check_pass
from tests.strategies import Program, example, programs

many = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)

#: Passes of stage FLOAT, each with options that let it work. Passes of other stages run inside `test_lowered_...`.
FLOAT_PASSES: dict[str, fxc.Pass] = {
    "canonicalize": P.Canonicalize(),
    "mask-weights": P.MaskWeights(0.4),
    "mask-channels": P.MaskChannels(0.4),
    "remove-channels": P.RemoveChannels(),
    "fold-batch-norm": P.FoldBatchNorm(),
    "fold-batch-norm-forward": P.FoldBatchNormForward(),
    "fuse-activation": P.FuseActivation(),
    "fuse-attention": P.FuseAttention(),
    "fold-constants": P.FoldConstants(),
    "eliminate-identities": P.EliminateIdentities(),
    "eliminate-common": P.EliminateCommon(),
    "eliminate-dead": P.EliminateDead(),
    "fuse": P.Fuse(),
    "remember-weights": P.RememberWeights(),
}
LATER = {"insert-observers", "calibrate", "convert-observed", "lower", "lower-float", "quantize", "qat", "tune"}
#: Needs another pass before it; `tests/passes/test_iterate.py` holds it to the promises.
LEANS_ON_ANOTHER = {"rewind-weights"}
#: A second run of these does something by design: it prunes what is left, or trains on.
REPEATABLE_BY_DESIGN = {"prune-channels", "train", "distill", "iterate"}


def _largest(model: Program) -> float:
    value = float(run(model, ExampleInputs.of(example())).abs().max())
    return value if math.isfinite(value) else math.inf


def test_every_registered_pass_is_held_to_the_promises() -> None:
    built_in = set(registry.BUILT_IN)
    assert built_in == set(FLOAT_PASSES) | LATER | LEANS_ON_ANOTHER | REPEATABLE_BY_DESIGN


@many
@given(programs(), st.sampled_from(sorted(FLOAT_PASSES)))
def test_every_float_pass_is_idempotent_truthful_and_keeps_its_contract(model: Program, name: str) -> None:
    assume(_largest(model) < 1e8)
    item = FLOAT_PASSES[name]
    result = check_pass(item, fxc.trace(model, example()), example())
    if item.contract is Contract.EXACT:
        assert_equivalent(model, result.graph_module, example(), 1e-10)
        assert_equivalent(model, result.graph_module, example(5), 1e-10)


@many
@given(programs())
def test_fused_equals_unfused_after_pruning(model: Program) -> None:
    assume(_largest(model) < 1e8)
    pruned = fxc.compile(model, [P.PruneChannels(0.4)], example())
    fused = fxc.compile(model, [P.PruneChannels(0.4), P.Fuse()], example())
    assert_equivalent(pruned, fused, example(), 1e-10)
    assert_equivalent(pruned, fused, example(3), 1e-10)


@many
@given(programs(max_steps=8))
def test_lowered_equals_quantise_dequantise(model: Program) -> None:
    """The kernels compute what the float graph with quantise-dequantise pairs says, for every batch size."""
    assume(1e-3 < _largest(model) < 1e4)
    model = model.float()
    data = [example(4).float(), example(3).float()]
    graph = fxc.PassManager([P.Fuse()]).run(fxc.trace(model, data[0]), data[0]).graph_module
    parts = P.Quantize(calibration=data).parts()
    quantised = fxc.PassManager(list(parts[:-1]), verify=False).run(graph, data[0]).graph_module
    lowered = fxc.PassManager([parts[-1]], verify=False).run(quantised, data[0]).graph_module
    for batch in (1, 2, 5):
        x = example(batch).float()
        expected, found = run(quantised, ExampleInputs.of(x)), run(lowered, ExampleInputs.of(x))
        assert found.shape == expected.shape
        noise = (found - expected).double().square().mean()
        signal = expected.double().square().mean()
        if noise > 0:
            assert 10 * torch.log10(signal / noise) >= 35, f"batch {batch}"
