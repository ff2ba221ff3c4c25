"""The Averager: rules, storage, detection of changes, swap, resume; all backends, one suite."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import weakref
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
    is_averaged,
    need,
    of_dtype,
    snapshot,
    step,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import swa_fast
from swa_fast import EMA, SWA, Averager, Warmup

backends = pytest.mark.parametrize("backend, device", BACKENDS)
RULES = {"swa": SWA(), "ema": EMA(0.9), "long": EMA(0.99, warmup="diffusers")}


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
    # Equal weights in bfloat16 are refused.
    bf16 = dtype is None and source_dtype == torch.bfloat16
    rules = {name: rule for name, rule in RULES.items() if not (bf16 and name == "swa")}
    averager = Averager(model, rules, dtype=dtype, buffers=buffers, backend=backend)
    exact: dict[str, dict[str, np.ndarray]] = {rule: {} for rule in rules}
    by_torch: dict[str, dict[str, Tensor]] = {rule: {} for rule in rules}
    for n in range(4):
        step(model)
        averager.update()
        for (rule, how), (name, tensor) in itertools.product(
            rules.items(), model.state_dict().items()
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
    assert averager.n_averaged == dict.fromkeys(rules, 4)
    for rule in rules:
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
        ({"averages": {"a": 0.9}}, TypeError, r"SWA, EMA, Power, Window, ByName or a func"),
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


@backends
@pytest.mark.parametrize(
    "which", [{"filter": r"^out|^frozen|^conv|running_mean"}, {"trainable_only": True}], ids=str
)
def test_excluded_tensors_are_copied(backend: str, device: str, which: dict[str, Any]) -> None:
    need(backend, device)
    model = Net().to(device)
    options: dict[str, Any] = {"buffers": "average", "backend": backend, **which}
    partial = Averager(model, {"s": SWA(), "e": EMA(0.5)}, **options)
    whole = Averager(model, {"s": SWA(), "e": EMA(0.5)}, excluded="copy", **options)
    for n in range(3):
        step(model)
        partial.update()
        whole.update()
        if n == 1:
            whole = copy.deepcopy(whole)  # which brings a model of its own
            whole._selection.module = model
            whole._storage.unbind()
    for rule, averages in whole.averages.items():
        assert list(averages) == list(model.state_dict())
        for name, live in model.state_dict().items():
            # The embedding is tied to "out.weight", and averaged for that name.
            name_of = "out.weight" if name == "embed.weight" else name
            expected = partial.averages[rule].get(name_of, live)
            assert torch.equal(averages[name], expected.to(averages[name].dtype)), name
    model.load_state_dict(whole.averages["s"])
    fresh = Averager(model, {"s": SWA(), "e": EMA(0.5)}, excluded="copy", **options)
    fresh.load_state_dict(whole.state_dict())
    with whole.applied("s"):
        pass


def test_something_has_to_be_averaged_beside_what_is_copied() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="filter: expected at least one tensor to average"):
        Averager(model, {"s": SWA()}, filter="absent", excluded="copy")
    with pytest.raises(ValueError, match=r"excluded: expected one of .*, found 'average'"):
        Averager(model, {"s": SWA()}, excluded="average")


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_updates_read_what_was_assigned_since() -> None:
    model = nn.Linear(4, 4)
    averager, averaged = Averager(model, {"swa": SWA()}), swa_fast.AveragedModel(model)

    def updates() -> None:
        averager.update()
        averaged.update_parameters(model)

    compiled = torch.compile(updates, fullgraph=True, backend="eager")
    for at, value in enumerate((1.0, 2.0, 6.0)):
        state = {name: torch.full_like(t, value) for name, t in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        (compiled if at else updates)()
    for weight in (averager.averages["swa"]["weight"], averaged.module.weight.detach()):
        torch.testing.assert_close(weight, torch.full((4, 4), 3.0))


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
@pytest.mark.parametrize("kind", ["Averager", "AveragedModel", "SWAG"])
def test_a_graph_keeps_what_it_reads_and_no_longer(kind: str) -> None:
    def captured() -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        """A graph whose model and averages nobody else holds, and what it reads."""
        model = nn.Linear(130, 31).to("cuda")
        averager: Any
        if kind == "AveragedModel":
            averager = swa_fast.AveragedModel(model)
            update, row = lambda: averager.update_parameters(model), averager.module.weight
        elif kind == "Averager":
            averager = Averager(model, {"swa": SWA()})
            update, row = averager.update, averager.averages["swa"]["weight"]
        else:
            averager = swa_fast.SWAG(model, 2)
            update, row = averager.update, averager._storage.averages[0][0]
        update()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            update()
        return graph, [model.weight, row]

    graph, tensors = captured()
    addresses = [tensor.data_ptr() for tensor in tensors]
    storages = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
    del tensors
    gc.collect()
    # Memory for others, if it were not kept.
    others = [torch.full((31, 130), -1.0, device="cuda") for _ in range(8)]
    graph.replay()
    assert all(bool((other == -1).all()) for other in others)
    assert not {other.data_ptr() for other in others} & set(addresses)
    if not hasattr(torch.cuda.CUDAGraph, "get_currently_capturing_graph"):
        return  # kept for good
    assert all(storage() is not None for storage in storages)
    del graph
    gc.collect()
    assert [storage() for storage in storages] == [None, None]


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


@pytest.mark.parametrize("of_model", [False, True], ids=["Averager", "AveragedModel"])
def test_float64_averages_keep_the_digits_of_long_runs(of_model: bool) -> None:
    model = nn.Linear(7, 9, bias=False)
    draw = torch.Generator().manual_seed(0)

    def average(rule: SWA | EMA, dtype: torch.dtype) -> tuple[Any, Any]:
        if of_model:
            averaged = swa_fast.AveragedModel(model, rule=rule, dtype=dtype)
            return lambda: averaged.update_parameters(model), averaged.module.weight
        averager = Averager(model, {"a": rule}, dtype=dtype)
        return averager.update, averager.averages["a"]["weight"]

    both = (torch.float32, torch.float64)
    # A mean of noisy weights. The bound is torch's own in float64: one rounding an update at worst.
    averages, exact, updates = [average(SWA(), dtype) for dtype in both], 0, 5000
    for _ in range(updates):
        with torch.no_grad():
            model.weight.normal_(1, 0.01, generator=draw)
        exact += extended(model.weight) / np.longdouble(updates)
        for update, _ in averages:
            update()
    narrow, wide = (float(np.abs(extended(a) - exact).max()) for _, a in averages)
    assert wide < 5e-14
    assert narrow > 1e-7
    # Weights that changed by a thousandth: where the average stands still in float32.
    with torch.no_grad():
        model.weight.fill_(1)
    averages = [average(EMA(0.9999), dtype) for dtype in both]
    for update, _ in averages:
        update()
    with torch.no_grad():
        model.weight.fill_(1.001)
    for _ in range(updates := 10_000):
        for update, _ in averages:
            update()
    narrow, wide = (float((a.detach().double() - 1).mean() / 1e-3) for _, a in averages)
    assert wide == pytest.approx(1 - 0.9999**updates, rel=1e-4)  # 1.001 is rounded
    assert narrow < 0.41  # 63 % would be right
