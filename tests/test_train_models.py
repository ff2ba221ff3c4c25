"""The trainer's networks: sizes, initial values, shapes, randomness, trained weights."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swa_fast.train.errors import TrainError
from swa_fast.train.models import (
    MODELS,
    VGG16,
    PreResNet,
    PyramidNet,
    ShakeShake,
    WideResNet,
    build_model,
    forward_macs,
    load_pretrained,
    residual,
    shake_shake,
)
from swa_fast.train.models.layers import Projection, add_
from swa_fast.train.models.shake_shake import shake

# Widths at which all networks are small.
NARROW = {name: 8 if name.startswith(("wrn", "pyramidnet", "resnet")) else 4 for name in MODELS}
DEEP = ("preresnet164", "wrn28-10", "shakeshake26-2x64d", "pyramidnet272", "densenet161")


@functools.cache
def on_meta(name: str, classes: int) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, in_channels=3, num_classes=classes)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def layers(model: nn.Module, kind: type[nn.Module]) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, kind)]


# Counted from the models that the papers' authors published, at their paper's width. The parts are
# those of the closed form.


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("vgg16", 10, 15_245_130),
        ("vgg16", 100, 15_291_300),
        ("vgg16-bn", 10, 15_253_578),
        ("vgg16-bn", 100, 15_299_748),
        ("preresnet110", 10, 1_146_842),
        ("preresnet110", 100, 1_169_972),
        ("preresnet164", 10, 1_703_258),
        ("preresnet164", 100, 1_726_388),
        ("wrn28-10", 10, 36_489_290),
        ("wrn28-10", 100, 36_546_980),
        ("shakeshake26-2x64d", 10, 11_653_978),
        ("shakeshake26-2x64d", 100, 11_677_108),
        ("pyramidnet272", 10, 26_210_842),
        ("pyramidnet272", 100, 26_288_692),
        ("resnet50", 1000, 25_557_032),
        ("resnet152", 1000, 60_192_808),
        ("densenet161", 1000, 28_681_000),
    ],
)
def test_parameters_of_the_papers_networks(name: str, classes: int, expected: int) -> None:
    assert parameters(on_meta(name, classes)) == expected


@pytest.mark.parametrize(
    ("name", "tensors", "convs", "linears", "norms", "channels", "buffers", "elements", "macs"),
    [
        ("vgg16", 32, 13, 3, 0, 0, 0, 0, 313_725_952),
        ("vgg16-bn", 58, 13, 3, 13, 4_224, 39, 8_461, 313_725_952),
        ("preresnet110", 332, 112, 1, 109, 8_080, 327, 16_269, 167_430_656),
        ("preresnet164", 494, 166, 1, 163, 12_112, 489, 24_387, 247_646_720),
        ("wrn28-10", 108, 28, 1, 25, 8_976, 75, 17_977, 5_951_117_568),
        ("shakeshake26-2x64d", 161, 55, 1, 52, 7_632, 156, 15_316, 1_685_506_560),
        ("pyramidnet272", 997, 271, 1, 362, 105_432, 1_086, 211_226, 4_488_778_176),
        ("resnet50", 161, 53, 1, 53, 26_560, 159, 53_173, 4_089_184_256),
        ("resnet152", 467, 155, 1, 155, 75_712, 465, 151_579, 11_513_626_624),
        ("densenet161", 484, 160, 1, 161, 109_968, 483, 220_097, 7_727_907_072),
    ],
)
def test_layers_of_the_papers_networks(
    name: str,
    tensors: int,
    convs: int,
    linears: int,
    norms: int,
    channels: int,
    buffers: int,
    elements: int,
    macs: int,
) -> None:
    spec = MODELS[name]
    model = on_meta(name, 10 if spec.image_size == 32 else 1000)
    batch_norms = layers(model, nn.BatchNorm2d)
    assert len(list(model.parameters())) == tensors
    assert len(layers(model, nn.Conv2d)) == convs
    assert len(layers(model, nn.Linear)) == linears
    assert len(batch_norms) == norms
    assert spec.batch_norm == bool(norms)
    assert sum(layer.num_features for layer in batch_norms) == channels
    assert len(list(model.buffers())) == buffers
    assert sum(b.numel() for b in model.buffers()) == elements
    assert forward_macs(model, (3, spec.image_size, spec.image_size)) == macs


@pytest.mark.parametrize(
    ("name", "stem", "stages", "norm", "linear"),
    [
        ("preresnet110", 432, (54_688, 219_520, 869_120), 512, 2_570),
        ("preresnet164", 432, (81_952, 326_272, 1_291_520), 512, 2_570),
        ("wrn28-10", 448, (1_642_112, 6_970_880, 27_868_160), 1_280, 6_410),
        ("shakeshake26-2x64d", 464, (537_728, 2_224_384, 8_888_832), 0, 2_570),
        ("pyramidnet272", 464, (1_501_413, 7_220_407, 17_478_180), 1_728, 8_650),
    ],
)
def test_parameters_by_part(
    name: str, stem: int, stages: tuple[int, int, int], norm: int, linear: int
) -> None:
    parts = {n: parameters(m) for n, m in on_meta(name, 10).named_children()}
    assert parts.pop("conv1") + parts.pop("bn1", 0) == stem
    assert parts.pop("bn", 0) == norm
    assert parts == {"layer1": stages[0], "layer2": stages[1], "layer3": stages[2], "fc": linear}


def test_parameters_of_vgg16_by_part() -> None:
    parts = {n: parameters(m) for n, m in on_meta("vgg16", 10).named_children()}
    assert parts == {"features": 14_714_688, "classifier": 530_442}


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (functools.partial(ShakeShake, 26, width=96), 26_192_922),
        (functools.partial(ShakeShake, 26, width=32), 2_923_162),
        (functools.partial(PyramidNet, 164, width=48), 1_715_442),
        (functools.partial(PyramidNet, 200, width=240), 26_752_702),
    ],
)
def test_parameters_of_published_relatives(build: Callable[[], nn.Module], expected: int) -> None:
    with torch.device("meta"):
        assert parameters(build()) == expected


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith(("preresnet", "pyramid"))])
def test_depth_counts_the_layers(name: str) -> None:
    depth = int(name.removeprefix("preresnet").removeprefix("pyramidnet"))
    found = [
        m
        for n, m in on_meta(name, 10).named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in n
    ]
    assert len(found) == depth


def test_specs() -> None:
    for spec in MODELS.values():
        assert spec.normalise in ("imagenet", "cifar", "pyramidnet", "shakeshake")
        assert spec.min_size <= spec.image_size in (32, 224)
    widths = {n: MODELS[n].width for n in ("wrn28-10", "wrn16-4", "wrn28-2", "preresnet8")}
    assert widths == {"wrn28-10": 160, "wrn16-4": 64, "wrn28-2": 32, "preresnet8": 16}
    assert MODELS["vgg16"].normalise == MODELS["vgg16-bn"].normalise == "imagenet"
    assert MODELS["preresnet164"].normalise == MODELS["wrn28-10"].normalise == "cifar"
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODELS["vgg16"].width = 1  # type: ignore[misc]


# Shapes, precisions and memory formats


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward(name: str, amp: bool) -> None:
    size = MODELS[name].min_size
    model = build_model(name, in_channels=1, num_classes=7, width=NARROW[name])
    images = torch.randn(2, 1, size, size)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        logits = model(images)
    assert logits.shape == (2, 7)
    assert logits.dtype is (torch.bfloat16 if amp else torch.float32)
    F.cross_entropy(logits.float(), torch.tensor([0, 6])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # Only what is behind a dead ReLU or a dropped-out unit may be without a gradient.
    weights = [p for p in model.parameters() if p.dim() == 4]
    assert all(p.grad is not None and p.grad.any() for p in weights)


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "build",
    [
        lambda: PreResNet(20, width=4),
        lambda: PreResNet(56, width=4),
        lambda: WideResNet(10, width=4),
        lambda: PyramidNet(11, width=8),
        lambda: ShakeShake(8, width=4),
    ],
    ids=["basic", "bottleneck", "wide", "pyramid", "shake"],
)
def test_sums_in_place_change_no_bit(
    build: Callable[[], nn.Module],
    memory_format: torch.memory_format,
    amp: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    added: list[bool] = []

    def in_place(y: Tensor, x: Tensor) -> Tensor:
        out = add_(y, x)
        added.append(out is y)
        return out

    model = build().to(memory_format=memory_format)
    images = torch.randn(3, 3, 8, 8).to(memory_format=memory_format)
    results = []
    for add in (in_place, torch.add):
        monkeypatch.setattr(residual, "add_", add)
        monkeypatch.setattr(shake_shake, "add_", add)
        torch.manual_seed(1)
        each = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            logits = each(images)
        logits.float().square().sum().backward()
        results.append([logits, *each.buffers(), *(p.grad for p in each.parameters())])
    assert added and all(added)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_sum_of_another_dtype_is_another_tensor() -> None:
    y, x = torch.ones(2, dtype=torch.bfloat16), torch.full((2,), 2.0**-20)
    assert torch.equal(add_(y, x), y + x) and add_(y, x).dtype is torch.float32
    assert y.tolist() == [1, 1]


@pytest.mark.parametrize("name", ["vgg16-bn", *DEEP])
def test_channels_last(name: str) -> None:
    size = max(MODELS[name].min_size, 16)
    model = build_model(name, in_channels=3, num_classes=5, width=NARROW[name]).eval()
    # In double precision, as untrained statistics let values grow from block to block.
    model.double()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    results = []
    formats = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: formats.append(args[0]))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=memory_format).zero_grad()
        formats.clear()
        logits = model(images.contiguous(memory_format=memory_format))
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
        # Inputs of one pixel or one channel are of both formats.
        inputs = [x for x in formats if x.shape[1] > 1 and x.shape[2] > 1]
        assert len(inputs) > 10
        # A slice of the image, which a projection takes, has gaps.
        assert all(x.clone().is_contiguous(memory_format=memory_format) for x in inputs)
    for plain, last in zip(*results, strict=True):
        torch.testing.assert_close(last, plain, rtol=1e-6, atol=1e-9 * plain.abs().max().item())


@pytest.mark.parametrize(
    "name", ["preresnet8", "preresnet110", "wrn16-4", "shakeshake26-2x64d", "pyramidnet272"]
)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (11, 13), (32, 18)])
def test_any_size(name: str, height: int, width: int) -> None:
    model = build_model(name, in_channels=2, num_classes=3, width=NARROW[name])
    assert model(torch.randn(2, 2, height, width)).shape == (2, 3)


@pytest.mark.parametrize("name", ["vgg16", "densenet161"])
def test_smallest_size(name: str) -> None:
    model = build_model(name, in_channels=3, num_classes=3, width=4)
    size = MODELS[name].min_size - 1
    with pytest.raises(RuntimeError, match="size"):
        model(torch.randn(2, 3, size, size))
    # More than the smallest is averaged away.
    assert model(torch.randn(2, 3, 71, 64)).shape == (2, 3)


# Initial values


@pytest.mark.parametrize("name", ["vgg16-bn", "preresnet20", "shakeshake26-2x64d", "pyramidnet272"])
def test_initial_values(name: str) -> None:
    model = build_model(name, in_channels=3, num_classes=300, width=32)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            k = module.kernel_size[0]
            expected = math.sqrt(2 / (k * k * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)
            assert abs(module.weight.mean().item()) < 0.1 * expected
            # Normal, not uniform: 4.6 % are beyond two standard deviations.
            outside = (module.weight.abs() > 2 * expected).double().mean().item()
            assert outside == pytest.approx(0.0455, abs=0.02)
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            assert (module.bias == 0).all()
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        if isinstance(module, nn.Linear):
            assert_default(module, module.in_features, zero_bias=name.startswith("shake"))


def assert_default(module: nn.Linear | nn.Conv2d, fan_in: int, zero_bias: bool = False) -> None:
    """PyTorch's: uniform within 1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    assert bound * 0.95 < module.weight.abs().max().item() <= bound
    assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert module.bias is not None
    if zero_bias:
        assert (module.bias == 0).all()
    else:
        assert bound * 0.6 < module.bias.abs().max().item() <= bound


