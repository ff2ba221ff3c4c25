"""The trainer's networks: sizes, initial values, shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from swa_fast.train.models import MODELS, PreResNet, build_model


@pytest.mark.parametrize(
    ("depth", "classes", "parameters", "tensors", "norms", "channels"),
    [
        (110, 10, 1_146_842, 332, 109, 8_080),
        (110, 100, 1_169_972, 332, 109, 8_080),
        (164, 10, 1_703_258, 494, 163, 12_112),
        (164, 100, 1_726_388, 494, 163, 12_112),
    ],
)
def test_sizes_of_the_papers_networks(
    depth: int, classes: int, parameters: int, tensors: int, norms: int, channels: int
) -> None:
    with torch.device("meta"):
        model = PreResNet(depth, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(list(model.parameters())) == tensors
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(layers) == norms
    assert sum(layer.num_features for layer in layers) == channels
    assert len(list(model.buffers())) == 3 * norms


def test_parts_of_preresnet164() -> None:
    with torch.device("meta"):
        model = PreResNet(164)
    parts = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    assert parts == {
        "conv1": 432,
        "layer1": 81_952,
        "layer2": 326_272,
        "layer3": 1_291_520,
        "bn": 512,
        "fc": 2_570,
    }


def test_depth_counts_the_layers() -> None:
    for name in MODELS:
        depth = int(name.removeprefix("preresnet"))
        with torch.device("meta"):
            model = build_model(name, in_channels=3, num_classes=10, width=16)
        layers = [
            m
            for n, m in model.named_modules()
            if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in n
        ]
        assert len(layers) == depth


@pytest.mark.parametrize("name", ["preresnet8", "preresnet20", "preresnet110"])
@pytest.mark.parametrize("size", [8, 11, 32])
def test_forward(name: str, size: int) -> None:
    model = build_model(name, in_channels=1, num_classes=7, width=4)
    images = torch.randn(2, 1, size, size)
    logits = model(images)
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_initial_values() -> None:
    model = PreResNet(20, width=32)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            k = module.kernel_size[0]
            expected = math.sqrt(2 / (k * k * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_shortcut_takes_the_raw_input() -> None:
    # With its last convolutions zero, a block is its shortcut alone.
    model = PreResNet(8, width=4)
    block = model.layer2[0]
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), block.downsample(x))
    strided = nn.functional.conv2d(x, block.downsample.weight, stride=2)
    torch.testing.assert_close(block.downsample(x), strided)
    assert block.downsample.bias is None
    assert isinstance(model.layer1[0].downsample, nn.Identity)
    # Bottlenecks widen already in stage 1.
    assert isinstance(PreResNet(110, width=4).layer1[0].downsample, nn.Conv2d)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"model: expected one of preresnet8, .* found 'resnet'"):
        build_model("resnet", in_channels=3, num_classes=10, width=16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 21}, r"depth: expected 6n \+ 2 .* found 21"),
        ({"depth": 2}, r"depth: expected 6n \+ 2 .* found 2"),
        ({"depth": 112}, r"depth: expected 9n \+ 2 .* found 112"),
        ({"depth": 8, "width": 0}, "width: expected 1 or more, found 0"),
        ({"depth": 8, "num_classes": 0}, "num_classes: expected 1 or more, found 0"),
        ({"depth": 8, "in_channels": -1}, "in_channels: expected 1 or more, found -1"),
    ],
)
def test_bad_sizes(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreResNet(**arguments)
