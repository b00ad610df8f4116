"""fxcompress: a compiler that makes trained PyTorch models small and fast."""

from fxcompress import errors
from fxcompress.analysis.budget import Budget, Bytes, Latency, MACs, Parameters
from fxcompress.analysis.sensitivity import Sensitivity, sensitivity
from fxcompress.api import compile
from fxcompress.emit.artifact import load
from fxcompress.emit.compact_module import CompactModule
from fxcompress.graph.capture import trace
from fxcompress.pipeline.base import Contract, Note, Pass, PassContext, PassResult, data_field
from fxcompress.pipeline.manager import PassManager
from fxcompress.pipeline.registry import register
from fxcompress.report import Report

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Bytes",
    "CompactModule",
    "Contract",
    "Latency",
    "MACs",
    "Note",
    "Parameters",
    "Pass",
    "PassContext",
    "PassManager",
    "PassResult",
    "Report",
    "Sensitivity",
    "compile",
    "data_field",
    "errors",
    "load",
    "register",
    "sensitivity",
    "trace",
]