def test_initial_values_of_wrn_are_the_defaults() -> None:
    model = WideResNet(16, width=16)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert_default(module, module.in_channels * module.kernel_size[0] ** 2)
    assert_default(model.fc, 64)


# Single networks


def test_layers_of_vgg16() -> None:
    model = VGG16(width=2, batch_norm=True)
    planes = [m.out_channels for m in model.features if isinstance(m, nn.Conv2d)]
    assert planes == [2, 2, 4, 4, 8, 8, 8, 16, 16, 16, 16, 16, 16]
    letters = {nn.Conv2d: "c", nn.BatchNorm2d: "b", nn.ReLU: "r", nn.MaxPool2d: "M"}
    order = "".join(letters[type(m)] for m in model.features)
    assert order == "cbr" * 2 + "M" + "cbr" * 2 + "M" + ("cbr" * 3 + "M") * 3
    head = [type(m).__name__ for m in model.classifier]
    assert head == ["Dropout", "Linear", "ReLU"] * 2 + ["Linear"]
    assert [m.p for m in layers(model, nn.Dropout)] == [0.5, 0.5]
    assert [m.out_features for m in layers(model, nn.Linear)] == [16, 16, 10]


def test_shortcut_takes_the_raw_input() -> None:
    # With its last convolutions zero, a block is its shortcut alone.
    model = PreResNet(8, width=4)
    block = model.layer2[0]
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), block.downsample(x))
    strided = F.conv2d(x, block.downsample.weight, stride=2)
    torch.testing.assert_close(block.downsample(x), strided)
    assert block.downsample.bias is None
    assert isinstance(model.layer1[0].downsample, nn.Identity)
    # Bottlenecks widen already in stage 1.
    assert isinstance(PreResNet(110, width=4).layer1[0].downsample, nn.Conv2d)


