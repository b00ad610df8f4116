"""Which channels go: in blocks that leave what rounding asks for, the least important first."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxcompress as fxc
from fxcompress.analysis import plans
from fxcompress.analysis.channels import ChannelAnalysis, analyse
from fxcompress.analysis.plans import choosable, choose


def chain(widths: list[int]) -> tuple[torch.fx.GraphModule, ChannelAnalysis]:
    """Linear layers; every width is a family of channels."""
    sizes = [4, *widths, 3]
    layers = [nn.Linear(one, other) for one, other in itertools.pairwise(sizes)]
    graph = fxc.compile(nn.Sequential(*layers), [], torch.zeros(1, 4))
    return graph, analyse(graph)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 9), st.floats(0, 1), st.integers(0, 2**31 - 1)
)
def test_the_least_important_blocks_go_as_long_as_they_fit(
    widths: list[int], round_to: int, ratio: float, seed: int
) -> None:
    graph, analysis = chain(widths)
    scores = np.random.default_rng(seed).permutation(analysis.group_count).astype(float)
    plan = choose(
        graph, analysis, scores, ratio=ratio, budget=None, scope="global", round_to=round_to, max_ratio=1.0,
        relative=False,
    )  # fmt: skip
    families = choosable(analysis, scores, {})
    assert sorted(map(len, families)) == sorted(widths)
    most = int(sum(widths) * ratio + 1e-9)
    taken: list[tuple[float, int]] = []  # blocks: mean score, size
    spared: list[tuple[float, int]] = []  # the next one of every family
    for members in families:
        ranked = np.sort(scores[members])
        gone = int(plan.dead[members].sum())
        assert sorted(scores[members[plan.dead[members]]]) == ranked[:gone].tolist()
        assert gone == 0 or (len(members) - gone) % round_to == 0
        start = 0
        for end in [end for end in range(1, len(members)) if (len(members) - end) % round_to == 0]:
            if end > gone:
                spared.append((ranked[start:end].mean(), end - start))
                break
            taken.append((ranked[start:end].mean(), end - start))
            start = end
    assert sum(size for _, size in taken) == plan.dead.sum() <= most
    for mean, size in spared:  # it found no room behind those that matter less
        assert size + sum(other for lower, other in taken if lower <= mean) > most


def test_rounding_chooses_within_a_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it took a round for every channel, and minutes for a network of 17,000 channels."""
    rounds = []
    wanted = plans._Chooser._wanted

    def counted(chooser: plans._Chooser, ratio: float, scores: np.ndarray) -> np.ndarray:
        rounds.append(ratio)
        return wanted(chooser, ratio, scores)

    monkeypatch.setattr(plans._Chooser, "_wanted", counted)
    _, analysis = chain([200] * 20)
    scores = np.random.default_rng(0).random(analysis.group_count)
    chooser = plans._Chooser(analysis, scores, "global", 16, "positions", 0.95, None, True, {})
    dead = chooser.choose(0.5)
    assert 0.5 - 16 / len(chooser.all) <= dead.sum() / len(chooser.all) <= 0.5
    assert 1 <= len(rounds) <= 4
