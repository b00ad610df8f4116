"""Pass names: the built-in ones, resolved when first used, and those of users' own passes."""

from __future__ import annotations

import importlib

from fxcompress.errors import OptionError, PipelineTextError, did_you_mean
from fxcompress.pipeline.base import Pass

#: name in pipeline text -> module and class
BUILT_IN: dict[str, str] = {
    "canonicalize": "canonicalize:Canonicalize",
    "mask-weights": "mask_weights:MaskWeights",
    "mask-channels": "mask_channels:MaskChannels",
    "remove-channels": "remove_channels:RemoveChannels",
    "prune-channels": "prune_channels:PruneChannels",
    "fold-batch-norm": "fuse_conv_bn:FoldBatchNorm",
    "fold-batch-norm-forward": "fuse_conv_bn:FoldBatchNormForward",
    "fuse-activation": "fuse_activation:FuseActivation",
    "fuse-attention": "fuse_attention:FuseAttention",
    "fold-constants": "fold_constants:FoldConstants",
    "eliminate-identities": "eliminate_identities:EliminateIdentities",
    "eliminate-common": "eliminate_common:EliminateCommon",
    "eliminate-dead": "eliminate_dead:EliminateDead",
    "fuse": "fuse:Fuse",
    "insert-observers": "insert_observers:InsertObservers",
    "calibrate": "calibrate:Calibrate",
    "convert-observed": "convert_observed:ConvertObserved",
    "lower": "lower:Lower",
    "lower-float": "lower_float:LowerFloat",
    "tune": "tune:Tune",
    "quantize": "quantize:Quantize",
    "qat": "qat:QAT",
    "train": "train:Train",
    "distill": "distill:Distill",
    "iterate": "iterate:Iterate",
    "remember-weights": "rewind_weights:RememberWeights",
    "rewind-weights": "rewind_weights:RewindWeights",
}

_REGISTERED: dict[str, type[Pass]] = {}


def register(pass_class: type[Pass]) -> type[Pass]:
    """Make a pass known to pipeline text, under its `name`. Usable as a class decorator.

    Raises:
        OptionError: it has no name, or the name is taken by a built-in pass.
    """
    if not pass_class.name:
        raise OptionError(f"{pass_class.__name__} needs a class attribute `name` before it can be registered")
    if pass_class.name in BUILT_IN:
        raise OptionError(f"{pass_class.name!r} is the name of a built-in pass; give {pass_class.__name__} another")
    _REGISTERED[pass_class.name] = pass_class
    return pass_class


def names() -> list[str]:
    """Return every known pass name, sorted."""
    return sorted({*BUILT_IN, *_REGISTERED})


def find(name: str) -> type[Pass]:
    """Return the pass class of that name.

    Raises:
        PipelineTextError: there is none; the nearest name is suggested.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in BUILT_IN:
        raise PipelineTextError(f"there is no pass named {name!r}{did_you_mean(name, names())}")
    module, _, class_name = BUILT_IN[name].partition(":")
    found: type[Pass] = getattr(importlib.import_module(f"fxcompress.passes.{module}"), class_name)
    return found