def test_wrn_block() -> None:
    model = WideResNet(16, width=4)
    block = model.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))
    assert all(m.bias is not None for m in layers(model, nn.Conv2d))
    x = torch.randn(2, 4, 8, 8)
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    strided = F.conv2d(x, block.downsample.weight, block.downsample.bias, stride=2)
    torch.testing.assert_close(block(x), strided)
    # The width of the stem differs from stage 1's, or not.
    assert isinstance(model.layer1[0].downsample, Projection)
    assert isinstance(WideResNet(16, width=16).layer1[0].downsample, nn.Identity)
    # The narrow strided convolution that oneDNN gets wrong is nowhere.
    assert all(m.stride == (1, 1) for m in layers(model, nn.Conv2d) if m.kernel_size == (1, 1))


def test_only_the_last_norm_of_wrn_has_another_momentum() -> None:
    modules = WideResNet(28, width=4).named_modules()
    norms = {n: m.momentum for n, m in modules if isinstance(m, nn.BatchNorm2d)}
    assert norms.pop("bn") == 0.9
    assert len(norms) == 24 and set(norms.values()) == {0.1}


def test_planes_of_pyramidnet272() -> None:
    model = on_meta("pyramidnet272", 10)
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
    planes = [block.conv2.out_channels for block in blocks]
    assert planes[:7] == [18, 20, 23, 25, 27, 29, 32]
    # Rounded half up, in whole numbers.
    assert planes == [(2 * (16 * 90 + 200 * k) + 90) // 180 for k in range(1, 91)]
    assert [planes[i] for i in (29, 59, 89)] == [83, 149, 216]
    assert [blocks[i].bn4.num_features for i in (29, 59, 89)] == [332, 596, 864]
    assert [i for i, block in enumerate(blocks) if block.conv2.stride == (2, 2)] == [30, 60]


@pytest.mark.parametrize("size", [8, 7])
def test_pyramidnet_shortcut_averages_and_appends_zeros(size: int) -> None:
    model = PyramidNet(20, width=12)
    for block, stride in ((model.layer2[0], 2), (model.layer2[1], 1)):
        nn.init.zeros_(block.bn4.weight)
        channels = block.bn1.num_features
        x = torch.randn(2, channels, size, size)
        out = block(x)
        assert out.shape[1] > channels and (out[:, channels:] == 0).all()
        if stride == 1:
            assert torch.equal(out[:, :channels], x)
        else:
            half = size // 2
            means = x[:, :, : 2 * half, : 2 * half].unflatten(3, (half, 2)).unflatten(2, (half, 2))
            torch.testing.assert_close(out[:, :channels, :half, :half], means.mean((3, 5)))
            # The last row of an odd number is averaged over what there is.
            assert out.shape[2] == (size + 1) // 2
            if size % 2:
                torch.testing.assert_close(out[:, :channels, -1, -1], x[:, :, -1, -1])


def test_pyramidnet_block_begins_without_relu_and_ends_with_norm() -> None:
    block = PyramidNet(11, width=6).eval().layer1[0]
    x = torch.randn(2, 16, 4, 4)
    y = block.conv2(F.relu(block.bn2(block.conv1(block.bn1(x)))))
    y = block.bn4(block.conv3(F.relu(block.bn3(y))))
    expected = y + torch.cat((x, torch.zeros(2, y.shape[1] - 16, 4, 4)), 1)
    torch.testing.assert_close(block(x), expected)


# Shake-Shake


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("size", [8, 7])
def test_shake_shortcut_has_a_shifted_path(step: int, size: int) -> None:
    stage = ShakeShake(8, width=4).eval()
    shortcut = stage.layer1[0].downsample if step == 1 else stage.layer2[0].downsample
    x = torch.randn(2, shortcut.conv1.in_channels, size, size)
    before = torch.zeros_like(x)
    before[:, :, 1:, 1:] = x[:, :, :-1, :-1]
    straight = F.conv2d(x, shortcut.conv1.weight, stride=step)
    shifted = F.conv2d(before, shortcut.conv2.weight, stride=step)
    assert straight.shape == shifted.shape
    torch.testing.assert_close(shortcut(x), shortcut.bn(torch.cat((straight, shifted), 1)))


def test_shake_block() -> None:
    model = ShakeShake(14, width=4).eval()
    assert model.layer1[1].downsample is None
    for block, channels in ((model.layer1[0], 16), (model.layer1[1], 4), (model.layer2[0], 4)):
        x = torch.randn(3, channels, 8, 8)
        kept = x.clone()
        active = x.clamp(min=0)
        skip = x if block.downsample is None else block.downsample(active)
        expected = skip + (block.branch1(active) + block.branch2(active)) / 2
        torch.testing.assert_close(block(x), expected)
        assert torch.equal(x, kept)
        kinds = [type(m).__name__ for m in block.branch1]
        assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d"]


def test_stem_of_shake_shake_has_no_relu() -> None:
    model = ShakeShake(8, width=4).eval()
    seen: list[Tensor] = []
    model.layer1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.randn(2, 3, 8, 8))
    assert (seen[0] < 0).any()


