"""SWAG: the kernel's moments and columns, samples, resume, predictions."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BACKENDS, extended, need, unaligned
from test_hooks import at_every_line
from torch import Tensor, nn

from swa_fast import SWAG
from swa_fast.swag import predict

backends = pytest.mark.parametrize("backend, device", BACKENDS)


def sources(dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Around packs and segments, unaligned, channels-last, strided, 0-dim and empty."""
    values = {
        "small": torch.randn(7), "odd": unaligned(torch.randn(1021)), "long": torch.randn(5003),
        "conv": torch.randn(5, 3, 3, 3).to(memory_format=torch.channels_last),
        "strided": torch.randn(6, 10)[:, ::2], "scalar": torch.randn(()), "empty": torch.randn(0),
        "whole": torch.randn(4096),
    }  # fmt: skip
    result = {}
    for name, tensor in values.items():
        moved = tensor.to(device, dtype)
        result[name] = unaligned(moved) if name == "odd" else moved
    return result


@backends
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_moments_and_columns(backend: str, device: str, dtype: torch.dtype) -> None:
    need(backend, device)
    live = sources(dtype, device)
    swag = SWAG(live.items(), k=3, backend=backend)
    seen: list[dict[str, np.ndarray]] = []
    means: list[dict[str, np.ndarray]] = []
    for _ in range(5):
        for tensor in live.values():
            tensor.copy_((torch.randn(tensor.shape, dtype=torch.float64) + 3).to(dtype))
        swag.update()
        seen.append({name: extended(tensor).copy() for name, tensor in live.items()})
        means.append({name: np.mean([s[name] for s in seen], axis=0) for name in live})
    assert swag.n_averaged == 5
    variance, deviations, square = swag.variance(), swag.deviations(), swag.sq_mean()
    for name, tensor in swag.mean.items():
        if tensor.numel() == 0:
            continue
        eps = torch.finfo(tensor.dtype).eps
        stored = np.stack([s[name] for s in seen])
        assert np.abs(extended(tensor) - stored.mean(0)).max() < 8 * eps * 4
        assert np.abs(extended(variance[name]) - stored.var(0)).max() < 64 * eps * 4
        assert np.abs(extended(square[name]) - (stored**2).mean(0)).max() < 64 * eps * 16
        assert deviations[name].shape == (3, *tensor.shape)
        for i, column in zip((2, 3, 4), deviations[name], strict=True):
            exact = seen[i][name] - means[i][name]
            assert np.abs(extended(column) - exact).max() < 16 * eps * 4, (name, i)


@backends
def test_known_numbers(backend: str, device: str) -> None:
    """Iterates 1, 2, 4: mean 7/3, variance 14/9, and what three columns add to a sample's."""
    need(backend, device)
    weight = torch.zeros(3, device=device)
    swag = SWAG([("w", weight)], k=3, backend=backend)
    for value in (1.0, 2.0, 4.0):
        weight.fill_(value)
        swag.update()
    assert swag.mean["w"].tolist() == pytest.approx([7 / 3] * 3, rel=1e-6)
    assert swag.variance()["w"].tolist() == pytest.approx([14 / 9] * 3, rel=1e-6)
    columns = swag.deviations()["w"][:, 0]
    assert columns.tolist() == pytest.approx([0, 0.5, 5 / 3], rel=1e-6)
    low_rank = float(columns.square().sum()) / 2
    assert low_rank == pytest.approx(1.513889, abs=1e-6)
    assert (14 / 9 + low_rank) / 2 == pytest.approx(1.534722, abs=1e-6)


def test_samples_have_the_gaussian_s_moments() -> None:
    """Many weights with the same iterates are many draws of z1, many seeds of z2."""
    weight = torch.zeros(500)
    swag = SWAG([("w", weight)], k=3)
    for value in (1.0, 2.0, 4.0):
        weight.fill_(value)
        swag.update()
    for scale, expected in ((0.5, 1.534722), (1.0, 2 * 1.534722)):
        draws = torch.stack([swag.sample(scale=scale, seed=s)["w"] for s in range(800)]).double()
        # Within a draw, z2 is common: the diagonal's part alone. Between means of draws, the rest.
        assert draws.var(1).mean().item() == pytest.approx(scale * 14 / 9, rel=0.01)
        between = draws.mean(1).var().item() - scale * 14 / 9 / 500
        assert between == pytest.approx(expected - scale * 14 / 9, rel=4 * math.sqrt(2 / 800))
        assert draws.mean().item() == pytest.approx(7 / 3, abs=4 * math.sqrt(expected / 800))
    assert swag.sample(scale=0, seed=1)["w"].tolist() == pytest.approx([7 / 3] * 500)
    assert torch.equal(swag.sample(seed=5)["w"], swag.sample(seed=5)["w"])
    assert not torch.equal(swag.sample(seed=5)["w"], swag.sample(seed=6)["w"])


