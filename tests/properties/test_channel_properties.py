"""Promises about channel removal, over random models and in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.analysis import transfer
from fxcompress.analysis.channels import Walk
from fxcompress.analysis.plans import HEADS
from fxcompress.errors import FxCompressError, UnsupportedError
from fxcompress.graph.compare import run
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.testing import assert_equivalent, check_pass
from tests.strategies import Program, example, programs

EXACT = 1e-10


def examples(count: int) -> settings:
    """So many random models; some of them take long to draw or to compile."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, suppress_health_check=checks)


def _finite(model: nn.Module) -> bool:
    return bool(run(model, ExampleInputs.of(example())).abs().max() < 1e8)


def _masked_and_removed(model: Program, item: fxc.Pass) -> tuple[fx.GraphModule, fx.GraphModule]:
    masked = fxc.PassManager([item]).run(fxc.trace(model, example()), example()).graph_module
    removed = fxc.PassManager([P.RemoveChannels()]).run(masked, example()).graph_module
    return masked, removed


@examples(1500)
@given(
    programs(),
    st.sampled_from([0.3, 0.5, 0.8]),
    st.sampled_from(["layer", "global"]),
    st.sampled_from(["l2", "random"]),
    st.sampled_from(HEADS),
)
def test_masked_equals_removed(model: Program, ratio: float, scope: str, importance: str, heads: str) -> None:
    assume(_finite(model))
    item = P.MaskChannels(ratio, scope=scope, importance=importance, heads=heads)
    masked, removed = _masked_and_removed(model, item)
    assert_equivalent(masked, removed, example(), EXACT)
    assert_equivalent(masked, removed, example(5), EXACT)  # another batch size than the example's
    assert sum(p.numel() for p in removed.parameters()) <= sum(p.numel() for p in masked.parameters())


@examples(600)
@given(programs(), st.randoms(use_true_random=False))
def test_filters_zeroed_by_the_user_are_removed_exactly(model: Program, random: object) -> None:
    """Rows of weights are zero, biases and normalisations are not: the channels carry constants."""
    assume(_finite(model))
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for module in zeroed.modules():
            if isinstance(module, nn.Conv2d) and module.out_channels > 2:
                module.weight[:: random.choice([2, 3])] = 0  # type: ignore[attr-defined]
    try:
        removed = fxc.PassManager([P.RemoveChannels()]).run(fxc.trace(zeroed, example()), example()).graph_module
    except UnsupportedError:
        return  # a tied weight is zero as a whole
    assert_equivalent(zeroed, removed, example(), EXACT)
    assert_equivalent(zeroed, removed, example(3), EXACT)


@examples(300)
@given(
    programs(max_steps=8),
    st.sampled_from([P.MaskChannels(0.5), P.RemoveChannels(), P.MaskWeights(0.4), P.Canonicalize()]),
)
def test_passes_are_idempotent_and_truthful(model: Program, item: fxc.Pass) -> None:
    assume(_finite(model))
    check_pass(item, fxc.trace(model, example()), example())


@pytest.mark.parametrize(("kind", "dimension"), [("cat", 1), ("attention", -1), ("reshape", -1)])
def test_a_broken_transfer_rule_is_found(kind: str, dimension: int) -> None:
    """Control: let a rule give channels in reverse order, and the property must fail."""

    def broken(walk: Walk, node: fx.Node) -> object:
        axes = list(original(walk, node))
        if axes and axes[dimension] is not None:
            axes[dimension] = axes[dimension].take(np.arange(len(axes[dimension]))[::-1])
        return tuple(axes)

    original = transfer.RULES[kind]
    transfer.RULES[kind] = broken
    try:

        @settings(
            max_examples=300,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(programs())
        def search(model: Program) -> None:
            assume(_finite(model))
            masked, removed = _masked_and_removed(model, P.MaskChannels(0.5, scope="layer"))
            assert_equivalent(masked, removed, example(), EXACT)

        try:
            search()
        except (AssertionError, FxCompressError, RuntimeError, ExceptionGroup):
            return
    finally:
        transfer.RULES[kind] = original
    raise AssertionError("the property did not notice a broken rule")