class _Fixed(nn.Module):
    """A branch that ignores its input and shows the gradient it gets."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def _shaken_block(images: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output less shortcut, and gradients of both branches and of the output, by a block whose
    branches are 1 and 0."""
    shape = (images, 2, 1, 3)
    block = ShakeShake(14, width=2).double().layer1[1]
    block.branch1 = _Fixed(torch.ones(shape, dtype=torch.float64))
    block.branch2 = _Fixed(torch.zeros(shape, dtype=torch.float64))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = block(x)
    grad = torch.rand(shape, dtype=torch.float64) + 0.5
    out.backward(grad)
    # Nothing of it goes through the branches.
    assert torch.equal(x.grad, grad)
    return (out - x).detach(), block.branch1.value.grad, block.branch2.value.grad, grad


def test_shake_draws_for_every_image_and_anew_for_the_gradient() -> None:
    images = 4000
    out, grad1, grad2, grad = _shaken_block(images)
    alpha = out[:, :1, :1, :1]
    beta = (grad1 / grad)[:, :1, :1, :1]
    torch.testing.assert_close(out, alpha.expand_as(out))
    torch.testing.assert_close(grad1, beta * grad)
    torch.testing.assert_close(grad2, (1 - beta) * grad)
    for draw in (alpha, beta):
        assert draw.min() >= 0 and draw.max() <= 1
        # Uniform: mean 1/2 and variance 1/12, within five standard errors.
        assert draw.mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / images))
        assert draw.var().item() == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / images))
    both = torch.stack((alpha.flatten(), beta.flatten()))
    assert abs(torch.corrcoef(both)[0, 1].item()) < 5 / math.sqrt(images)
    neighbours = torch.stack((alpha.flatten()[1:], alpha.flatten()[:-1]))
    assert abs(torch.corrcoef(neighbours)[0, 1].item()) < 5 / math.sqrt(images)