def test_small_variance_is_not_cancelled() -> None:
    """Weights of 0.1 with a deviation of 1e-4, where E[w^2] - E[w]^2 is wrong by percents."""
    generator = torch.Generator().manual_seed(0)
    iterates = 0.1 + 1e-4 * torch.randn(300, 200, generator=generator, dtype=torch.float64)
    weight = torch.zeros(200)
    swag = SWAG([("w", weight)], k=2)
    square, mean = torch.zeros(200), torch.zeros(200)
    for n, iterate in enumerate(iterates.float()):
        weight.copy_(iterate)
        swag.update()
        square += (iterate**2 - square) / (n + 1)
        mean += (iterate - mean) / (n + 1)
    exact = iterates.float().double().var(0, correction=0)
    ours = ((swag.variance()["w"].double() - exact) / exact).abs().max().item()
    theirs = (((square - mean**2).double() - exact) / exact).abs().max().item()
    assert ours < 2e-3 < theirs / 10


@backends
def test_resumes_to_the_bit(backend: str, device: str) -> None:
    need(backend, device)
    values = [torch.randn(1021) for _ in range(7)]

    def run(swag: SWAG, weight: Tensor, values: list[Tensor]) -> None:
        for value in values:
            weight.copy_(value)
            swag.update()

    weight = torch.zeros(1021, device=device)
    through = SWAG([("w", weight)], k=3, backend=backend)
    run(through, weight, values)
    for cut in (1, 4):
        first = SWAG([("w", weight)], k=3, backend=backend)
        run(first, weight, values[:cut])
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        resumed = SWAG([("w", weight)], k=3, backend=backend)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        run(resumed, weight, values[cut:])
        for row, tensors in through.state_dict()["rows"].items():
            assert torch.equal(resumed.state_dict()["rows"][row]["w"], tensors["w"]), row
        assert torch.equal(resumed.sample(seed=1)["w"], through.sample(seed=1)["w"])


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    weight = torch.randn(5)
    swag = SWAG([("w", weight)], k=2)
    swag.update()
    before = {row: t["w"].clone() for row, t in swag.state_dict()["rows"].items()}
    good = swag.state_dict()
    rows = good["rows"]
    for change, message in (
        ({"k": 3}, "k=3"),
        ({"format": 2}, "format 2"),
        ({"n_averaged": -1}, "n_averaged of at least 0, found -1"),
        ({"rows": {**rows, "mean": {}}}, "mean of w does not fit: expected .* found nothing"),
        ({"rows": {**rows, "squares": {"w": torch.zeros(4)}}}, r"squares of w .* found \(4,\)"),
        ({"rows": {**rows, "mean": {"w": torch.zeros(5), "v": weight}}}, "mean of v"),
    ):
        with pytest.raises(ValueError, match=message):
            swag.load_state_dict({**good, **change})
        for row, tensors in swag.state_dict()["rows"].items():
            assert torch.equal(tensors["w"], before[row])
    del good["rows"]
    with pytest.raises(ValueError, match="keys"):
        swag.load_state_dict(good)


def test_sampled_gives_the_weights_back() -> None:
    model = nn.Linear(3, 4)
    swag = SWAG(model, k=2)
    for _ in range(3):
        with torch.no_grad():
            model.weight.add_(1)
        swag.update()
    before = model.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), swag.sampled(seed=3):
        assert torch.equal(model.weight, swag._row(-1)["weight"]) is False
        drawn = model.weight.detach().clone()
        for call in (swag.update, swag.state_dict, lambda: swag.sample(seed=1)):
            with pytest.raises(RuntimeError, match="a sample is in the model's place"):
                call()
        raise ZeroDivisionError
    assert torch.equal(model.weight, before)
    assert torch.equal(swag.sample(seed=3)["weight"], drawn)


def test_replaced_parameters_are_followed() -> None:
    model = nn.Linear(3, 4)
    swag = SWAG(model, k=2)
    swag.update()
    model.weight = nn.Parameter(torch.full((4, 3), 5.0))
    swag.update()
    assert swag.deviations()["weight"].shape == (2, 4, 3)
    model.weight = nn.Parameter(torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"weight: expected \(4, 3\), found \(4, 5\)"):
        swag.update()
    assert swag.n_averaged == 2


def moves() -> dict[str, Callable[[Tensor], object]]:
    def data(t: Tensor) -> None:
        t.data = t.data.clone()

    return {
        "share_memory_": lambda t: t.share_memory_(),
        "set_": lambda t: t.set_(t.clone()),
        "data": data,
        "swapped": lambda t: torch.utils.swap_tensors(t, t.clone()),
        "retyped": lambda t: setattr(t, "data", t.data.half()),
        "reshaped": lambda t: setattr(t, "data", t.data.view(16)),
    }


