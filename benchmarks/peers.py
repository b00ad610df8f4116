"""Other int8 engines as `fxcompress.bench` wants them, each with the settings that its own documentation recommends.

Each takes a float model and inputs, calibrates with the inputs, and returns what is timed. What an engine needs is
imported when it is built, so that one that is not installed is a line in the table.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxcompress.bench import channels_last
from fxcompress.graph.inputs import ExampleInputs


def torch_ao(model: nn.Module, inputs: ExampleInputs) -> Callable[[], Any]:
    """torch.ao's graph mode quantisation with its default numbers for x86."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "x86"
    prepared = prepare_fx(model.eval(), get_default_qconfig_mapping("x86"), inputs.args)
    inputs.call(prepared)
    converted = convert_fx(prepared)
    return functools.partial(inputs.map(channels_last).call, converted)


def torchao(model: nn.Module, inputs: ExampleInputs) -> Callable[[], Any]:
    """torchao's PT2E quantisation for x86, compiled by Inductor with frozen weights."""
    import torch._inductor.config as inductor
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    inductor.freezing = True
    inductor.cpp_wrapper = True
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    inputs = inputs.map(channels_last)
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(model.eval(), inputs.args).module(), quantizer)
        inputs.call(prepared)
        compiled = torch.compile(convert_pt2e(prepared))
        inputs.call(compiled)
    return functools.partial(inputs.call, compiled)


def onnx_runtime(model: nn.Module, inputs: ExampleInputs) -> Callable[[], Any]:
    """ONNX Runtime, static quantisation with quantise-dequantise pairs, weights per channel."""
    import onnxruntime
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        floats, prepared, quantized = (str(Path(folder) / name) for name in ("a.onnx", "b.onnx", "c.onnx"))
        torch.onnx.export(model.eval(), inputs.args, floats, dynamo=True, verbose=False)
        quant_pre_process(floats, prepared)
        names = [one.name for one in onnxruntime.InferenceSession(prepared).get_inputs()]
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs.args, strict=True)}
        quantize_static(
            prepared, quantized, _Calibration(feed), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        session = onnxruntime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(None, feed)[0])


class _Calibration:
    """What ONNX Runtime reads calibration data from: one batch."""

    def __init__(self, feed: dict[str, Any]) -> None:
        self.left = [feed]

    def get_next(self) -> dict[str, Any] | None:
        return self.left.pop() if self.left else None


def openvino(model: nn.Module, inputs: ExampleInputs) -> Callable[[], Any]:
    """OpenVINO with NNCF's post-training quantisation, told to be quick for single requests."""
    os.environ.setdefault("OPENVINO_TELEMETRY", "0")
    import nncf
    import openvino as ov

    model = model.eval()
    with torch.no_grad():  # the fast path of torch's own attention cannot be converted
        torch.backends.mha.set_fastpath_enabled(False)
        converted = ov.convert_model(model, example_input=inputs.args)
    converted.reshape({index: list(tensor.shape) for index, tensor in enumerate(inputs.args)})
    arguments = [tensor.numpy() for tensor in inputs.args]
    attention = any("attention" in type(module).__name__.lower() for module in model.modules())
    kind = nncf.ModelType.TRANSFORMER if attention else None
    quantized = nncf.quantize(converted, nncf.Dataset([arguments]), subset_size=1, model_type=kind)
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = ov.Core().compile_model(quantized, "CPU", hints).create_infer_request()
    return lambda: torch.from_numpy(request.infer(arguments, share_inputs=True, share_outputs=True)[0])
