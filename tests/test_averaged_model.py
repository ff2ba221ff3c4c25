"""AveragedModel and its functions beside torch.optim.swa_utils."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Net, assert_as_accurate, extended, of_dtype, snapshot, step
from torch import Tensor, nn
from torch.optim import swa_utils

import swa_fast

STEPS = 25


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.out = nn.Linear(5, 7, bias=False)
        self.out.weight = self.embed.weight


class Odd(nn.Module):
    """Shapes and layouts that averagers trip over."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.randn(0, 3))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.strided = nn.Parameter(torch.randn(6, 10)[:, ::2])
        self.transposed = nn.Parameter(torch.randn(3, 5).t())
        self.register_buffer("steps", torch.tensor([1, 2], dtype=torch.int32))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, dtype=torch.complex64))
        self.real = nn.Parameter(torch.randn(3))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(5), nn.Linear(5, 10),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(11, 129), nn.Tanh(), nn.Linear(129, 3)),
    "conv_bn": conv_net,
    "channels_last": lambda: conv_net().to(memory_format=torch.channels_last),
    "tied": Tied,
    "odd": Odd,
    "complex": Complex,
}

# name -> constructor arguments, made with the functions of the given module.
RULES: dict[str, Callable[[object], dict[str, object]]] = {
    "default": lambda m: {},
    "swa": lambda m: {"avg_fn": m.get_swa_avg_fn()},
    "swa_multi": lambda m: {"multi_avg_fn": m.get_swa_multi_avg_fn()},
    "ema": lambda m: {"avg_fn": m.get_ema_avg_fn(0.9)},
    "ema_multi": lambda m: {"multi_avg_fn": m.get_ema_multi_avg_fn(0.9)},
    "user": lambda m: {"avg_fn": lambda a, b, n: 0.25 * a + 0.75 * b},
    "user_multi": lambda m: {"multi_avg_fn": user_multi},
}


def user_multi(averages: list[Tensor], sources: list[Tensor], n: Tensor) -> None:
    for a, b in zip(averages, sources, strict=True):
        a.copy_(a + (b - a) / (2 + n))


def perturb(model: nn.Module) -> None:
    """A step of pretended training: every floating tensor moves, counters count."""
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
            else:
                tensor.add_(1)


def exact_step(
    exact: dict[str, np.ndarray], model: nn.Module, rule: str, n: int, use_buffers: bool
) -> None:
    """The averages by the definition, in extended precision."""
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in named_tensors(model).items():
        current = extended(tensor)
        averaged = name in parameters or use_buffers
        integer = not (tensor.is_floating_point() or tensor.is_complex())
        if n == 0 or not averaged or integer:
            exact[name] = current
            continue
        if rule.startswith("user"):
            w = np.longdouble(0.75) if rule == "user" else np.longdouble(1) / (2 + n)
        else:
            w = 1 - np.longdouble(0.9) if rule.startswith("ema") else np.longdouble(1) / (n + 1)
        exact[name] = exact[name] + w * (current - exact[name])


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def as_torch_fails(rule: str, use_buffers: bool, model: nn.Module) -> bool:
    """Cases in which torch's own class raises: multi functions over integer buffers."""
    integers = any(not b.is_floating_point() for b in model.buffers())
    return use_buffers and integers and rule == "swa_multi"


def compare(
    ours: nn.Module, torchs: nn.Module, exact: dict[str, np.ndarray], rule: str, use_buffers: bool
) -> None:
    theirs = named_tensors(torchs.module)
    by_dtype: dict[torch.dtype, list[str]] = {}
    mine = named_tensors(ours.module)
    for name, tensor in mine.items():
        if tensor.is_floating_point() or tensor.is_complex():
            by_dtype.setdefault(tensor.dtype, []).append(name)
        elif rule.startswith("user") or not use_buffers:
            assert torch.equal(tensor, theirs[name]), name
        else:
            # torch averages integers into a truncated number; the built-in rules here copy them.
            assert np.array_equal(extended(tensor), exact[name]), name
    for dtype, names in by_dtype.items():
        assert_as_accurate(
            [mine[k] for k in names], [theirs[k] for k in names], [exact[k] for k in names],
            str(dtype),
        )  # fmt: skip