@pytest.mark.parametrize("change", list(moves()))
@pytest.mark.parametrize("seen", ["mean", "state_dict"])
def test_rows_that_move_are_followed_or_refused(seen: str, change: str) -> None:
    weights = [torch.randn(4, 4) for _ in range(2)]
    moved, plain = (SWAG([("w", weight)], k=2) for weight in weights)

    def update() -> None:
        values = torch.randn(4, 4)
        for weight, swag in zip(weights, (moved, plain), strict=True):
            weight.copy_(values)
            swag.update()

    for _ in range(2):
        update()
    rows = [moved.mean["w"]]
    if seen == "state_dict":
        rows = [tensors["w"] for tensors in moved.state_dict()["rows"].values()]
    for row in rows:
        moves()[change](row)
    if change in ("retyped", "reshaped"):
        for call in (moved.update, lambda: moved.sample(seed=0)):
            with pytest.raises(ValueError, match="the average of w: "):
                call()
        return
    assert torch.equal(moved.sample(seed=3)["w"], plain.sample(seed=3)["w"])
    for _ in range(3):
        update()
    for found, expected in zip(moved.state_dict()["rows"].values(),
                               plain.state_dict()["rows"].values(), strict=True):  # fmt: skip
        assert torch.equal(found["w"], expected["w"])
    assert torch.equal(moved.mean["w"], plain.mean["w"])
    assert torch.equal(moved.sample(seed=4)["w"], plain.sample(seed=4)["w"])
    with moved.sampled(seed=4):
        assert torch.equal(weights[0], plain.sample(seed=4)["w"])
    assert torch.equal(weights[0], weights[1])
    moved.load_state_dict(plain.state_dict())
    update()
    assert torch.equal(moved.mean["w"], plain.mean["w"])


def test_follows_an_optimiser() -> None:
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    swag = SWAG(model, k=4)
    with swag.attach(optimizer, every=2):
        for i in range(6):
            model.zero_grad()
            model(torch.ones(2, 3)).square().mean().backward()
            optimizer.found_inf = torch.full((1,), float(i == 1))
            optimizer.step()
    assert swag.n_averaged == 2


