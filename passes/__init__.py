"""The passes of fxcompress, one pass or one small family a file.

Import this package as `fxcompress.passes`.
"""

if __name__ != "fxcompress.passes":
    raise ImportError("import this package as fxcompress.passes: a second copy would hold a second set of classes")

from fxcompress.passes.calibrate import Calibrate
from fxcompress.passes.canonicalize import Canonicalize
from fxcompress.passes.convert_observed import ConvertObserved
from fxcompress.passes.distill import Distill
from fxcompress.passes.eliminate_common import EliminateCommon
from fxcompress.passes.eliminate_dead import EliminateDead
from fxcompress.passes.eliminate_identities import EliminateIdentities
from fxcompress.passes.fold_constants import FoldConstants
from fxcompress.passes.fuse import Fuse
from fxcompress.passes.fuse_activation import FuseActivation
from fxcompress.passes.fuse_attention import FuseAttention
from fxcompress.passes.fuse_conv_bn import FoldBatchNorm, FoldBatchNormForward
from fxcompress.passes.insert_observers import InsertObservers
from fxcompress.passes.iterate import Iterate
from fxcompress.passes.lower import Lower
from fxcompress.passes.lower_float import LowerFloat
from fxcompress.passes.mask_channels import MaskChannels
from fxcompress.passes.mask_weights import MaskWeights
from fxcompress.passes.prune_channels import PruneChannels
from fxcompress.passes.qat import QAT
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.remove_channels import RemoveChannels
from fxcompress.passes.rewind_weights import RememberWeights, RewindWeights
from fxcompress.passes.train import Train
from fxcompress.passes.tune import Tune

__all__ = [
    "QAT",
    "Calibrate",
    "Canonicalize",
    "ConvertObserved",
    "Distill",
    "EliminateCommon",
    "EliminateDead",
    "EliminateIdentities",
    "FoldBatchNorm",
    "FoldBatchNormForward",
    "FoldConstants",
    "Fuse",
    "FuseActivation",
    "FuseAttention",
    "InsertObservers",
    "Iterate",
    "Lower",
    "LowerFloat",
    "MaskChannels",
    "MaskWeights",
    "PruneChannels",
    "Quantize",
    "RememberWeights",
    "RemoveChannels",
    "RewindWeights",
    "Train",
    "Tune",
]