@pytest.mark.parametrize("use_buffers", [False, True], ids=["copy_buffers", "average_buffers"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_same_as_torch_step_by_step(
    name: str, rule: str, use_buffers: bool, dtype: torch.dtype
) -> None:
    model = MODELS[name]()
    if name != "complex":
        model = model.to(dtype)
    elif dtype != torch.float32:
        pytest.skip("complex64 has one precision")
    if as_torch_fails(rule, use_buffers, model):
        pytest.skip("torch raises on integer buffers")
    ours = swa_fast.AveragedModel(model, use_buffers=use_buffers, **RULES[rule](swa_fast))
    theirs = swa_utils.AveragedModel(model, use_buffers=use_buffers, **RULES[rule](swa_utils))
    exact: dict[str, np.ndarray] = {}
    for n in range(STEPS):
        perturb(model)
        exact_step(exact, model, rule, n, use_buffers)
        ours.update_parameters(model)
        theirs.update_parameters(model)
        compare(ours, theirs, exact, rule, use_buffers)
        if n == STEPS // 2:
            # Resumed half-way, each from its own and from the other's checkpoint.
            assert list(ours.state_dict()) == list(theirs.state_dict())
            resumed = swa_fast.AveragedModel(
                model, use_buffers=use_buffers, **RULES[rule](swa_fast)
            )
            resumed.load_state_dict(ours.state_dict())
            crossed = swa_fast.AveragedModel(
                model, use_buffers=use_buffers, **RULES[rule](swa_fast)
            )
            crossed.load_state_dict(theirs.state_dict())
            back = swa_utils.AveragedModel(model, use_buffers=use_buffers, **RULES[rule](swa_utils))
            back.load_state_dict(ours.state_dict())
            for other in (resumed, crossed, back):
                assert other.n_averaged.item() == n + 1
            for tensors in zip(
                ours.state_dict().values(), resumed.state_dict().values(),
                back.state_dict().values(), strict=True,
            ):  # fmt: skip
                assert torch.equal(tensors[0], tensors[1]) and torch.equal(tensors[0], tensors[2])
            ours = crossed if name == "mlp" else resumed
    assert ours.n_averaged.item() == STEPS


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("rule", ["default", "ema"])
def test_same_as_torch_on_cuda(rule: str, backend: str) -> None:
    model = conv_net().to("cuda")
    ours = swa_fast.AveragedModel(model, backend=backend, **RULES[rule](swa_fast))
    theirs = swa_utils.AveragedModel(model, **RULES[rule](swa_utils))
    assert ours.n_averaged.device.type == "cuda"
    exact: dict[str, np.ndarray] = {}
    for n in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape).to("cuda"), alpha=0.1)
        exact_step(exact, model, rule, n, False)
        ours.update_parameters(model)
        theirs.update_parameters(model)
        compare(ours, theirs, exact, rule, False)


