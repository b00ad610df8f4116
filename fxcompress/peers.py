"""Other int8 engines to compare with, each with the settings that its own documentation recommends.

Each takes a float model and inputs, calibrates with the same samples as all engines (`bench.calibration_of`), and
returns what is timed, as `fxcompress.bench` wants it. What an engine needs is imported when it is built, in the process
that it has for itself.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxcompress.bench import Builder, Timing, batch_size, calibration_of, channels_last, in_batches
from fxcompress.errors import MissingExtraError, OptionError, did_you_mean
from fxcompress.graph.inputs import ExampleInputs

#: Stands for all engines.
ALL = "all"


@dataclass(frozen=True)
class Peer:
    """An engine of another project: its name in tables, how it is built, and the packages that it needs."""

    title: str
    build: Builder
    packages: tuple[str, ...] = ()

    @property
    def missing(self) -> str | None:
        """The first package that is not installed; None if the engine can be built."""
        return next((name for name in self.packages if importlib.util.find_spec(name) is None), None)


def find_peers(names: Iterable[str]) -> list[Peer]:
    """Return engines by name; for "all", those whose packages are installed.

    Raises:
        OptionError: there is no engine of that name.
        MissingExtraError: a package that it needs is not installed.
    """
    found: list[Peer] = []
    for name in names:
        if name == ALL:
            found += [peer for peer in PEERS.values() if peer.missing is None]
            continue
        if name not in PEERS:
            raise OptionError(f"there is no engine {name!r} to compare with{did_you_mean(name, [*PEERS, ALL])}")
        peer = PEERS[name]
        if peer.missing is not None:
            raise MissingExtraError(peer.missing, "bench", peer.title)
        found.append(peer)
    return list(dict.fromkeys(found))


def against_best(timings: Sequence[Timing], ours: str, peers: Iterable[str]) -> dict[int, float]:
    """Return, for each batch size, our time over that of the fastest of the others, as the median over the rounds.

    Args:
        timings: of all engines. ours: the name of our engine. peers: names of the others.
    """
    names = set(peers)
    found = {}
    for own in timings:
        others = [one.rounds for one in timings if one.engine in names and one.batch == own.batch and one.error is None]
        if own.engine == ours and own.error is None and others:
            best = [min(turn) for turn in zip(*others, strict=True)]
            found[own.batch] = statistics.median(a / b for a, b in zip(own.rounds, best, strict=True))
    return found


def torch_ao(model: nn.Module, inputs: ExampleInputs) -> Callable[[], Any]:
    """torch.ao's graph mode quantisation with its default numbers for x86."""
    from torch.ao.quantization import get_default_qconfig_mapping  # noqa: TID251 - it is what we compare with
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx  # noqa: TID251

    torch.backends.quantized.engine = "x86"
    prepared = prepare_fx(model.eval(), get_default_qconfig_mapping("x86"), inputs.args)
    with torch.no_grad():
        for sample in calibration_of(inputs):
            sample.call(prepared)
    converted = convert_fx(prepared)
    return functools.partial(inputs.map(channels_last).call, converted)


def torchao(model: nn.Module, inputs: ExampleInputs) -> Callable[[], Any]:
    """torchao's PT2E quantisation for x86, compiled by Inductor with frozen weights."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    inductor.cpp_wrapper = True
    inputs = inputs.map(channels_last)
    with torch.no_grad():
        compiled = torch.compile(quantized_torchao(model, inputs))
        inputs.call(compiled)
    return functools.partial(inputs.call, compiled)


def quantized_torchao(model: nn.Module, inputs: ExampleInputs) -> Any:
    """Return what torchao makes of a model: a graph for inputs of these shapes.

    The export is a strict one: in others, torchao cannot tell the calls of a layer apart that is called twice, and
    refuses it (the activations of torchvision's ResNets).
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(model.eval(), inputs.args, strict=True).module(), quantizer)
        for batch in in_batches(calibration_of(inputs), batch_size(inputs)):
            batch.map(channels_last).call(prepared)
        return convert_pt2e(prepared)


def onnx_runtime(model: nn.Module, inputs: ExampleInputs) -> Callable[[], Any]:
    """ONNX Runtime, static quantisation with quantise-dequantise pairs, weights per channel."""
    with tempfile.TemporaryDirectory() as folder:
        return run_onnx(quantized_onnx(model, inputs, Path(folder)), inputs.args)


def quantized_onnx(model: nn.Module, inputs: ExampleInputs, folder: Path) -> Path:
    """Write what ONNX Runtime makes of a model, and return the file."""
    import onnxruntime
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    floats, prepared, quantized = (folder / name for name in ("float.onnx", "prepared.onnx", "quantized.onnx"))
    torch.onnx.export(model.eval(), inputs.args, str(floats), dynamo=True, verbose=False)
    quant_pre_process(str(floats), str(prepared))
    names = [one.name for one in onnxruntime.InferenceSession(str(prepared)).get_inputs()]
    data = in_batches(calibration_of(inputs), batch_size(inputs))
    quantize_static(
        str(prepared), str(quantized), _Calibration(names, data), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return quantized


def run_onnx(path: Path, arguments: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """Return what runs such a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, arguments, strict=True)}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


class _Calibration:
    """What ONNX Runtime reads calibration data from."""

    def __init__(self, names: Sequence[str], batches: Sequence[ExampleInputs]) -> None:
        self.left = [dict(zip(names, (tensor.numpy() for tensor in one.args), strict=True)) for one in batches]

    def get_next(self) -> dict[str, Any] | None:
        return self.left.pop(0) if self.left else None


def openvino(model: nn.Module, inputs: ExampleInputs) -> Callable[[], Any]:
    """OpenVINO with NNCF's post-training quantisation, told to be quick for single requests."""
    return run_openvino(quantized_openvino(model, inputs), inputs.args)


def quantized_openvino(model: nn.Module, inputs: ExampleInputs) -> Any:
    """Return what NNCF makes of a model: an OpenVINO model for inputs of these shapes."""
    os.environ.setdefault("OPENVINO_TELEMETRY", "0")
    import nncf
    import openvino as ov

    model = model.eval()
    with torch.no_grad():  # the fast path of torch's own attention cannot be converted
        torch.backends.mha.set_fastpath_enabled(False)
        converted = ov.convert_model(model, example_input=inputs.args)
    samples = calibration_of(inputs)
    converted.reshape({index: list(tensor.shape) for index, tensor in enumerate(samples[0].args)})
    data = nncf.Dataset([[tensor.numpy() for tensor in sample.args] for sample in samples])
    attention = any("attention" in type(module).__name__.lower() for module in model.modules())
    kind = nncf.ModelType.TRANSFORMER if attention else None
    quantized = nncf.quantize(converted, data, subset_size=len(samples), model_type=kind)
    quantized.reshape({index: list(tensor.shape) for index, tensor in enumerate(inputs.args)})
    return quantized


def run_openvino(model: Any, inputs: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """Return what runs an OpenVINO model, or the file of one."""
    import openvino as ov

    arguments = [tensor.numpy() for tensor in inputs]
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()
    return lambda: torch.from_numpy(request.infer(arguments, share_inputs=True, share_outputs=True)[0])


#: Engines by the word that the command line has for them.
PEERS: dict[str, Peer] = {
    "onnxruntime": Peer("ONNX Runtime int8", onnx_runtime, ("onnx", "onnxscript", "onnxruntime")),
    "openvino": Peer("OpenVINO int8", openvino, ("openvino", "nncf")),
    "torchao": Peer("torchao int8", torchao, ("torchao",)),
    "torch-ao": Peer("torch.ao int8", torch_ao),
}
