"""ReLUs that are part of a BatchNorm layer in a pass: only in an nn.Sequential."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils._python_dispatch import TorchDispatchMode

import swa_fast


class Recorder(TorchDispatchMode):
    """Records what swa_fast::batch_norm_collect is asked for: whether to clamp."""

    def __init__(self) -> None:
        super().__init__()
        self.clamped: list[bool] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.name().startswith("swa_fast::batch_norm_collect"):
            self.clamped.append(args[4])
        return func(*args, **(kwargs or {}))


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4), nn.ReLU(inplace=True),
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU6(), nn.BatchNorm1d(4),
    )  # fmt: skip


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(8, 3) * (1 + i) + i for i in range(count)]


def assert_like_torch(ours: nn.Module, data: list[Any]) -> None:
    theirs = copy.deepcopy(ours)
    swa_fast.update_bn(data, ours)
    swa_utils.update_bn(data, theirs)
    for (key, value), expected in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=key)


def test_relus_behind_layers_in_a_sequential_are_fused() -> None:
    with Recorder() as recorder:
        swa_fast.update_bn(batches(2), net())
    assert recorder.clamped == [True, True, False, False] * 2
    assert_like_torch(net(), batches())


def _hook(module: nn.Module, args: Any, y: Any = None) -> None:
    return None


class Clamps(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=-0.5)


class Iterates(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for module in self:
            x = module(x)
            outputs.append(x)
        return torch.cat([outputs[1], outputs[2]])


@pytest.mark.parametrize("case", ["hook", "global hook", "subclass", "own forward", "own loop"])
def test_no_fusion_where_another_could_see_the_output(case: str) -> None:
    model = net()[:3]
    handle = None
    if case == "hook":
        handle = model[2].register_forward_pre_hook(_hook)
    elif case == "global hook":
        handle = nn.modules.module.register_module_forward_hook(_hook)
    elif case == "subclass":
        model[2] = Clamps()
    elif case == "own forward":
        model[2].forward = lambda x: x.clamp(min=-0.5)
    else:
        model = Iterates(*model)
    model = nn.Sequential(model, nn.BatchNorm1d(4))
    with Recorder() as recorder:
        assert_like_torch(model, batches())
    assert recorder.clamped == [False] * 6
    if handle is not None:
        handle.remove()


def test_forward_hooks_see_outputs_unfused_and_every_module_is_run() -> None:
    model = net()
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, y: seen.append(y))
    swa_fast.update_bn(batches(5), model)
    assert len(seen) == 5 and all((y < 0).any() for y in seen)


def test_a_hook_that_comes_during_the_pass_is_called() -> None:
    model = net()
    seen: list[Tensor] = []

    def loader() -> Any:
        yield from batches(2)
        model[1].register_forward_hook(lambda module, args, y: seen.append(y))
        yield from batches(2)

    swa_fast.update_bn(loader(), model)
    assert len(seen) == 2 and (seen[0] < 0).any()


def _gate(x: Tensor) -> Tensor:
    return torch.sigmoid(3.0 * x)


def scripted(model: Net, y: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        return torch.jit.script(_gate)(y)  # type: ignore[no-any-return]


def vmapped(model: Net, y: Tensor) -> Tensor:
    return torch.func.vmap(torch.sigmoid)(y)  # type: ignore[no-any-return]


def by_numpy(model: Net, y: Tensor) -> Tensor:
    return torch.from_numpy(y.detach().numpy() * 2)


def in_a_thread(model: Net, y: Tensor) -> Tensor:
    found: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.append(torch.sigmoid(y))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def of_the_last_forward(model: Net, y: Tensor) -> Tensor:
    last, model.last = model.last, y
    return y if last is None else last


class Net(nn.Module):
    """Something that no hook or mode sees uses the output of a layer beside its ReLU."""

    def __init__(self, other: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.second, self.last_bn = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.relu = nn.ReLU()
        self.other = other
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.first(x))
        y: Tensor = self.last_bn(self.second(self.relu(y) + self.other(self, y)))
        return y


@pytest.mark.parametrize("other", [scripted, vmapped, by_numpy, in_a_thread, of_the_last_forward])
def test_unseen_users_of_an_output(other: Callable[[Net, Tensor], Tensor]) -> None:
    assert_like_torch(Net(other), batches(6))


# ------------------------------------------------------------------------ what a model keeps itself


class Keeps(nn.Module):
    """A counter, a lock and random numbers behind the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.lock = threading.Lock()
        self.forwards = 0
        self.register_buffer("seen", torch.zeros(()))

    def __deepcopy__(self, memo: Any) -> Keeps:
        return Keeps()

    def forward(self, x: Tensor) -> Tensor:
        assert self.lock.acquire(blocking=False)
        x = self.drop(self.bn(self.drop(x)))
        self.lock.release()
        self.forwards += 1
        self.seen += 1
        return F.relu(x)


@pytest.mark.parametrize("size", [8, 5])
def test_every_forward_is_run_once_and_to_its_end(size: int) -> None:
    ours = Keeps()
    theirs = Keeps()
    data = [torch.randn(size, 3) + i for i in range(7)]
    states = []
    for update_bn, model in ((swa_fast.update_bn, ours), (swa_utils.update_bn, theirs)):
        torch.manual_seed(3)
        update_bn(data, model)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert ours.forwards == theirs.forwards == 7
    assert not ours.lock.locked()
    for value, expected in zip(
        ours.state_dict().values(), theirs.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("reaction", ["returns", "raises"])
def test_a_forward_that_catches_everything(reaction: str) -> None:
    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.bn2 = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn1(x)
            try:
                return self.bn2(x)  # type: ignore[no-any-return]
            except BaseException as error:
                if reaction == "raises":
                    raise RuntimeError("no luck") from error
                return self.bn1(x)  # type: ignore[no-any-return]

    assert_like_torch(Catches(), batches(5))