@pytest.mark.gpu
def test_average_on_the_cpu_of_a_model_on_cuda() -> None:
    model = conv_net().to("cuda")
    averaged = swa_fast.AveragedModel(model, device="cpu")
    model[1].running_mean.add_(1.0)
    averaged.update_parameters(model)
    assert averaged.n_averaged.device.type == "cpu"
    for name, tensor in named_tensors(averaged.module).items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, named_tensors(model)[name].cpu()), name


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_update_in_a_captured_graph(backend: str) -> None:
    """Weights 1, 1/2, 1/3 at replay, although the graph was captured once."""
    model = nn.Linear(130, 31).to("cuda")
    averaged = swa_fast.AveragedModel(model, backend=backend)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        averaged.update_parameters(model)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        averaged.update_parameters(model)
    averaged.n_averaged.zero_()
    with torch.no_grad():
        for value in (1.0, 2.0, 6.0):
            model.weight.fill_(value)
            graph.replay()
    torch.testing.assert_close(averaged.module.weight.cpu(), torch.full((31, 130), 3.0))
    assert averaged.n_averaged.item() == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_average_of_low_precision_parameters(dtype: torch.dtype) -> None:
    """EMA 0.9999 in bf16 never moves; in fp32 it does."""
    model = nn.Linear(40, 30).to(dtype)
    start = model.weight.detach().clone()
    averaged = swa_fast.AveragedModel(
        model, multi_avg_fn=swa_fast.get_ema_multi_avg_fn(0.9999), dtype=torch.float32
    )
    low = swa_fast.AveragedModel(model, multi_avg_fn=swa_fast.get_ema_multi_avg_fn(0.9999))
    assert averaged.module.weight.dtype == torch.float32
    for average in (averaged, low):
        average.update_parameters(model)
    with torch.no_grad():
        model.weight.add_(1.0)
    for average in (averaged, low):
        for _ in range(100):
            average.update_parameters(model)
    expected = start.double() + (1 - 0.9999**100) * (model.weight.double() - start.double())
    torch.testing.assert_close(averaged.module.weight.double(), expected, rtol=1e-5, atol=1e-6)
    if dtype == torch.bfloat16:
        large = start.abs() > 0.1
        assert torch.equal(low.module.weight[large], start[large])


def test_dtype_keeps_complex_and_integer_tensors() -> None:
    model = Complex()
    model.register_buffer("count", torch.tensor(3))
    averaged = swa_fast.AveragedModel(model, dtype=torch.float64)
    assert averaged.module.weight.dtype == torch.complex64
    assert averaged.module.real.dtype == torch.float64
    assert averaged.module.count.dtype == torch.int64
    averaged.update_parameters(model)
    assert torch.equal(averaged.module.weight, model.weight)


@pytest.mark.parametrize("rule", [r for r in RULES if r != "user"])
def test_pickle_and_deepcopy(rule: str) -> None:
    model = conv_net()
    averaged = swa_fast.AveragedModel(model, **RULES[rule](swa_fast))
    averaged.update_parameters(model)
    buffer = io.BytesIO()
    torch.save(averaged, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(averaged),
        pickle.loads(pickle.dumps(averaged)),
        torch.load(buffer, weights_only=False),
    ]
    perturb(model)
    averaged.update_parameters(model)
    for other in copies:
        other.update_parameters(model)
        for expected, found in zip(
            averaged.state_dict().values(), other.state_dict().values(), strict=True
        ):
            assert torch.equal(expected, found)


def test_state_dict_loads_with_weights_only(tmp_path) -> None:
    averaged = swa_fast.AveragedModel(conv_net())
    averaged.update_parameters(averaged.module)
    torch.save(averaged.state_dict(), tmp_path / "average.pt")
    loaded = torch.load(tmp_path / "average.pt", weights_only=True)
    swa_utils.AveragedModel(conv_net()).load_state_dict(loaded)


def test_wrapped_models_are_unwrapped() -> None:
    model = conv_net()
    averaged = swa_fast.AveragedModel(model)

    class Wrapper(nn.Module):  # the naming of DataParallel and DistributedDataParallel
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    averaged.update_parameters(Wrapper(model))
    averaged.update_parameters(torch.compile(model))
    swa_fast.AveragedModel(Wrapper(model)).update_parameters(model)
    partly = copy.deepcopy(model)
    partly[0] = torch.compile(partly[0])
    averaged.update_parameters(partly)
    assert torch.equal(averaged.module[0].weight, model[0].weight)