def test_shake_follows_the_seed() -> None:
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(_shaken_block(5))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not (results[0][0] == results[2][0]).any()
    assert not (results[0][1] == results[2][1]).any()


def test_shake_backward_may_be_repeated() -> None:
    y1, y2 = torch.randn(2, 6, 2, 2, 2).unbind()
    y1.requires_grad_()
    out = shake(y1, y2, training=True)
    first = torch.autograd.grad(out.sum(), y1, retain_graph=True)
    torch.manual_seed(5)
    assert torch.equal(torch.autograd.grad(out.sum(), y1)[0], first[0])


def test_shake_in_evaluation_is_the_mean() -> None:
    y1, y2 = torch.randn(2, 6, 2, 2, 2, requires_grad=True).unbind()
    state = torch.get_rng_state()
    out = shake(y1, y2, training=False)
    torch.testing.assert_close(out, (y1 + y2) / 2)
    grad1, grad2 = torch.autograd.grad(out.sum(), (y1, y2))
    assert (grad1 == 0.5).all() and (grad2 == 0.5).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_shake_draws_the_same_in_all_precisions() -> None:
    draws = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.manual_seed(3)
        y1 = torch.ones(50, 1, 1, 1, dtype=dtype, requires_grad=True)
        out = shake(y1, torch.zeros(50, 1, 1, 1, dtype=dtype), training=True)
        assert out.dtype is dtype
        out.sum().backward()
        assert y1.grad is not None and y1.grad.dtype is dtype
        draws.append(torch.stack((out.detach(), y1.grad)).double())
    torch.testing.assert_close(draws[1], draws[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(draws[2], draws[0], rtol=2**-8, atol=0)


# The compiler of torch 2.11 makes an instance of a class of functions, which torch warns about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_shake_compiles() -> None:
    block = ShakeShake(8, width=4).layer2[0]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 4, 6, 6)
    results = []
    for function in (block, compiled):
        torch.manual_seed(3)
        block.zero_grad()
        inputs = x.clone().requires_grad_()
        out = function(inputs)
        out.square().sum().backward()
        results.append([out.detach(), inputs.grad, *(p.grad for p in block.parameters())])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-4)


