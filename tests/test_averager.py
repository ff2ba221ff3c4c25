"""The Averager: rules, storage, detection of changes, swap, resume; all backends, one suite."""

from __future__ import annotations

import copy
import gc
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    BACKENDS,
    DTYPES,
    Net,
    assert_as_accurate,
    extended,
    need,
    of_dtype,
    raw_arguments,
    snapshot,
    step,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import swa_fast
from swa_fast import EMA, SWA, Averager, Warmup, _backends, _gather, reference
from swa_fast._watch import Watch

backends = pytest.mark.parametrize("backend, device", BACKENDS)
RULES = {"swa": SWA(), "ema": EMA(0.9), "long": EMA(0.99, warmup="diffusers")}


def is_averaged(name: str, tensor: Tensor, buffers: str) -> bool:
    is_buffer = name.startswith("bn.running") or name in ("bn.num_batches_tracked", "mask")
    numeric = tensor.is_floating_point() or tensor.is_complex()
    return numeric and (not is_buffer or buffers == "average")


# What becomes of buffers is decided on the host. Triton's interpreter, which takes seconds a case,
# sees all that the kernel can be told with the one choice: averaged and copied tensors.
BACKENDS_AND_BUFFERS = [
    pytest.param(*backend.values, buffers, id=f"{backend.id}-{buffers}", marks=backend.marks)
    for backend in BACKENDS
    for buffers in ("copy", "average", "skip")
    if backend.id != "triton-interpreted" or buffers == "average"
]