def test_constructor_refuses() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="at most one"):
        swa_fast.AveragedModel(
            model,
            avg_fn=swa_fast.get_swa_avg_fn(),
            multi_avg_fn=swa_fast.get_swa_multi_avg_fn(),
        )
    with pytest.raises(ValueError, match="backend: expected one of cuda, triton, cpu, reference"):
        swa_fast.AveragedModel(model, backend="gpu")
    with pytest.raises(TypeError, match=r"dtype: expected one of .* found torch.int64"):
        swa_fast.AveragedModel(model, dtype=torch.int64)


def test_model_that_does_not_fit_changes_nothing() -> None:
    averaged = swa_fast.AveragedModel(conv_net())
    averaged.update_parameters(conv_net())
    before = {k: v.clone() for k, v in averaged.state_dict().items()}
    other = conv_net()
    other[0] = nn.Conv2d(3, 8, 5, bias=True)
    other[7] = nn.Identity()
    other[6] = nn.BatchNorm1d(4)
    with pytest.raises(ValueError) as caught:
        averaged.update_parameters(other)
    message = str(caught.value)
    for line in (
        "parameter 0.weight: shape (8, 3, 3, 3) in the average, (8, 3, 5, 5) in the model",
        "parameter 0.bias: in the model, not in the average",
        "parameter 7.weight: in the average, not in the model",
        "buffer 6.running_mean: shape (5,) in the average, (4,) in the model",
    ):
        assert line in message
    untied = Tied()
    untied.out = nn.Linear(5, 7, bias=False)
    with pytest.raises(
        ValueError, match=r"parameter out\.weight: in the model, not in the average"
    ):
        swa_fast.AveragedModel(Tied()).update_parameters(untied)
    for name, value in averaged.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_masks_and_counters_are_copied() -> None:
    """torch raises on a boolean buffer and truncates an averaged counter."""
    model = nn.Module()
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("count", torch.tensor(5))
    averaged = swa_fast.AveragedModel(model, use_buffers=True)
    for _ in range(3):
        model.mask.logical_not_()
        model.count += 2
        averaged.update_parameters(model)
    assert averaged.module.mask.tolist() == [False, True]
    assert averaged.module.count.item() == 11


def test_reordered_model_is_paired_by_name() -> None:
    """torch pairs by position, and mixes these two silently."""

    class Pair(nn.Module):
        def __init__(self, order: str) -> None:
            super().__init__()
            for name in order:
                setattr(self, name, nn.Parameter(torch.full((2,), float(ord(name)))))

    averaged = swa_fast.AveragedModel(Pair("ab"))
    averaged.update_parameters(Pair("ba"))
    assert averaged.module.a.tolist() == [97.0, 97.0]


def test_unsupported_dtype_is_named_and_nothing_changes() -> None:
    model = nn.Module()
    model.first = nn.Parameter(torch.zeros(2))
    model.quantised = nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn), requires_grad=False)
    averaged = swa_fast.AveragedModel(model)
    with torch.no_grad():
        model.first.fill_(1.0)
    with pytest.raises(TypeError, match="quantised: the average has dtype float8_e4m3fn"):
        averaged.update_parameters(model)
    assert averaged.module.first.tolist() == [0.0, 0.0]
    assert averaged.n_averaged.item() == 0


def test_swalr_is_torchs() -> None:
    assert swa_fast.SWALR is swa_utils.SWALR


def test_tensors_of_the_average_are_ordinary() -> None:
    """Each has memory of its own, stays where it is, and is no view of anything."""
    model = Net()
    averaged = swa_fast.AveragedModel(model)
    tensors = [*averaged.module.parameters(), *averaged.module.buffers(), averaged.n_averaged]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)
    assert len({t.untyped_storage().data_ptr() for t in tensors if t.numel()}) == sum(
        t.numel() > 0 for t in tensors
    )
    addresses = [t.data_ptr() for t in tensors]
    for _ in range(2):
        step(model)
        averaged.update_parameters(model)
    with averaged.applied(model):
        pass
    now = [*averaged.module.parameters(), *averaged.module.buffers(), averaged.n_averaged]
    assert all(a is b for a, b in zip(tensors, now, strict=True))
    assert [t.data_ptr() for t in now] == addresses
    assert averaged.module.out.weight is averaged.module.embed.weight