# torchvision's networks


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet50", {"width_per_group": 8}),
        ("resnet152", {"width_per_group": 8}),
        ("densenet161", {}),
    ],
)
def test_torchvisions_networks_are_its_own(name: str, options: dict[str, int]) -> None:
    import torchvision.models

    make = getattr(torchvision.models, name)
    with torch.device("meta"):
        theirs = make(num_classes=1000).state_dict()
    ours = on_meta(name, 1000).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    torch.manual_seed(7)
    expected = make(num_classes=3, **options).eval()
    torch.manual_seed(7)
    width = options.get("width_per_group")
    model = build_model(name, in_channels=3, num_classes=3, width=width).eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(images), expected(images))


@pytest.mark.parametrize("name", ["resnet50", "densenet161"])
def test_torchvisions_stem_for_other_images(name: str) -> None:
    model = build_model(name, in_channels=5, num_classes=3, width=8)
    like = build_model(name, in_channels=3, num_classes=3, width=8)
    stem, expected = (
        next(m for m in x.modules() if isinstance(m, nn.Conv2d)) for x in (model, like)
    )
    assert stem.weight.shape == (expected.out_channels, 5, 7, 7)
    assert (stem.stride, stem.padding, stem.bias) == (expected.stride, expected.padding, None)
    # ResNet's scale does not depend on the input's channels, DenseNet's does.
    scale = math.sqrt(3 / 5) if name == "densenet161" else 1
    assert stem.weight.std().item() == pytest.approx(scale * expected.weight.std().item(), rel=0.1)


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    for name in ("resnet50", "resnet152", "densenet161"):
        with pytest.raises(TrainError, match=r"torchvision.*run: pip install .swa_fast\[train\]"):
            build_model(name, in_channels=3, num_classes=10)
    build_model("vgg16", in_channels=3, num_classes=10, width=1)