@pytest.mark.parametrize(("backend", "device", "buffers"), BACKENDS_AND_BUFFERS)
@pytest.mark.parametrize("source_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, None, torch.float16])
def test_every_average_follows_its_rule(
    backend: str, device: str, buffers: str, source_dtype: torch.dtype, dtype: torch.dtype | None
) -> None:
    need(backend, device)
    model = of_dtype(Net(), source_dtype).to(device)
    averager = Averager(model, RULES, dtype=dtype, buffers=buffers, backend=backend)
    exact: dict[str, dict[str, np.ndarray]] = {rule: {} for rule in RULES}
    by_torch: dict[str, dict[str, Tensor]] = {rule: {} for rule in RULES}
    for n in range(4):
        step(model)
        averager.update()
        for (rule, how), (name, tensor) in itertools.product(
            RULES.items(), model.state_dict().items()
        ):
            w = how.weight(n) if is_averaged(name, tensor, buffers) else 1.0
            now = tensor.cpu()
            if w == 1.0:
                exact[rule][name] = extended(now)
                by_torch[rule][name] = now.to(averager.averages[rule][name].dtype) if (
                    name in averager.averages[rule]
                ) else now  # fmt: skip
            else:
                exact[rule][name] = exact[rule][name] + np.longdouble(w) * (
                    extended(now) - exact[rule][name]
                )
                old = by_torch[rule][name]
                by_torch[rule][name] = torch.lerp(old, now.to(old.dtype), w)
    assert averager.n_averaged == dict.fromkeys(RULES, 4)
    for rule in RULES:
        averages = averager.averages[rule]
        expected = set(model.state_dict())
        if buffers == "skip":
            expected -= {name for name, _ in model.named_buffers()}
        assert set(averages) == expected
        by_dtype: dict[torch.dtype, list[str]] = {}
        for name, average in averages.items():
            if is_averaged(name, average, buffers):
                by_dtype.setdefault(average.dtype, []).append(name)
            else:
                assert torch.equal(average.cpu(), by_torch[rule][name]), name
        for names in by_dtype.values():
            assert_as_accurate(
                [averages[k].cpu() for k in names], [by_torch[rule][k] for k in names],
                [exact[rule][k] for k in names], f"{rule} {names}",
            )  # fmt: skip


@backends
@pytest.mark.parametrize(
    "rule",
    [
        SWA(), EMA(0.0), EMA(0.75), EMA(1.0), EMA(half_life=3), EMA(0.95, warmup="timm"),
        EMA(0.9, warmup="diffusers"), EMA(0.9999, warmup="diffusers-inverse-gamma"),
        EMA(0.8, warmup=Warmup(gamma=2.5, power=0.75, min_decay=0.3, update_after_step=4)),
        EMA(0.9, warmup=Warmup(gamma=None, update_after_step=3)),
    ],
    ids=str,
)  # fmt: skip
def test_weights_on_the_device_are_the_rule_s(backend: str, device: str, rule: object) -> None:
    """The average of 0, 1, 1, 1, ... in fp64 tells every weight."""
    need(backend, device)
    source = torch.zeros(3, dtype=torch.float64, device=device)
    averager = Averager([source], {"a": rule}, backend=backend)
    expected = 0.0
    for n in range(12):
        averager.update()
        expected += rule.weight(n) * (float(n > 0) - expected)
        found = averager.averages["a"]["0"].tolist()
        assert found == pytest.approx([expected] * 3, rel=1e-12, abs=0), n
        source.fill_(1.0)


def test_presets_are_the_other_systems_formulas() -> None:
    """Written out from their documentation; step is theirs, n + 1 here."""

    def inverse_gamma(step: int, decay: float, after: int) -> float:
        s = max(0, step - after - 1)
        return 0.0 if s <= 0 else min(1 - (1 + s / 1.0) ** -(2 / 3), decay)

    def ratio(step: int, decay: float) -> float:
        s = max(0, step - 1)
        return 0.0 if s <= 0 else min((1 + s) / (10 + s), decay)

    for n in (0, 1, 2, 9, 99, 100, 101, 5000, 10**6):
        for decay in (0.9, 0.9999):
            for preset, theirs in (
                ("timm", inverse_gamma(n + 1, decay, 0)),
                ("diffusers-inverse-gamma", inverse_gamma(n + 1, decay, 0)),
                ("ema-pytorch", inverse_gamma(n + 1, decay, 100)),
                ("diffusers", ratio(n + 1, decay)),
            ):
                assert 1 - EMA(decay, warmup=preset).weight(n) == pytest.approx(theirs, abs=1e-15)


def test_preset_against_timm() -> None:
    timm = pytest.importorskip("timm.utils.model_ema", exc_type=ImportError)
    theirs = timm.ModelEmaV3(nn.Linear(1, 1), decay=0.999, use_warmup=True)
    for n in range(2000):
        found = 1 - EMA(0.999, warmup="timm").weight(n)
        assert found == pytest.approx(theirs.get_decay(n + 1), abs=2**-52)


@pytest.mark.parametrize("preset", ["diffusers", "diffusers-inverse-gamma"])
def test_preset_against_diffusers(preset: str) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils", exc_type=ImportError)
    theirs = training_utils.EMAModel(
        [nn.Parameter(torch.zeros(1))], decay=0.999, use_ema_warmup=preset != "diffusers"
    )
    for n in range(2000):
        found = 1 - EMA(0.999, warmup=preset).weight(n)
        assert found == pytest.approx(theirs.get_decay(n + 1), abs=2**-52)


def test_preset_against_ema_pytorch() -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch", exc_type=ImportError)
    model = nn.Linear(1, 1)
    theirs = ema_pytorch.EMA(model, beta=0.999, update_every=1)
    for n in range(300):
        theirs.update()
        expected = theirs.get_current_decay()
        found = 1 - EMA(0.999, warmup="ema-pytorch").weight(n)
        assert found == pytest.approx(float(expected), abs=1e-6), n  # theirs is fp32


def test_rules_refuse() -> None:
    for make, message in (
        (lambda: EMA(), "exactly one of the two"),
        (lambda: EMA(0.9, half_life=3), "exactly one of the two"),
        (lambda: EMA(1.5), r"decay: expected a number in \[0, 1\], found 1.5"),
        (lambda: EMA(math.nan), "decay"),
        (lambda: EMA(half_life=0), "half_life: expected a number above 0, found 0"),
        (lambda: EMA(0.9, warmup="tim"), "warmup: expected a Warmup or one of timm, diffusers"),
        (lambda: EMA(0.5, warmup=Warmup(min_decay=0.6)), "min_decay 0.6 exceeds the decay 0.5"),
        (lambda: Warmup(gamma=0), "gamma"),
        (lambda: Warmup(power=-1), "power"),
        (lambda: Warmup(min_decay=2), "min_decay"),
        (lambda: Warmup(update_after_step=-1), "update_after_step"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shapes=st.lists(st.lists(st.integers(0, 70), max_size=3), min_size=1, max_size=12),
    shift=st.integers(0, 3),
    rows=st.integers(1, 4),
)
def test_any_shapes_and_bases(shapes: list[list[int]], shift: int, rows: int) -> None:
    sources = []
    for shape in shapes:
        base = torch.randn(math.prod(shape) + shift)
        sources.append(base[shift:].view(shape))
    rules = {str(i): EMA(0.5 + 0.1 * i) for i in range(rows)}
    fast, plain = (Averager(sources, rules, backend=b) for b in (None, "reference"))
    for _ in range(3):
        for source in sources:
            source.add_(torch.randn(source.shape))
        fast.update()
        plain.update()
    for name in rules:
        for left, right in zip(
            fast.averages[name].values(), plain.averages[name].values(), strict=True
        ):
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


@backends
def test_sixteen_averages_of_tensors_longer_than_a_run(backend: str, device: str) -> None:
    need(backend, device)
    size = 9001 if device == "cuda" or backend != "triton" else 4500
    sources = [torch.randn(size).to(device), torch.randn(size + 1).to(device)[1:]]
    rules = {str(i): EMA(i / 16) for i in range(16)}
    averager = Averager(sources, rules, backend=backend)
    first = [s.clone() for s in sources]
    averager.update()
    for source in sources:
        source.copy_(torch.randn(size))
    averager.update()
    for name, rule in rules.items():
        for at, source in enumerate(sources):
            expected = torch.lerp(first[at], source, rule.weight(1))
            torch.testing.assert_close(averager.averages[name][str(at)], expected)


def test_storage_is_flat_aligned_and_of_one_dtype() -> None:
    averager = Averager(Net(), RULES, dtype=None)
    views = [v for average in averager.averages.values() for v in average.values() if v.numel()]
    storages = {v.dtype: v.untyped_storage().data_ptr() for v in views}
    for view in views:
        assert view.data_ptr() % 128 == 0
        assert view.untyped_storage().data_ptr() == storages[view.dtype]
    assert len(set(storages.values())) == len(storages)
    memory = sum(rows.numel() * rows.element_size() for rows in averager._memory)
    exact = sum(v.numel() * v.element_size() for v in views)
    assert memory <= exact + 128 * len(views)
    averages = averager.averages["ema"]
    assert averages["out.weight"].data_ptr() == averages["embed.weight"].data_ptr()
    Net().load_state_dict(averages)


@backends
def test_same_result_every_time(backend: str, device: str) -> None:
    need(backend, device)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        model = Net().to(device)
        averager = Averager(model, RULES, backend=backend)
        for _ in range(3):
            step(model)
            averager.update()
        results.append(averager.averages)
    for rule, name in itertools.product(RULES, results[0]["swa"]):
        assert torch.equal(results[0][rule][name], results[1][rule][name])


@pytest.mark.parametrize("extension", [True, False], ids=["C++ watch", "Python watch"])
def test_changes_of_the_model_are_noticed(extension: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if extension:
        need("cpu", "cpu")
    else:
        monkeypatch.setattr(_backends, "cpu_library", lambda: None)
    model = Net()
    averager = Averager(model, {"swa": SWA()})

    def data(m: Net) -> None:
        m.frozen.data = torch.randn(4097)

    def replaced(m: Net) -> None:
        m.conv.weight = nn.Parameter(torch.randn(5, 3, 3, 3))

    def module_replaced(m: Net) -> None:
        m.bn = nn.BatchNorm2d(5)

    def memory_format(m: Net) -> None:
        m.conv.to(memory_format=torch.contiguous_format)

    def retyped(m: Net) -> None:
        m.turned.data = m.turned.data.to(torch.bfloat16)

    def same_memory_other_strides(m: Net) -> None:
        m.turned.data = m.turned.data.as_strided((129, 33), (33, 1))

    def assigned(m: Net) -> None:
        moved = {k: (v + 1).to(v.dtype) for k, v in m.state_dict().items()}
        m.load_state_dict(moved, assign=True)
        m.out.weight = m.embed.weight

    def nothing(m: Net) -> None:
        pass

    history = []
    for change in (
        nothing, data, memory_format, replaced, module_replaced, retyped,
        same_memory_other_strides, assigned, nothing,
    ):  # fmt: skip
        step(model)
        change(model)
        watch = averager._storage._watch
        assert watch is not None
        assert watch.holds() == (change is nothing), change
        averager.update()
        assert (averager._storage._watch is watch) == (change is nothing)
        history.append({k: v.double() for k, v in snapshot(model).items() if v.is_floating_point()})
    for name in history[0]:
        if is_averaged(name, model.state_dict()[name], "copy"):
            values = torch.stack([h[name] for h in history])
            # One fp32 rounding of weight, difference and result at each update.
            allowed = len(history) * 2**-23 * values.abs().max().item() if values.numel() else 0
            found = averager.averages["swa"][name].double()
            torch.testing.assert_close(found, values.mean(0), rtol=0, atol=allowed)


def test_misfits_are_named_together_and_nothing_is_written() -> None:
    model = Net()
    averager = Averager(model, {"swa": SWA()})
    averager.update()
    before = {k: v.clone() for k, v in averager.averages["swa"].items()}
    step(model)
    original = copy.deepcopy(model)
    model.extra = nn.Parameter(torch.zeros(2))
    del model.scalar
    model.frozen = nn.Parameter(torch.zeros(3))
    model.phase = nn.Parameter(torch.zeros(3, 5))
    model.out.weight = nn.Parameter(torch.zeros(7, 13))
    with pytest.raises(ValueError) as caught:
        averager.update()
    for line in (
        "extra: in the model, not in the average",
        "scalar: in the average, not in the model",
        "frozen: shape (4097,) in the average, (3,) in the model",
        "phase: torch.complex64 in the average, torch.float32 in the model",
        "out.weight: tied to embed.weight in the average, not in the model",
    ):
        assert line in str(caught.value)
    for name, value in averager.averages["swa"].items():
        assert torch.equal(value, before[name])
    assert averager.n_averaged == {"swa": 1}
    # The model is mended, and the average goes on.
    del model.extra
    model.scalar, model.frozen, model.phase = original.scalar, original.frozen, original.phase
    model.out.weight = model.embed.weight
    averager.update()
    assert averager.n_averaged == {"swa": 2}


def test_constructor_refuses() -> None:
    model = nn.Linear(3, 2)
    for arguments, error, message in (
        ({"averages": {}}, ValueError, "expected 1 to 16 rules, found 0"),
        ({"averages": {str(i): SWA() for i in range(17)}}, ValueError, "found 17"),
        ({"averages": {"a": 0.9}}, TypeError, r"averages\['a'\]: expected SWA, EMA or a function"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected None or one of .* found torch.int8"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of cuda, triton"),
        ({"buffers": "keep"}, ValueError, r"buffers: expected one of .* found 'keep'"),
        ({"rounding": "up"}, ValueError, "rounding: expected one of"),
        ({"on_nonfinite": "stop"}, ValueError, "on_nonfinite: expected one of"),
        ({"rounding": "stochastic"}, ValueError, "expected dtype torch.bfloat16, found torch.flo"),
        ({"filter": "absent"}, ValueError, "expected at least one tensor"),
        (
            {"averages": {"e": EMA(0.9999)}, "dtype": torch.bfloat16},
            ValueError, r"averages\['e'\].*below the resolution 0.0078 of torch.bfloat16",
        ),
        ({"averages": {"e": EMA(0.9999)}, "dtype": torch.float16}, ValueError, "0.00098"),
        (
            {"averages": {"f": lambda a, b, n: None}, "on_nonfinite": "skip"},
            ValueError, "on_nonfinite: expected None beside a user's function",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            Averager(model, **{"averages": {"swa": SWA()}, **arguments})
    with pytest.raises(TypeError, match=r"weight: found layout torch\.sparse_coo"):
        Averager([("weight", torch.eye(3).to_sparse())], {"swa": SWA()})
    with pytest.raises(ValueError, match="found the name a twice"):
        Averager([("a", torch.ones(2)), ("a", torch.ones(3))], {"swa": SWA()})
    with pytest.raises(ValueError, match=r"weight: not initialised yet"):
        Averager(nn.LazyLinear(3), {"swa": SWA()})
    with pytest.raises(ValueError, match="weight: it is on the meta device"):
        Averager(nn.Linear(2, 2, device="meta"), {"swa": SWA()})
    with pytest.raises(TypeError, match="w: the average has dtype float8_e4m3fn"):
        Averager([("w", torch.zeros(2).to(torch.float8_e4m3fn))], {"swa": SWA()}, dtype=None)


def test_filters_and_lists() -> None:
    model = Net()
    everything = set(model.state_dict())
    rule = {"swa": SWA()}
    assert set(Averager(model, rule).averages["swa"]) == everything
    trainable = set(Averager(model, rule, trainable_only=True).averages["swa"])
    assert trainable == everything - {"frozen"}
    assert set(Averager(model, rule, filter=r"^conv\.").averages["swa"]) == {
        "conv.weight", "conv.bias",
    }  # fmt: skip
    large = Averager(model, rule, filter=lambda name, tensor: tensor.numel() > 4000)
    assert set(large.averages["swa"]) == {"frozen", "turned"}
    assert set(Averager(model, rule, buffers="skip").averages["swa"]) == everything - {
        "bn.running_mean", "bn.running_var", "bn.num_batches_tracked", "mask",
    }  # fmt: skip
    listed = Averager(model.named_parameters(), rule)
    assert set(listed.averages["swa"]) == {name for name, _ in model.named_parameters()}
    assert set(Averager(iter(model.parameters()), rule).averages["swa"]) == {
        str(i) for i in range(len(list(model.parameters())))
    }


def test_wrapped_models() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        inner = Averager(wrapped, {"swa": SWA()})
        assert set(inner.averages["swa"]) == set(model.state_dict())
        outer = Averager(wrapped, {"swa": SWA()}, unwrap=False)
        assert set(outer.averages["swa"]) == set(wrapped.state_dict())
        averaged = swa_fast.AveragedModel(wrapped, unwrap=True)
        assert set(averaged.module.state_dict()) == set(model.state_dict())
        averaged.update_parameters(wrapped)


def test_a_model_in_distributed_data_parallel(tmp_path) -> None:
    def work() -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        wrapped = nn.parallel.DistributedDataParallel(model)
        averager = Averager(wrapped, {"swa": SWA()})
        averaged = swa_fast.AveragedModel(wrapped, unwrap=True)
        wrapped(torch.randn(4, 3)).sum().backward()
        step(model)
        averager.update()
        averaged.update_parameters(wrapped)
        for name, tensor in model.state_dict().items():
            assert torch.equal(averager.averages["swa"][name], tensor)
            assert torch.equal(averaged.module.state_dict()[name], tensor)

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        work()
    finally:
        # The network before its group: in torch 2.13 the last one to hold a gloo group joins the
        # group's threads without giving up the GIL, for which they may be waiting.
        gc.collect()
        torch.distributed.destroy_process_group()


@backends
def test_a_user_s_function(backend: str, device: str) -> None:
    need(backend, device)
    model = Net().to(device)

    def halves(averages: list[Tensor], sources: list[Tensor], n: Tensor) -> None:
        assert n.device.type == device
        for a, b in zip(averages, sources, strict=True):
            assert a.dtype == b.dtype
            a.add_(b).div_(2)

    averager = Averager(model, {"mine": halves, "ema": EMA(0.5)}, backend=backend)
    for _ in range(4):
        step(model)
        averager.update()
    for name, mine in averager.averages["mine"].items():
        torch.testing.assert_close(mine, averager.averages["ema"][name])


# Stochastic rounding.


def test_philox_known_answers() -> None:
    """The vectors of Random123's kat_vectors for philox4x32-10."""
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):  # fmt: skip
        group = counter[0] | counter[1] << 32
        group -= (group >> 63) << 64
        words = reference.philox(
            key[0] | key[1] << 32, torch.tensor([group]), torch.tensor(counter[2]), counter[3]
        )
        assert words.tolist() == [list(expected)]


def bfloat16_averages(
    backend: str | None, device: str, seed: int = 3, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(130, 67), nn.Linear(67, 3), nn.Linear(3, 1, bias=False))
    model.to(device, dtype)
    averager = Averager(
        model, {"swa": SWA(), "ema": EMA(0.999)}, dtype=torch.bfloat16, rounding="stochastic",
        seed=seed, backend=backend,
    )  # fmt: skip
    for _ in range(4):
        step(model)
        averager.update()
    return {
        f"{rule} {name}": tensor.cpu()
        for rule, tensors in averager.averages.items()
        for name, tensor in tensors.items()
    }


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_the_same_everywhere(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    need(backend, device)
    expected = bfloat16_averages("reference", "cpu", dtype=dtype)
    found = bfloat16_averages(backend, device, dtype=dtype)
    for name, tensor in expected.items():
        # Triton's interpreter does not fuse multiply and add: an fp32 unit, rarely a bf16 one.
        if backend == "triton" and device == "cpu":
            different = (found[name] != tensor).float().mean().item()
            assert different < 0.01, name
            torch.testing.assert_close(found[name], tensor, rtol=2**-7, atol=0)
        else:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("backend, device", [p for p in BACKENDS if p.id in ("cpu", "reference")])
def test_stochastic_rounding_depends_on_the_seed_only(backend: str, device: str) -> None:
    need(backend, device)
    threads = torch.get_num_threads()
    one = bfloat16_averages(backend, device)
    try:
        torch.set_num_threads(1)
        again = bfloat16_averages(backend, device)
    finally:
        torch.set_num_threads(threads)
    other = bfloat16_averages(backend, device, seed=4)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("backend, device", [p for p in BACKENDS if p.id in ("cpu", "reference")])
def test_stochastic_rounding_is_unbiased(backend: str, device: str) -> None:
    """An EMA whose every step is below bfloat16's resolution reaches its place on average."""
    need(backend, device)
    source = torch.ones(20_000)
    averager = Averager(
        [source], {"ema": EMA(0.999)}, dtype=torch.bfloat16, rounding="stochastic",
        backend=backend,
    )  # fmt: skip
    averager.update()
    source.fill_(1.5)
    for _ in range(200):
        averager.update()
    average = averager.averages["ema"]["0"].double()
    expected = 1.5 - 0.5 * 0.999**200
    # Each of the steps adds a variance of at most a quarter of the squared resolution, 2^-7.
    deviation = math.sqrt(200 * 0.25) * 2**-7
    assert abs(average.mean().item() - expected) < 4 * deviation / math.sqrt(len(source))
    assert average.std().item() < deviation


@backends
def test_stochastic_rounding_of_special_values(backend: str, device: str) -> None:
    need(backend, device)
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.5, 2.0**-133, 3.38e38]
    source = torch.tensor(values, device=device)
    averager = Averager(
        [source], {"a": EMA(0.5)}, dtype=torch.bfloat16, rounding="stochastic", backend=backend
    )
    averager.update()
    found = averager.averages["a"]["0"].float().cpu()
    expected = torch.tensor(values)
    exact = expected.bfloat16().float() == expected
    assert torch.equal(found[exact], expected[exact])
    assert found[4].isnan()


# Non-finite values.


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_with_a_nonfinite_value_is_skipped(
    backend: str, device: str, dtype: torch.dtype, bad: float
) -> None:
    need(backend, device)
    model = nn.Sequential(nn.Linear(67, 71), nn.BatchNorm1d(71)).to(dtype).to(device)
    averager = Averager(model, RULES, backend=backend, on_nonfinite="skip")
    step(model)
    averager.update()
    before = {r: {k: v.clone() for k, v in a.items()} for r, a in averager.averages.items()}
    good = snapshot(model)
    with torch.no_grad():
        model[0].bias[-1] = bad
    averager.update()
    averager.update()
    assert averager.n_averaged == dict.fromkeys(RULES, 1)
    assert averager.skipped_updates == 2
    for rule, name in itertools.product(RULES, before["swa"]):
        assert torch.equal(averager.averages[rule][name], before[rule][name])
    model.load_state_dict(good)
    with torch.no_grad():
        model[1].running_mean[0] = bad  # copied, not averaged: not looked at
    averager.update()
    assert averager.n_averaged == dict.fromkeys(RULES, 2)
    assert averager.skipped_updates == 2


@backends
def test_an_update_with_a_nonfinite_value_raises(backend: str, device: str) -> None:
    need(backend, device)
    model = nn.Linear(5, 3).to(device)
    averager = Averager(model, {"swa": SWA()}, backend=backend, on_nonfinite="raise")
    averager.update()
    with torch.no_grad():
        model.weight[1, 1] = math.nan
    with pytest.raises(FloatingPointError, match=r"1 update\(s\) met .* not finite now: weight"):
        averager.update()
        # A GPU is not waited for: there it is the next look.
        averager.state_dict()
    assert averager.n_averaged == {"swa": 1}
    with torch.no_grad():
        model.weight.zero_()
    averager.update()
    assert averager.state_dict()["n_averaged"] == {"swa": 2}


# Exchange with the live weights.


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied(backend: str, device: str, dtype: torch.dtype) -> None:
    need(backend, device)
    model = of_dtype(Net(), dtype).to(device)
    averager = Averager(model, RULES, backend=backend)
    with pytest.raises(RuntimeError, match="'ema' has not been updated yet"):
        averager.applied("ema").__enter__()
    for _ in range(3):
        step(model)
        averager.update()
    live = snapshot(model)
    averages = {k: v.clone() for k, v in averager.averages["ema"].items()}
    addresses = [p.data_ptr() for p in model.parameters()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.numel()], lr=0.1, momentum=0.9)
    with pytest.raises(KeyError, match="expected one of swa, ema, long, found 'emma'"):
        averager.applied("emma").__enter__()
    with pytest.raises(ArithmeticError), averager.applied("ema"):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, averages[name].to(tensor.dtype)), name
        assert model.out.weight is model.embed.weight
        with pytest.raises(RuntimeError, match="'ema' is already applied"):
            averager.applied("swa").__enter__()
        with pytest.raises(RuntimeError, match="the average 'ema' is applied"):
            averager.update()
        with pytest.raises(RuntimeError, match="the average 'ema' is applied"):
            averager.load_state_dict({})
        raise ArithmeticError
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, live[name]), name
    for name, tensor in averager.averages["ema"].items():
        assert torch.equal(tensor, averages[name]), name
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert {id(p) for p in model.parameters() if p.numel()} == {
        id(p) for group in optimizer.param_groups for p in group["params"]
    }
    averager.update()


def test_averages_are_asked_for_by_name(tmp_path: Path) -> None:
    averager = Averager(nn.Linear(2, 3), {"swa": SWA(), "ema": EMA(0.9)})
    torch.save(averager.averages, tmp_path / "averages.pt")
    saved = torch.load(tmp_path / "averages.pt", weights_only=True)
    assert torch.equal(saved["ema"]["bias"], averager.averages["ema"]["bias"])
    with pytest.raises(KeyError, match="averages: expected one of swa, ema, found 'x'"):
        averager.averages["x"]
    assert repr(averager) == (
        "Averager(swa=SWA(), ema=EMA(decay=0.9, warmup=None); 2 tensors of 9 elements on cpu, "
        f"backend {swa_fast.choose_backend('cpu')})"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filter": "head"}, r"filter: expected .* none among 4 \(the first is '0.weight'\)"),
        ({"trainable_only": True}, "trainable_only: .* none among 4, none of which requires"),
    ],
)
def test_what_leaves_nothing_to_average_is_named(arguments: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.requires_grad_("filter" in arguments)
    with pytest.raises(ValueError, match=message):
        Averager(model, {"swa": SWA()}, **arguments)
    with pytest.raises(ValueError, match=r"params_or_module: expected .* found none$"):
        Averager([], {"swa": SWA()})
    with pytest.raises(ValueError, match=r"buffers='skip': .* which are all buffers"):
        Averager(nn.BatchNorm1d(2, affine=False), {"swa": SWA()}, buffers="skip")


def test_a_write_while_applied_is_reported() -> None:
    model = nn.Linear(3, 2)
    averager = Averager(model, {"swa": SWA()})
    averager.update()
    with (
        pytest.raises(RuntimeError, match="an average was written while one was applied"),
        averager.applied("swa"),
    ):
        averager.averages["swa"]["bias"].zero_()
    with averager.applied("swa"):
        pass


def test_the_model_may_be_moved_while_applied() -> None:
    model = Net()
    averager = Averager(model, {"swa": SWA()})
    averager.update()
    step(model)
    live = snapshot(model)
    with averager.applied("swa"):
        model.conv.weight.data = model.conv.weight.data.clone()
        model.conv.to(memory_format=torch.contiguous_format)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, live[name]), name


