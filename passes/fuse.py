"""Fuse: everything that makes a graph smaller without changing what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxcompress.passes.eliminate_common import EliminateCommon
from fxcompress.passes.eliminate_dead import EliminateDead
from fxcompress.passes.eliminate_identities import EliminateIdentities
from fxcompress.passes.fold_constants import FoldConstants
from fxcompress.passes.fuse_activation import FuseActivation
from fxcompress.passes.fuse_attention import FuseAttention
from fxcompress.passes.fuse_conv_bn import FoldBatchNorm, FoldBatchNormForward
from fxcompress.pipeline.base import Contract, Pass


@dataclass(frozen=True)
class Fuse(Pass):
    """Fold, merge and remove for deployment: a group of passes that also stand alone, in an order that lets one run do.

    1. FoldConstants first: it turns computed options into plain ones.
    2. EliminateIdentities: what stood between two nodes that belong together goes.
    3. EliminateCommon: equal nodes become one, whose readers are then known.
    4. FuseAttention, where the dropout inside has gone.
    5. FoldBatchNorm before FoldBatchNormForward: behind a layer is exact whatever the padding.
    6. EliminateDead: what the steps before left over.
    7. FuseActivation last: its marks name nodes that stay.

    Batch norms and dropout in training mode are left as they are; `fxcompress.compile` captures models in evaluation
    mode.
    """

    name: ClassVar[str] = "fuse"
    contract: ClassVar[Contract] = Contract.EXACT

    def parts(self) -> tuple[Pass, ...]:
        """Return the passes of this group, in order."""
        return (
            FoldConstants(),
            EliminateIdentities(),
            EliminateCommon(),
            FuseAttention(),
            FoldBatchNorm(),
            FoldBatchNormForward(),
            EliminateDead(),
            FuseActivation(),
        )