def test_torchvision_is_imported_late() -> None:
    code = "import sys, swa_fast.train.models; print('torchvision' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


# Trained weights


def narrow(name: str, classes: int = 3) -> nn.Module:
    return build_model(name, in_channels=3, num_classes=classes, width=NARROW[name])


def random_state(name: str) -> dict[str, Tensor]:
    """All values differ from those of new networks, the statistics too."""
    state = narrow(name).state_dict()
    return {k: torch.rand_like(v) if v.is_floating_point() else v + 5 for k, v in state.items()}


def assert_loaded(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[k], v) for k, v in expected.items())


@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_from_a_file(tmp_path: Path, file: str, prefix: str) -> None:
    state = random_state("wrn16-4")
    named = {prefix + k: v for k, v in state.items()}
    if file.endswith(".pth"):
        torch.save(named, tmp_path / file)
    else:
        pytest.importorskip("safetensors.torch").save_file(named, tmp_path / file)
    model = narrow("wrn16-4")
    before = list(model.parameters())
    load_pretrained(model, "wrn16-4", tmp_path / file)
    assert_loaded(model, state)
    # In place: an optimizer or an average may hold the parameters already.
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


def test_load_without_batch_counters(tmp_path: Path) -> None:
    state = random_state("wrn16-4")
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    # The format of the time.
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model = narrow("wrn16-4")
    load_pretrained(model, "wrn16-4", str(tmp_path / "old.pth"))
    kept = {k: torch.zeros_like(v) for k, v in state.items() if k not in old}
    assert_loaded(model, {k: old.get(k, kept.get(k)) for k in state})