def test_a_model_that_no_longer_fits_gets_its_weights_back() -> None:
    model = Net()
    averager = Averager(model, {"swa": SWA()})
    averaged = swa_fast.AveragedModel(model)
    for applied in (lambda: averager.applied("swa"), lambda: averaged.applied(model)):
        averager.update()
        averaged.update_parameters(model)
        average = {k: v.clone() for k, v in averager.averages["swa"].items()}
        step(model)
        live = snapshot(model)
        with pytest.raises(ValueError, match="extra: in the model, not in the average"), applied():
            model.extra = nn.Parameter(torch.zeros(2))
            model.frozen = nn.Parameter(torch.ones(4097))
        del model.extra
        for name, tensor in model.state_dict().items():
            if name != "frozen":
                assert torch.equal(tensor, live[name]), name
            torch.testing.assert_close(averager.averages["swa"][name], average[name])
            torch.testing.assert_close(averaged.module.state_dict()[name], average[name])


def test_parameters_over_the_same_memory_are_swapped_once() -> None:
    memory = torch.arange(6.0)
    sources = [memory, memory[:]]
    averager = Averager(sources, {"swa": SWA()})
    averager.update()
    memory.add_(1)
    with averager.applied("swa"):
        assert memory.tolist() == list(range(6))
    assert memory.tolist() == [i + 1 for i in range(6)]
    assert averager.averages["swa"]["0"].tolist() == list(range(6))