def test_what_is_refused() -> None:
    for make, error, message in (
        (lambda: SWAG(nn.Linear(2, 2), k=1), ValueError, "k: expected an integer of at least 2"),
        (lambda: SWAG(nn.Linear(2, 2), filter="x"), ValueError, "expected at least one parameter"),
        (
            lambda: SWAG([torch.zeros(2, dtype=torch.complex64)]),
            TypeError, "0: expected float32, float64, bfloat16 or float16, found torch.complex64",
        ),
        (lambda: SWAG([torch.zeros(2)]).module, ValueError, "found one of tensors"),
        (lambda: SWAG([torch.zeros(2)]).sample(seed=0), RuntimeError, "at least 2 iterates"),
        (lambda: SWAG([torch.zeros(2)]).sample(seed=0, scale=-1), ValueError, "scale"),
        (lambda: predict(SWAG(nn.Linear(2, 2)), [], samples=0), ValueError, "samples"),
        (
            lambda: predict(SWAG(nn.BatchNorm1d(2)), []),
            ValueError, "bn_loader: expected one for a model with BatchNorm",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            make()


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_predictions_average_samples_of_several() -> None:
    batches = [torch.randn(8, 3) for _ in range(4)]
    several = []
    for _ in range(2):
        model = Classifier().train()
        swag = SWAG(model, k=3)
        for _ in range(4):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
            swag.update()
        several.append(swag)
    before = [{n: t.clone() for n, t in swag.module.state_dict().items()} for swag in several]
    found = predict(several, batches, samples=2, seed=7, bn_loader=batches)
    assert found.shape == (32, 4)
    torch.testing.assert_close(found.sum(1), torch.ones(32))
    expected = torch.zeros(32, 4)
    for swag in several:
        for seed in (7, 8):
            model = Classifier().train()
            model.load_state_dict(swag.sample(seed=seed), strict=False)
            torch.optim.swa_utils.update_bn(batches, model)
            with torch.no_grad():
                expected += model.eval()(torch.cat(batches)).softmax(-1) / 4
    torch.testing.assert_close(found, expected)
    for swag, state in zip(several, before, strict=True):
        assert swag.module.training
        for name, tensor in swag.module.state_dict().items():
            assert torch.equal(tensor, state[name]), name
    with pytest.raises(ValueError, match="at least one batch"):
        predict(several, [], samples=1, bn_loader=batches)


def test_a_failing_update_is_whole_or_nothing() -> None:
    def make() -> tuple[Callable[[], object], Callable[[], None]]:
        weight = torch.randn(5)
        swag = SWAG([("w", weight)], k=2)
        for _ in range(2):
            swag.update()
            weight.add_(1)
        mean, n, live = swag.mean["w"].clone(), swag.n_averaged, weight.clone()

        def check() -> None:
            assert swag.n_averaged == n + (not torch.equal(swag.mean["w"], mean))
            assert torch.equal(weight, live)

        return swag.update, check

    assert at_every_line(make) > 5


@backends
def test_opcheck(backend: str, device: str) -> None:
    need(backend, device)
    live = [torch.randn(33).bfloat16().to(device), torch.randn(5).to(device)]
    swag = SWAG(live, k=2, backend=backend)
    (part,), (plan,) = swag._storage.parts, swag._storage.plans
    engine, table = part.engine, plan.update
    found, steps = torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    arguments = (
        table.averages, table.sources, engine.n_averaged[:1], engine.counters, table.words,
        table.pairs, 2, table.short, found, steps, 2, 0,
    )  # fmt: skip
    torch.library.opcheck(
        getattr(torch.ops.swa_fast.swag_, backend), arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


def test_raw_operator_checks_its_arguments() -> None:
    need("cpu", "cpu")
    swag = SWAG([torch.randn(5)], k=2, backend="cpu")
    (part,), (plan,) = swag._storage.parts, swag._storage.plans
    table, n, counters = plan.update, part.engine.n_averaged, part.engine.counters
    good = [[], [], n[:1], counters, table.words, table.pairs, 2]
    torch.ops.swa_fast.swag_.cpu(*good)
    for at, bad, message in (
        (2, n, "n_averaged must hold one int64"),
        (3, torch.zeros(2, dtype=torch.int64), "counters must hold 3 int64"),
        (4, torch.zeros(1, 6, dtype=torch.int64), r"table must be int64 of shape \[segments, 7"),
        (5, 1 << 4, "expected averages of fp32 or fp64"),
        (6, 0, "expected 1 column or more, found 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.swa_fast.swag_.cpu(*good[:at], bad, *good[at + 1 :])
    with pytest.raises(RuntimeError, match="found_inf must hold one fp32"):
        torch.ops.swa_fast.swag_.cpu(*good, 0, torch.zeros(1, dtype=torch.int64))


def test_a_load_that_fails_is_whole_or_nothing() -> None:
    weight = torch.randn(5)
    other = SWAG([("w", weight + 1)], k=2)
    for _ in range(3):
        other.update()
    state = other.state_dict()

    def make() -> tuple[Callable[[], object], Callable[[], None]]:
        swag = SWAG([("w", weight)], k=2)
        swag.update()
        rows = {row: t["w"].clone() for row, t in swag.state_dict()["rows"].items()}

        def check() -> None:
            found = swag.state_dict()
            whole = found["n_averaged"] == 3
            assert whole or found["n_averaged"] == 1
            for row, tensors in found["rows"].items():
                assert torch.equal(tensors["w"], state["rows"][row]["w"] if whole else rows[row])

        return lambda: swag.load_state_dict(state), check

    assert at_every_line(make, "swag.py") > 20


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "reference"])
def test_rows_on_the_cpu_of_a_model_on_a_gpu(backend: str | None) -> None:
    weight = torch.zeros(40, device="cuda")
    there = SWAG([("w", weight)], k=2, device="cpu", backend=backend)
    here = SWAG([("w", weight)], k=2)
    for value in (1.0, 3.0, 2.0):
        weight.fill_(value)
        there.update()
        here.update()
    assert there.mean["w"].device.type == "cpu"
    for theirs, ours in ((there.mean, here.mean), (there.variance(), here.variance())):
        torch.testing.assert_close(theirs["w"], ours["w"].cpu())
    with there.sampled(seed=1):
        torch.testing.assert_close(weight.cpu(), there._storage.live[0].cpu())
        assert float(weight.std()) > 0
    assert weight.tolist() == [2.0] * 40


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_one_launch_and_24_bytes(simulator: Any, backend: str) -> None:
    weight = torch.randn(1 << 18).to("cuda")
    swag = SWAG([("w", weight)], k=20, backend=backend)
    for _ in range(2):
        swag.update()
    torch.cuda.synchronize()
    simulator.reset()
    swag.update()
    counters = simulator.counters()
    assert {k: v for k, v in counters["total"].items() if v} == {"kernel_launches": 1}
    ((_, kernel),) = counters["kernels"].items()
    assert (kernel["ld_bytes"] + kernel["st_bytes"]) / weight.numel() <= 24.5
    assert kernel["ld_efficiency"] >= 0.98 and kernel["st_efficiency"] >= 0.98
    assert kernel["widest_ld"] == kernel["widest_st"] == 16 and kernel["local_bytes"] == 0