def old_densenet_name(key: str) -> str:
    for part in ("norm", "conv"):
        for i in "12":
            key = key.replace(f".{part}{i}.", f".{part}.{i}.") if "denselayer" in key else key
    return key


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's folder of downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("resnet50", "resnet50-0676ba61.pth"),
        ("resnet152", "resnet152-394f9c45.pth"),
        ("densenet161", "densenet161-8d451a50.pth"),
    ],
)
def test_load_torchvisions_first_weights(
    name: str, file: str, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = random_state(name)
    downloads = []

    def download(url: str, target: str, hash_prefix: str | None, progress: bool) -> None:
        downloads.append((url, hash_prefix))
        torch.save({old_densenet_name(k): v for k, v in state.items()}, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        model = narrow(name)
        load_pretrained(model, name)
        assert_loaded(model, state)
    # The second time from the cache. The hash is checked.
    digits = file.removesuffix(".pth").split("-")[1]
    assert downloads == [(f"https://download.pytorch.org/models/{file}", digits)]
    assert (hub / file).exists()
    if name == "densenet161":
        assert any(".norm.1." in k for k in torch.load(hub / file))


@pytest.mark.parametrize(
    "error",
    [URLError("no route to host"), RuntimeError('invalid hash value (expected "0676ba61")')],
)
def test_failed_download(hub: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(TrainError, match=r"models/resnet50-\w+\.pth: .*(no route|invalid hash)"):
        load_pretrained(narrow("resnet50"), "resnet50")


def test_no_weights_of_that_name() -> None:
    with pytest.raises(TrainError, match=r"resnet50, resnet152, densenet161.* found 'vgg16'"):
        load_pretrained(narrow("vgg16"), "vgg16")


def _refused(tmp_path: Path, content: object, message: str, file: str = "weights.pth") -> None:
    path = tmp_path / file
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    model = narrow("wrn16-4")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(TrainError, match=message) as caught:
        load_pretrained(model, "wrn16-4", path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert_loaded(model, before)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    message = (
        r"expected the weights of this wrn16-4, found missing: conv1\.weight, conv1\.bias, "
        r"layer1\.0\.bn1\.weight and \d+ more; unexpected: features\.0\.weight, "
        r"features\.0\.bias, features\.2\.weight and \d+ more$"
    )
    _refused(tmp_path, narrow("vgg16").state_dict(), message)
    _refused(tmp_path, {}, r"found missing: conv1\.weight, .* and \d+ more$")


def test_weights_of_other_classes_are_refused(tmp_path: Path) -> None:
    message = (
        r"wrn16-4, found of another shape: fc\.weight \(expected \[3, 32\], found \[4, 32\]\), "
        r"fc\.bias \(expected \[3\], found \[4\]\)$"
    )
    _refused(tmp_path, narrow("wrn16-4", classes=4).state_dict(), message)


def test_part_of_the_weights_is_refused(tmp_path: Path) -> None:
    state = random_state("wrn16-4")
    del state["layer2.0.bn2.running_var"]
    _refused(tmp_path, state, r"found missing: layer2\.0\.bn2\.running_var$")
    _refused(
        tmp_path, random_state("wrn16-4") | {"extra": torch.ones(1)}, "found unexpected: extra$"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "EOFError"),
        (b"x" * 100, "cannot be read"),
        (pickle.dumps(print), "cannot be read"),
        (None, "No such file"),
        ([1, 2], r"expected a state_dict \(tensors by name\), found list"),
        ({"state_dict": {}, "epoch": 3}, "found dict with state_dict, epoch"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: object, message: str) -> None:
    _refused(tmp_path, content, message)


@pytest.mark.parametrize("content", [b"", b"x" * 100, None])
def test_other_safetensors_are_refused(tmp_path: Path, content: bytes | None) -> None:
    pytest.importorskip("safetensors.torch")
    _refused(tmp_path, content, "cannot be read", "weights.safetensors")


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    _refused(tmp_path, b"x", "run: pip install safetensors$", "weights.safetensors")


# Multiply-adds


def test_forward_macs_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    assert forward_macs(model, (4, 7, 9)) == 7 * 9 * 6 * 2 * 9 + 6 * 5


def test_forward_macs_changes_nothing() -> None:
    model = build_model("shakeshake26-2x64d", in_channels=3, num_classes=10, width=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    assert forward_macs(model, (3, 8, 8)) > 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert_loaded(model, before)


# Bad arguments


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"model: expected one of vgg16, .* found 'resnet'"):
        build_model("resnet", in_channels=3, num_classes=10, width=16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 21}, r"depth: expected 6n \+ 2 .* found 21"),
        ({"depth": 2}, r"depth: expected 6n \+ 2 .* found 2"),
        ({"depth": 112}, r"depth: expected 9n \+ 2 .* found 112"),
    ],
)
def test_bad_depth_of_preresnet(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreResNet(**arguments)


@pytest.mark.parametrize(
    ("build", "form", "depths"),
    [
        (WideResNet, r"6n \+ 4", (4, 26, 2)),
        (ShakeShake, r"6n \+ 2", (2, 27)),
        (PyramidNet, r"9n \+ 2", (2, 110 + 6)),
    ],
)
def test_bad_depth(build: Callable[..., nn.Module], form: str, depths: tuple[int, ...]) -> None:
    for depth in depths:
        with pytest.raises(ValueError, match=rf"depth: expected {form} .* found {depth}"):
            build(depth)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("argument", ["in_channels", "num_classes", "width"])
def test_bad_sizes(name: str, argument: str) -> None:
    arguments = {"in_channels": 3, "num_classes": 10, "width": 4, argument: 0}
    with pytest.raises(ValueError, match=rf"{argument}: expected [12] or more, found 0"):
        build_model(name, **arguments)