# Resume.


# Where a run stops is the host's business; Triton's interpreter, which is slow, sees one place.
BACKENDS_AND_STOPS = [
    pytest.param(*backend.values, stop, id=f"{backend.id}-{stop}", marks=backend.marks)
    for backend in BACKENDS
    for stop in ([2] if backend.id == "triton-interpreted" else range(5))
]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("backend", "device", "stop"), BACKENDS_AND_STOPS)
def test_resumed_is_uninterrupted(
    stop: int, rounding: str, backend: str, device: str, tmp_path
) -> None:
    need(backend, device)
    dtype = torch.bfloat16 if rounding == "stochastic" else torch.float32
    rules = {"swa": SWA(), "ema": EMA(0.9, warmup=Warmup(update_after_step=2))}

    def make(model: nn.Module) -> Averager:
        return Averager(model, rules, dtype=dtype, rounding=rounding, seed=9, backend=backend)

    torch.manual_seed(1)
    models = [Net().to(device)]
    averager = make(models[0])
    for n in range(6):
        step(models[0])
        averager.update()
        models.append(copy.deepcopy(models[0]))
        if n == stop:
            torch.save(averager.state_dict(), tmp_path / "average.pt")
    live = Net().to(device)
    resumed = make(live)
    resumed.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True))
    for model in models[stop + 2 :]:
        live.load_state_dict(model.state_dict())
        resumed.update()
    assert resumed.n_averaged == averager.n_averaged
    for rule, name in itertools.product(rules, averager.averages["swa"]):
        assert torch.equal(resumed.averages[rule][name], averager.averages[rule][name])


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [1 << 28, 4096, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_averages_on_the_cpu_of_a_model_on_a_gpu(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathered in one piece or in many, from tensors of every kind, moved ones too."""
    monkeypatch.setattr(_gather, "CHUNK", chunk)
    model = of_dtype(Net(), dtype)
    there = copy.deepcopy(model).cuda()
    # In the model's own types the CPU's averages are the reference: same arithmetic, same bits.
    ours = Averager(there, RULES, device="cpu", buffers="average")
    theirs = Averager(model, RULES, buffers="average")
    for n in range(4):
        if n == 2:
            there.embed.weight.data = there.embed.weight.data.clone()
        step(model)
        there.load_state_dict(model.state_dict())
        ours.update()
        theirs.update()
    for rule, name in itertools.product(RULES, theirs.averages["swa"]):
        found = ours.averages[rule][name]
        assert found.device.type == "cpu"
        assert torch.equal(found, theirs.averages[rule][name]), name


@pytest.mark.gpu
def test_without_pinned_memory_the_copies_are_right_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = torch.empty

    def unpinned(*arguments: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        if pin_memory:
            raise RuntimeError("the limit of locked memory")
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", unpinned)
    model = nn.Linear(3, 4).cuda()
    averager = Averager(model, {"swa": SWA()}, device="cpu")
    averager.update()
    assert torch.equal(averager.averages["swa"]["weight"], model.weight.cpu())


@pytest.mark.gpu
def test_without_room_for_a_buffer_tensors_come_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(tensors: object) -> None:
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(_gather, "Gather", full)
    model = nn.Linear(3, 4).cuda()
    averager = Averager(model, {"swa": SWA()}, device="cpu")
    averager.update()
    assert torch.equal(averager.averages["swa"]["bias"], model.bias.cpu())


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    averager = Averager(nn.Linear(3, 2), {"a": SWA()})
    averager.update()
    state = averager.state_dict()
    others = {
        "rules": Averager(nn.Linear(3, 2), {"a": EMA(0.5)}).state_dict(),
        r"averages\['a'\]: bias is missing": Averager(
            nn.Linear(3, 2, bias=False), {"a": SWA()}
        ).state_dict(),
        r"weight expected \(2, 3\) torch.float32, found \(2, 4\)": Averager(
            nn.Linear(4, 2), {"a": SWA()}
        ).state_dict(),
        "expected one of an Averager in format 1": nn.Linear(3, 2).state_dict(),
    }
    before = {k: v.clone() for k, v in state["averages"]["a"].items()}
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            averager.load_state_dict(other)
    for name, value in averager.averages["a"].items():
        assert torch.equal(value, before[name])


# Graphs, compilers, operators.


@backends
def test_compiled_whole(backend: str, device: str) -> None:
    need(backend, device)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(device)
    averager = Averager(model, {"swa": SWA(), "ema": EMA(0.5)}, backend=backend)
    averaged = swa_fast.AveragedModel(model, backend=backend)
    averaged.update_parameters(model)
    averaged.n_averaged.zero_()
    history = []

    @torch.compile(fullgraph=True, backend="aot_eager")
    def train(x: Tensor) -> Tensor:
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.1)
        averager.update()
        averaged.update_parameters(model)
        return model(x).square().mean()

    model(torch.randn(5, 4).to(device)).square().mean().backward()
    for _ in range(3):
        train(torch.randn(5, 4).to(device)).backward()
        history.append(model[0].weight.detach().clone())
    mean = torch.stack(history).mean(0)
    torch.testing.assert_close(averager.averages["swa"]["0.weight"], mean)
    torch.testing.assert_close(averaged.module[0].weight.detach(), mean)
    assert averager.n_averaged == {"swa": 3, "ema": 3}
    assert averaged.n_averaged.item() == 3


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("warm", [False, True], ids=["first update captured", "after an update"])
def test_captured_graph_replays_right(backend: str, warm: bool) -> None:
    model = nn.Sequential(nn.Linear(130, 31), nn.BatchNorm1d(31)).to("cuda")
    rules = {"swa": SWA(), "ema": EMA(0.75), "late": EMA(0.9, warmup="timm")}
    averager = Averager(model, rules, backend=backend)
    plain = Averager(model, rules, backend="reference")
    stream = torch.cuda.Stream()
    if backend == "triton":
        # Triton compiles at its first launch, which a capture does not allow.
        Averager(model, rules, backend=backend).update()
    if warm:
        with torch.cuda.stream(stream):
            averager.update()
        plain.update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        averager.update()
    assert averager.n_averaged["swa"] == int(warm)
    for _ in range(5):
        step(model)
        graph.replay()
        plain.update()
    assert averager.n_averaged == plain.n_averaged
    for rule, name in itertools.product(rules, plain.averages["swa"]):
        torch.testing.assert_close(
            averager.averages[rule][name].cpu(), plain.averages[rule][name].cpu(),
            rtol=1e-6, atol=1e-6,
        )  # fmt: skip


@pytest.mark.gpu
def test_capture_without_a_table_is_refused() -> None:
    model = nn.Linear(3, 2).to("cuda")
    averager = Averager(model, {"swa": SWA()})
    model.weight.data = model.weight.data.clone()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="run one update of these tensors before capturing"),
        torch.cuda.graph(graph),
    ):
        model.bias.detach().mul_(2)  # torch warns of an empty graph
        averager.update()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_updates_on_a_side_stream(backend: str) -> None:
    model = nn.Linear(33, 31).to("cuda")
    averager = Averager(model, {"swa": SWA()}, backend=backend)
    with torch.cuda.stream(torch.cuda.Stream()):
        averager.update()
    torch.cuda.synchronize()
    assert torch.equal(averager.averages["swa"]["weight"], model.weight)


@pytest.mark.gpu
def test_model_on_two_devices() -> None:
    model = nn.Sequential(nn.Linear(5, 3).to("cuda"), nn.Linear(3, 2))
    averager = Averager(model, RULES)
    averaged = swa_fast.AveragedModel(model)
    history = []
    for _ in range(3):
        step(model)
        averager.update()
        averaged.update_parameters(model)
        history.append({k: v.cpu() for k, v in snapshot(model).items()})
    for name in history[0]:
        mean = torch.stack([h[name] for h in history]).mean(0)
        torch.testing.assert_close(averager.averages["swa"][name].cpu(), mean)
        torch.testing.assert_close(averaged.module.state_dict()[name].cpu(), mean)
    assert averager.averages["swa"]["0.weight"].is_cuda
    assert not averager.averages["swa"]["1.weight"].is_cuda
    model[1].to("cuda")
    with pytest.raises(ValueError, match=r"1\.bias: the average is on cpu, the model on cuda:0"):
        averager.update()


@pytest.mark.gpu
def test_averages_kept_on_the_cpu() -> None:
    model = of_dtype(Net(), torch.bfloat16).to("cuda")
    averager = Averager(model, {"swa": SWA()}, device="cpu")
    for _ in range(2):
        averager.update()
    for name, average in averager.averages["swa"].items():
        assert not average.is_cuda
        assert torch.equal(average, model.state_dict()[name].cpu().to(average.dtype)), name
    live = snapshot(model)
    with averager.applied("swa"):
        pass
    assert all(torch.equal(v, live[k]) for k, v in model.state_dict().items())


@backends
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("on_nonfinite", [None, "skip"])
def test_opcheck(backend: str, device: str, seed: int | None, on_nonfinite: str | None) -> None:
    need(backend, device)
    sources = [torch.randn(33).bfloat16().to(device), torch.randn(5).to(device)]
    averager = Averager(
        sources, {"a": SWA(), "b": EMA(0.9)}, dtype=torch.bfloat16, backend=backend,
        rounding="nearest" if seed is None else "stochastic", on_nonfinite=on_nonfinite,
    )  # fmt: skip
    update, swap = raw_arguments(averager)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        getattr(torch.ops.swa_fast.update_, backend), tuple(update), test_utils=tests
    )
    torch.library.opcheck(
        getattr(torch.ops.swa_fast.swap_, backend), tuple(swap), test_utils=("test_faketensor",)
    )
    torch.library.opcheck(
        torch.ops.swa_fast.update_averager,
        (averager._memory, averager._counts, averager._storage.live, averager._handle),
        test_utils=("test_faketensor", "test_autograd_registration"),
    )


def test_raw_operators_check_their_arguments() -> None:
    need("cpu", "cpu")
    good, good_swap = raw_arguments(Averager([torch.randn(5)], {"a": SWA()}, backend="cpu"))
    for at, bad, message in (
        (2, torch.zeros(17, dtype=torch.int64), "expected 1 to 16 averages, found 17"),
        (2, torch.zeros(1), "n_averaged must be contiguous int64"),
        (3, torch.zeros(2, dtype=torch.int64), "counters must hold 3 int64"),
        (4, torch.zeros(1, 8), "rules must be fp64"),
        (5, torch.zeros(1, 3, dtype=torch.int64), r"table must be int64 of shape \[segments, 4\]"),
        (5, torch.zeros(4, dtype=torch.int64), "table must be int64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.swa_fast.update_.cpu(*good[:at], bad, *good[at + 1 :])
    with pytest.raises(RuntimeError, match="skip_nonfinite needs counters"):
        torch.ops.swa_fast.update_.cpu(*good[:3], None, *good[4:8], True)
    for at, wrong, message in (
        (2, torch.zeros(1, 3, dtype=torch.int64), "table must be int64"),
        (3, 1, "expected average 0 to 0, found 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.swa_fast.swap_.cpu(*good_swap[:at], wrong, *good_swap[at + 1 :])


def test_autograd_notices_an_update() -> None:
    source = torch.ones(3)
    averager = Averager([source], {"a": SWA()})
    averager.update()
    average = averager.averages["a"]["0"]
    x = torch.ones(3, requires_grad=True)
    y = (x * average).sum()
    averager.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_watch_of_many() -> None:
    """Both implementations agree on what a change is."""
    tensors = [torch.randn(3) for _ in range(5)]
    place: dict[str, object] = {"a": tensors[0], "b": None}
    changes: tuple[Callable[[], object], ...] = (
        lambda: place.update(c=1),
        lambda: place.pop("b"),
        lambda: place.update(a=tensors[1]),
        lambda: tensors[2].resize_(2),
        lambda: tensors[3].set_(torch.randn(3)),
    )
    for change in changes:
        watches = [Watch(tensors, [place]) for _ in range(2)]
        assert all(watch.holds() for watch in watches)
        change()
        assert not any(watch.holds() for watch in watches)