@pytest.mark.filterwarnings("ignore::UserWarning:torch.profiler")
def test_building_costs_one_model_of_memory() -> None:
    model = nn.Linear(1000, 1000)
    with torch.profiler.profile(profile_memory=True) as profile:
        averaged = swa_fast.AveragedModel(model)
        averaged.update_parameters(model)
    allocated = sum(
        e.self_cpu_memory_usage for e in profile.key_averages() if e.self_cpu_memory_usage > 0
    )
    assert allocated < 1.05 * 4 * 1001 * 1000


def test_parts_are_saved_and_shared_as_what_they_are(tmp_path: Path) -> None:
    model = Net()
    averaged = swa_fast.AveragedModel(model)
    averaged.update_parameters(model)
    torch.save(averaged.module.bn.state_dict(), tmp_path / "part.pt")
    assert (tmp_path / "part.pt").stat().st_size < 5000
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    averaged = swa_fast.AveragedModel(model)
    averaged.update_parameters(model)
    safetensors.save_model(averaged, str(tmp_path / "average.safetensors"))
    assert (
        safetensors.load_file(tmp_path / "average.safetensors").keys()
        == averaged.state_dict().keys()
    )
    averaged.share_memory()
    averaged.update_parameters(model)
    assert all(t.is_shared() for t in averaged.parameters())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("how", ["shape", "missing", "unexpected", "hook", "interrupted", "extra"])
def test_a_load_that_fails_changes_nothing(how: str, assign: bool) -> None:
    class Counts(nn.BatchNorm1d):
        def get_extra_state(self) -> int:
            return 1

        def set_extra_state(self, state: int) -> None:
            if state != 1:
                raise ValueError("no such state")

    model = conv_net()
    model.append(Counts(2))
    model.append(nn.Linear(2, 2))
    averaged = swa_fast.AveragedModel(model)
    averaged.update_parameters(model)
    objects = dict(itertools.chain(averaged.named_parameters(), averaged.named_buffers()))
    before = {name: tensor.detach().clone() for name, tensor in objects.items()}
    state: dict[str, Any] = {
        name: tensor + 1 if isinstance(tensor, Tensor) else tensor
        for name, tensor in averaged.state_dict().items()
    }
    last = "module.9.bias"
    error: type[BaseException] = RuntimeError
    handle = None
    if how == "shape":
        state[last] = torch.zeros(3)
    elif how == "missing":
        del state[last]
    elif how == "unexpected":
        state["module.other"] = torch.zeros(3)
    elif how == "extra":
        error = ValueError
        state[next(name for name in state if "extra" in name)] = 2
    else:
        error = KeyboardInterrupt if how == "interrupted" else AssertionError

        def fail(*_: object) -> None:
            raise error

        handle = averaged.module[-1].register_load_state_dict_post_hook(fail)
    with pytest.raises(error):
        averaged.load_state_dict(state, assign=assign)
    after = dict(itertools.chain(averaged.named_parameters(), averaged.named_buffers()))
    assert list(after) == list(objects)
    for name, tensor in after.items():
        assert tensor is objects[name], name
        assert torch.equal(tensor, before[name]), name
    averaged.update_parameters(model)
    assert averaged.n_averaged == 2
    if handle is not None:
        handle.remove()
        averaged.load_state_dict(state, assign=assign)
        assert averaged.n_averaged == 2 and torch.equal(averaged.module[9].bias, state[last])


