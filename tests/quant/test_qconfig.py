"""Which observers a layer gets, and the fake-quantiser for training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fxcompress.errors import InputError, OptionError
from fxcompress.quant.arithmetic import fake_quantize
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.observers import Histogram, MinMax, PerChannelMinMax
from fxcompress.quant.qconfig import ObserverChoice, chooser
from fxcompress.quant.spec import ACTIVATION, WEIGHT, WEIGHT_SIGNIFICANDS

DEFAULT = ObserverChoice("histogram", "per-channel", WEIGHT)
ONE, TWO, THREE = (SimpleNamespace(activation=MinMax, weight=name) for name in ("minmax", "percentile", "histogram"))


def test_the_default_is_for_every_layer() -> None:
    choice = chooser(None, DEFAULT)("any.layer", nn.Linear(1, 1))
    assert choice is DEFAULT
    assert isinstance(choice.activation_observer(), Histogram)
    weight = choice.weight_observer()
    assert isinstance(weight, PerChannelMinMax)
    assert weight.spec == WEIGHT


def test_one_config_is_for_every_layer() -> None:
    choice = chooser(ONE, DEFAULT)("any.layer", nn.Linear(1, 1))
    assert choice is not None
    assert isinstance(choice.activation_observer(), MinMax)
    assert choice.weight == "minmax"


@pytest.mark.parametrize("as_dict", [False, True])
def test_rules_for_paths_come_before_patterns_types_and_the_rest(as_dict: bool) -> None:
    names, patterns, types = {"head": TWO, "head.drop": None}, {r".*conv\d": THREE}, {nn.Linear: None}
    if as_dict:
        mapping: object = {"": ONE, "object_type": types.items(), "module_name": names.items(),
                           "module_name_regex": patterns.items()}  # fmt: skip
    else:
        mapping = SimpleNamespace(
            global_qconfig=ONE, object_type_qconfigs=types, module_name_qconfigs=names,
            module_name_regex_qconfigs=patterns,
        )  # fmt: skip
    choose = chooser(mapping, DEFAULT)
    convolution, linear = nn.Conv2d(1, 1, 1), nn.Linear(1, 1)
    for path, module, expected in [
        ("stem", convolution, "minmax"),
        ("body.conv2", convolution, "histogram"),
        ("body.conv2", linear, "histogram"),
        ("body.fc", linear, None),
        ("head.conv1", convolution, "percentile"),
        ("head.drop", convolution, None),
        ("header", convolution, "minmax"),
    ]:
        choice = choose(path, module)
        assert (choice and choice.weight) == expected


def test_what_is_no_config_is_refused() -> None:
    with pytest.raises(OptionError, match="must be a QConfig"):
        chooser(3, DEFAULT)


def test_sums_of_products_need_no_more_than_24_bits() -> None:
    """The reason for coarse scales: float32 holds products and sums of numbers on two such grids exactly."""
    torch.manual_seed(0)
    for significand in ACTIVATION.significands:
        for other in WEIGHT_SIGNIFICANDS:
            values = torch.randint(0, 256, (1000, 200)).double() * significand * 2.0**-9
            weights = (torch.randn(200) * 30).round().clamp(-127, 127).double() * other * 2.0**-11
            exact = values @ weights
            assert torch.equal((values.float() @ weights.float()).double(), exact)


def test_fake_quantiser_follows_its_observer_while_recording() -> None:
    x = torch.linspace(-1, 3, 50)
    module = FakeQuantize(MinMax()).eval()
    with pytest.raises(InputError, match="MinMax has recorded nothing"):
        module.calculate_qparams()
    assert torch.equal(module(x), x)
    module.recording = True
    assert torch.equal(module(x), x)  # not rounding yet
    module.recording = False
    module.quantizing = True
    rounded = module(x)
    assert torch.equal(rounded, fake_quantize(x, *module.calculate_qparams(), module.spec))
    assert not torch.equal(rounded, x)
    module(x * 100)
    assert torch.equal(module(x), rounded)
    module.reset()
    assert torch.equal(module(x), x)