@pytest.mark.parametrize("use_buffers", [False, True])
def test_survives_what_is_done_to_it(use_buffers: bool, tmp_path) -> None:
    model = Net()
    averaged = swa_fast.AveragedModel(model, use_buffers=use_buffers)
    plain = swa_fast.AveragedModel(model, use_buffers=use_buffers, backend="reference")

    def written(a: swa_fast.AveragedModel) -> None:
        with torch.no_grad():
            a.module.turned.mul_(2)
            a.n_averaged.add_(3)

    def loaded(a: swa_fast.AveragedModel) -> None:
        a.load_state_dict({k: v.clone() for k, v in a.state_dict().items()})

    def assigned(a: swa_fast.AveragedModel) -> None:
        a.load_state_dict({k: v.clone() for k, v in a.state_dict().items()}, assign=True)

    def shared(a: swa_fast.AveragedModel) -> None:
        a.share_memory()

    def replaced(a: swa_fast.AveragedModel) -> None:
        a.module.frozen = nn.Parameter(torch.zeros(4097))
        a.module.bn.running_mean = torch.zeros(5)

    def widened(a: swa_fast.AveragedModel) -> None:
        of_dtype(a, torch.float64)

    for change in (written, loaded, assigned, shared, replaced, widened, written):
        for one in (averaged, plain):
            change(one)
        for _ in range(2):
            step(model)
            averaged.update_parameters(model)
            plain.update_parameters(model)
        for name, tensor in averaged.state_dict().items():
            torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-5, atol=1e-6)
        if change is shared:
            assert averaged.module.frozen.is_shared()
    clone = copy.deepcopy(averaged)
    step(model)
    clone.update_parameters(model)
    assert averaged.n_averaged + 1 == clone.n_averaged
    assert averaged.module.frozen.data_ptr() != clone.module.frozen.data_ptr()
    averaged.update_parameters(model)
    for name, tensor in averaged.state_dict().items():
        assert torch.equal(tensor, clone.state_dict()[name])
    torch.save(averaged.state_dict(), tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 200_000


def test_the_model_is_not_kept() -> None:
    model = Net()
    averaged = swa_fast.AveragedModel(model)
    averaged.update_parameters(model)
    alive = weakref.ref(model.turned)
    del model
    gc.collect()
    assert alive() is None
    averaged.update_parameters(Net())


def test_applied() -> None:
    model = Net()
    averaged = swa_fast.AveragedModel(model)
    with pytest.raises(RuntimeError, match="has not been updated yet"):
        averaged.applied(model).__enter__()
    for _ in range(3):
        step(model)
        averaged.update_parameters(model)
    live = snapshot(model)
    average = snapshot(averaged.module)
    with pytest.raises(ArithmeticError), averaged.applied(model):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, average[name])
        for refused in (
            lambda: averaged.applied(model).__enter__(),
            lambda: averaged.update_parameters(model),
            lambda: averaged.load_state_dict({}),
        ):
            with pytest.raises(RuntimeError, match="applied"):
                refused()
        raise ArithmeticError
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, live[name])
        assert torch.equal(averaged.module.state_dict()[name], average[name])
    with averaged.applied(model), torch.no_grad():
        averaged.module.frozen.zero_()
    assert not averaged.module.frozen.any()
    assert torch.equal(model.frozen, live["frozen"])


def test_applied_in_another_dtype_and_with_a_user_s_function() -> None:
    model = of_dtype(Net(), torch.bfloat16)
    for arguments in ({"dtype": torch.float32}, {"avg_fn": lambda a, b, n: (a + b) / 2}):
        averaged = swa_fast.AveragedModel(model, **arguments)
        averaged.update_parameters(model)
        step(model)
        averaged.update_parameters(model)
        live, average = snapshot(model), snapshot(averaged.module)
        with averaged.applied(model):
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, average[name].to(tensor.dtype))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, live[name])
            assert torch.equal(averaged.module.state_dict()[name], average[name])


def test_says_that_an_ema_would_stand_still(caplog) -> None:
    swa_fast.AveragedModel(
        nn.Linear(2, 2).bfloat16(), multi_avg_fn=swa_fast.get_ema_multi_avg_fn(0.9999)
    )
    assert "below the resolution 0.0078 of torch.bfloat16" in caplog.text
