"""Averages of sharded parameters: gloo processes on the CPU, each with its pieces."""

from __future__ import annotations

import copy
import datetime
import os
import socket
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import Calls, run_processes
from test_hooks import at_every_line
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import swa_fast
from swa_fast import EMA, SWA, AveragedModel, Averager, Power, Window, sharding
from swa_fast.post_hoc import PostHoc

RULES: dict[str, Any] = {
    "swa": SWA(),
    "ema": EMA(0.9),
    "warm": EMA(0.99, warmup="diffusers"),
    "power": Power(3.0),
    "window": Window(2),
}
STEPS = 5


def make_model(norm: bool = False) -> nn.Module:
    """Pieces of uneven sizes: (7, 10) on four processes has 2, 2, 2 and 1 rows, and (1, 7) has none
    but on the first."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 7),
        nn.BatchNorm1d(7) if norm else nn.Tanh(),
        nn.Sequential(nn.Linear(7, 8), nn.Tanh()),
        nn.Linear(8, 1),
    )


def make_input() -> Tensor:
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(1))


def mesh_of(ranks: int, *names: str) -> Any:
    sizes = (ranks,) if len(names) < 2 else (2, ranks // 2)
    return init_device_mesh("cpu", sizes, mesh_dim_names=names or ("data",))


def shard(model: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    """One group for the inner module, one for the root, as training scripts do it."""
    fully_shard(model[2], mesh=mesh, **options)  # type: ignore[index]
    fully_shard(model, mesh=mesh, **options)
    return model


def values(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Whole weights of a step, the same in every process."""
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


@torch.no_grad()
def put(model: nn.Module, step: int) -> None:
    for (_, parameter), value in zip(
        model.named_parameters(), values(model, step).values(), strict=True
    ):
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(
                value, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            parameter._local_tensor.copy_(whole._local_tensor)
        else:
            parameter.copy_(value)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def reference(steps: int = STEPS, rules: dict[str, Any] | None = None) -> Averager:
    model = make_model()
    averager = Averager(model, RULES if rules is None else rules)
    for step in range(steps):
        put(model, step)
        averager.update()
    return averager


def expect_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def check_rules(model: nn.Module) -> None:
    averager = Averager(model, RULES)
    for step in range(STEPS):
        put(model, step)
        with CommDebugMode() as communication:
            averager.update()
        assert communication.get_total_counts() == 0
    for name, expected in reference().averages.items():
        found = averager.averages[name]
        expect_equal(whole(found), expected)
        for key, parameter in model.named_parameters():
            average: Any = found[key]
            if isinstance(parameter, DTensor):
                assert (average.device_mesh, average.placements, average.shape, average.stride()) \
                    == (parameter.device_mesh, parameter.placements, parameter.shape,
                        parameter.stride())  # fmt: skip


def fsdp(ranks: int, folder: Path) -> None:
    check_rules(shard(make_model(), mesh_of(ranks)))


def one_launch(ranks: int, folder: Path) -> None:
    model = shard(make_model(), mesh_of(ranks))
    averager = Averager(model, {"swa": SWA()})
    averager.update()
    with Calls() as calls:
        averager.update()
    assert calls.names == ["swa_fast.update_.cpu"]


def tensor_parallel(ranks: int, folder: Path) -> None:
    plan = {"0": ColwiseParallel(), "2.0": RowwiseParallel()}
    check_rules(parallelize_module(make_model(), mesh_of(ranks), plan))  # type: ignore[arg-type]


def replicated(ranks: int, folder: Path) -> None:
    """HSDP: the processes that hold the same piece hold the same average."""
    check_rules(shard(make_model(), mesh_of(ranks, "replicate", "shard")))


def two_dimensional(ranks: int, folder: Path) -> None:
    mesh = mesh_of(ranks, "data", "tensor")
    model = make_model()
    plan = {"0": ColwiseParallel(), "2.0": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)  # type: ignore[arg-type]
    check_rules(shard(model, mesh["data"]))
    # Pieces of pieces, the strided ones among them, are cut out of whole tensors.
    averager = Averager(model, RULES)
    state = reference().state_dict()
    averager.load_state_dict(state)
    for name, expected in state["averages"].items():
        if name in RULES:
            expect_equal(whole(averager.averages[name]), expected)


def first_on_meta(ranks: int, folder: Path) -> None:
    with torch.device("meta"):
        model = make_model()
    shard(model, mesh_of(ranks))
    with pytest.raises(ValueError, match="meta device"):
        Averager(model, RULES)
    model.to_empty(device="cpu")
    put(model, 0)
    averager = Averager(model, RULES)
    averager.update()
    # What the parameters are made of is exchanged for something else.
    model.to_empty(device="cpu")
    for step in range(1, STEPS):
        put(model, step)
        averager.update()
    for name, expected in reference().averages.items():
        expect_equal(whole(averager.averages[name]), expected)


def mixed_precision(ranks: int, folder: Path) -> None:
    """The pieces are the masters in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = shard(make_model(), mesh_of(ranks), mp_policy=policy)
    model(make_input().bfloat16()).sum().backward()
    check_rules(model)


def offloaded(ranks: int, folder: Path) -> None:
    model = shard(make_model(), mesh_of(ranks), offload_policy=CPUOffloadPolicy(pin_memory=False))
    check_rules(model)


def outputs(averager: Averager, name: str) -> Tensor:
    """Of a whole model with an average."""
    model = make_model()
    model.load_state_dict(whole(averager.averages[name]))
    with torch.no_grad():
        return model(make_input())  # type: ignore[no-any-return]


def stale(ranks: int, folder: Path) -> None:
    """A forward with the raw weights before the swap, within it, and after it: FSDP's gathered
    copies must not outlive what they were gathered from."""
    ways: list[dict[str, Any]] = [
        {}, {"reshard_after_forward": False}, {"reshard_after_forward": True},
    ]  # fmt: skip
    if ranks == 4:
        ways.append({"reshard_after_forward": 2})
    x = make_input()
    for options in ways:
        for before in (False, True):
            model = shard(make_model(), mesh_of(ranks), **options)
            averager = Averager(model, {"ema": EMA(0.5)})
            for step in range(2):
                put(model, step)
                averager.update()
            whole_model = make_model()
            put(whole_model, 1)
            with torch.no_grad():
                raw = whole_model(x)
                if before:
                    torch.testing.assert_close(model(x), raw)
                expected = outputs(averager, "ema")
                assert (expected - raw).abs().max() > 0.01
                with averager.applied("ema"):
                    torch.testing.assert_close(model(x), expected)
                    expect_equal(whole(averager.averages["ema"]), whole(dict(
                        reference(2, {"ema": EMA(0.5)}).averages["ema"])))  # fmt: skip
                torch.testing.assert_close(model(x), raw)
                # Gathered ahead, and not used yet.
                for module in model.modules():
                    if isinstance(module, FSDPModule):
                        module.unshard(async_op=True)
                with averager.applied("ema"):
                    torch.testing.assert_close(model(x), expected)
                torch.testing.assert_close(model(x), raw)
                averager.blend_("ema", 1.0)
                torch.testing.assert_close(model(x), expected)


def another_model(ranks: int, folder: Path) -> None:
    """Updates from a model that is sharded in the same way; averages that lie elsewhere."""
    model, other = (shard(make_model(), mesh_of(ranks)) for _ in range(2))
    averager = Averager(model, RULES)
    for step in range(STEPS):
        put(other, step)
        averager.update(source=other)
    for name, expected in reference().averages.items():
        expect_equal(whole(averager.averages[name]), expected)
    with pytest.raises(ValueError, match=r"0.weight: expected it sharded as .* found None"):
        averager.update(source=make_model())
    with pytest.raises(TypeError, match="expected whole parameters"):
        averager.module("ema")
    for value in averager.to(dtype=torch.float64).averages["ema"].values():
        assert value.dtype == torch.float64 and isinstance(value, DTensor)


def updates_while_gathered(ranks: int, folder: Path) -> None:
    model = shard(make_model(), mesh_of(ranks))
    averager = Averager(model, RULES)
    for step in range(STEPS):
        put(model, step)
        with torch.no_grad():
            model(make_input())
        averager.update()
        put(model, step)  # a name walk would find plain tensors here
    # Also one that is made while they are.
    with torch.no_grad():
        model(make_input())
    assert all(isinstance(t, DTensor) for t in Averager(model, RULES).averages["ema"].values())
    for name, expected in reference().averages.items():
        expect_equal(whole(averager.averages[name]), expected)


def averaged_twice(ranks: int) -> tuple[nn.Module, Averager, dict[str, Tensor]]:
    """A sharded model, an averager of it after two updates, and the whole average."""
    model = shard(make_model(), mesh_of(ranks))
    averager = Averager(model, {"ema": EMA(0.5)})
    for step in range(2):
        put(model, step)
        averager.update()
    kept = whole(copy.deepcopy(dict(averager.averages["ema"])))
    return model, averager, kept


def failures_within(ranks: int, folder: Path) -> None:
    """An exception in the block, also one in the middle of a forward, after which FSDP keeps what
    it has gathered."""
    model, averager, kept = averaged_twice(ranks)
    x = make_input()
    for broken in (False, True):
        handle = model[3].register_forward_pre_hook(lambda *_: 1 / 0) if broken else None  # type: ignore
        with pytest.raises(ZeroDivisionError), torch.no_grad(), averager.applied("ema"):
            model(x)
            raise ZeroDivisionError
        if handle is not None:
            handle.remove()
            if hasattr(model, "reset_iter_state"):
                model.reset_iter_state()  # type: ignore[operator]
        expect_equal(whole(averager.averages["ema"]), kept)
        expect_equal(whole(dict(model.named_parameters())), values(make_model(), 1))
        alone = make_model()
        put(alone, 1)
        with torch.no_grad():
            torch.testing.assert_close(model(x), alone(x))


def an_exception_before_every_line(ranks: int, folder: Path) -> None:
    """Of a block around a forward, after one that has left the root gathered, in all processes at
    the same line: pieces, averages and what a forward computes are those before."""
    x = make_input()
    # One model for all lines, as each of them leaves it as it was.
    model, averager, kept = averaged_twice(ranks)
    averaged = outputs(averager, "ema")
    with torch.no_grad():
        raw = model(x)

    def make() -> tuple[Callable[[], object], Callable[[], None]]:
        with torch.no_grad():
            model(x)
        return enter_and_leave, check

    def enter_and_leave() -> None:
        with torch.no_grad(), averager.applied("ema"):
            model(x)

    def check() -> None:
        with torch.no_grad():
            assert torch.equal(model(x), raw)
            expect_equal(whole(averager.averages["ema"]), kept)
            with averager.applied("ema"):
                torch.testing.assert_close(model(x), averaged)

    for file in ("sharding.py", "_applied.py"):
        assert at_every_line(make, file) > 15


def one_process_fails(ranks: int, folder: Path) -> None:
    """In the swap and while tensors are kept: an error in every process, and none waits."""
    model = shard(make_model(), mesh_of(ranks))
    averager = Averager(model, {"ema": EMA(0.5)})
    put(model, 0)
    averager.update()
    last = dist.get_rank() == ranks - 1
    original = sharding.reshard

    def fails(*arguments: Any, **options: Any) -> None:
        raise MemoryError("nothing left")

    if last:
        sharding.reshard = fails
    try:
        with (
            pytest.raises(MemoryError if last else RuntimeError, match=r"left|another process"),
            averager.applied("ema"),
        ):
            raise AssertionError("not reached")
    finally:
        sharding.reshard = original
    with averager.applied("ema"):
        pass

    keep = sharding._kept
    kept = []

    def runs_out(*arguments: Any) -> Tensor:
        kept.append(keep(*arguments))
        if len(kept) == 2:
            raise RuntimeError("nothing left")
        return kept[-1]

    sharding._kept = runs_out
    try:
        with pytest.raises(RuntimeError, match="nothing left" if last else "could not keep"):
            averager.full_averages("ema", rank=ranks - 1)
    finally:
        sharding._kept = keep
    expect_equal(whole(dict(model.named_parameters())), values(make_model(), 0))


def full(ranks: int, folder: Path) -> None:
    model = shard(make_model(norm=True), mesh_of(ranks))
    averager = Averager(model, {"ema": EMA(0.5)})
    put(model, 0)
    averager.update()
    expected = {**values(make_model(norm=True), 0)}
    found = averager.full_averages("ema", rank=ranks - 1)
    halves = averager.full_averages("ema", dtype=torch.bfloat16)
    assert (found is None) == (dist.get_rank() != ranks - 1)
    assert (halves is None) == (dist.get_rank() != 0)
    if found is not None:
        make_model(norm=True).load_state_dict(found)
        expect_equal({n: found[n] for n in expected}, expected)
    if halves is not None:
        assert halves["0.weight"].dtype == torch.bfloat16
        assert halves["1.num_batches_tracked"].dtype == torch.int64
        assert torch.equal(halves["0.weight"], expected["0.weight"].bfloat16())
    with pytest.raises(KeyError):
        averager.full_averages("nothing")
    with pytest.raises(ValueError, match="holds no piece"):
        averager.full_averages("ema", rank=ranks)

    tied = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    tied[1].weight = tied[0].weight
    fully_shard(tied, mesh=mesh_of(ranks))
    averager = Averager(tied, {"power": Power(3.0)})
    averager.update()
    expected = whole(averager.averages["power"])
    found = averager.full_averages("power")
    written = PostHoc(averager, ["power"], folder / f"post{ranks}", every=1).save()
    assert len(written) == (dist.get_rank() == 0)
    if found is not None:
        assert found["1.weight"] is found["0.weight"]
        expect_equal(found, expected)
        stored = safetensors.torch.load_file(written[0])
        expect_equal(stored, {n: t for n, t in expected.items() if n != "1.weight"})


def batch_norm(ranks: int, folder: Path) -> None:
    """Statistics of all processes' batches, in buffers that FSDP does not shard."""
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(8, 10, generator=generator) for _ in range(2 * ranks)]
    model = shard(make_model(norm=True), mesh_of(ranks))
    averager = Averager(model, {"swa": SWA()}, buffers="skip")
    for step in range(2):
        put(model, step)
        averager.update()
    alone = make_model(norm=True)
    alone.load_state_dict({**alone.state_dict(), **whole(averager.averages["swa"])})
    with averager.applied("swa"):
        swa_fast.update_bn(batches[dist.get_rank() :: ranks], model, estimator="pooled", group=True)
        swa_fast.update_bn(batches, alone, estimator="pooled")
        for key in ("1.running_mean", "1.running_var"):
            torch.testing.assert_close(model.state_dict()[key], alone.state_dict()[key])
        model.eval(), alone.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(make_input()), alone(make_input()))


def skipped_steps(ranks: int, folder: Path) -> None:
    """A scaler that finds an infinity in the gradients of one process has all of them skip."""
    model = shard(make_model(), mesh_of(ranks))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    averager = Averager(model, {"swa": SWA()})
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with averager.attach(optimizer):
        for bad in (False, True, False):
            scaler.scale(model(make_input()).mean()).backward()
            gradient: Any = next(model.parameters()).grad
            if bad and dist.get_rank() == ranks - 1:
                gradient._local_tensor.fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert averager.n_averaged == {"swa": 2}


class Wrapper(Tensor):
    """A subclass of its own."""


def refusals(ranks: int, folder: Path) -> None:
    mesh = mesh_of(ranks)
    model = shard(make_model(), mesh)
    with pytest.raises(TypeError, match="AveragedModel: the model is sharded by fully_shard"):
        AveragedModel(model)
    with pytest.raises(TypeError, match="AveragedModel: 1 is sharded"):
        AveragedModel(nn.Sequential(nn.Identity(), model))
    with pytest.raises(TypeError, match="found a DTensor; samples"):
        swa_fast.SWAG(model)
    with pytest.raises(ValueError, match="on_nonfinite: expected None for sharded"):
        Averager(model, RULES, on_nonfinite="skip")

    local = torch.zeros(2, 3)
    partial = DTensor.from_local(local, mesh, [Partial()], run_check=False)
    with pytest.raises(ValueError, match=r"p: found the placements .*Partial"):
        Averager([("p", partial)], RULES)
    inside = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    inside._local_tensor = local.as_subclass(Wrapper)
    with pytest.raises(TypeError, match="p: found a Wrapper inside a DTensor"):
        Averager([("p", inside)], RULES)
    # As frameworks do that forget shape and stride: the first processes claim eight rows of seven.
    rows = torch.chunk(torch.zeros(7, 3), ranks)
    mine = rows[dist.get_rank()] if dist.get_rank() < len(rows) else torch.zeros(0, 3)
    lies = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=(9, 3), stride=(3, 1))
    if dist.get_rank() == ranks - 1:
        with pytest.raises(ValueError, match="p: found a piece of shape"):
            Averager([("p", lies)], RULES)

    # What cannot be resharded is not swapped.
    for unreachable, why in (
        (model[2][0], "outer one"),
        (list(model.named_parameters()), "module"),
    ):  # type: ignore
        averager = Averager(unreachable, {"swa": SWA()})  # type: ignore[arg-type]
        averager.update()
        with pytest.raises(RuntimeError, match=why), averager.applied("swa"):
            raise AssertionError("not reached")
    with pytest.raises(RuntimeError, match="gathered for a forward that is running"):
        handle = model[3].register_forward_pre_hook(lambda *_: averager.update())  # type: ignore
        averager = Averager(model, {"swa": SWA()})
        model(make_input())
    handle.remove()
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()  # type: ignore[operator]

    # States of another sharding.
    plain = Averager(make_model(), RULES)
    with pytest.raises(ValueError, match=r"0\.weight: found a DTensor"):
        plain.load_state_dict(Averager(shard(make_model(), mesh), RULES).state_dict())
    other = make_model()
    for child in (other[0], other[2][0], other[3]):  # type: ignore[index]
        for name, p in list(child.named_parameters()):
            replica = distribute_tensor(p.detach(), mesh, [Replicate()], src_data_rank=None)
            child.register_parameter(name, nn.Parameter(replica))
    sharded = Averager(shard(make_model(), mesh), RULES)
    kept = whole(copy.deepcopy(dict(sharded.averages["ema"])))
    with pytest.raises(ValueError, match=r"0.weight expected .*Shard.*found .*Replicate"):
        sharded.load_state_dict(Averager(other, RULES).state_dict())
    with pytest.raises(ValueError, match=r"0.weight expected shape \(7, 10\), found \(5, 5\)"):
        sharded.load_average("ema", {**make_model().state_dict(), "0.weight": torch.zeros(5, 5)})
    expect_equal(whole(sharded.averages["ema"]), kept)
    sharded.load_average("ema", make_model().state_dict())
    expect_equal(whole(sharded.averages["ema"]), make_model().state_dict())


def flat(ranks: int, folder: Path) -> None:
    """FSDP1, in both of its ways."""
    x = make_input()
    for original in (False, True):
        model = make_model()
        model[2] = FullyShardedDataParallel(  # type: ignore[index]
            model[2],
            use_orig_params=original,
            device_id=torch.device("cpu"),  # type: ignore
        )
        fsdp1 = FullyShardedDataParallel(
            model, use_orig_params=original, device_id=torch.device("cpu")
        )
        with pytest.raises(TypeError, match="fsdp1"):
            Averager(fsdp1, {"swa": SWA()})
        with pytest.raises(TypeError, match="is sharded by FullyShardedDataParallel"):
            AveragedModel(fsdp1)
        with pytest.raises(TypeError, match="flattened this parameter"):
            Averager(fsdp1.parameters(), {"swa": SWA()})
        averager = Averager(sharding.fsdp1(fsdp1), {"ema": EMA(0.5)})
        optimizer = torch.optim.SGD(fsdp1.parameters(), 0.5)
        expected: dict[str, Tensor] = {}
        for _ in range(3):
            fsdp1(x).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            averager.update()
            with FullyShardedDataParallel.summon_full_params(fsdp1):
                for name, p in fsdp1.named_parameters():
                    now = p.detach().clone()
                    before = expected.get(name, now)
                    expected[name] = before + 0.5 * (now - before)
        with torch.no_grad():
            raw = fsdp1(x)
            with averager.applied("ema"):
                with FullyShardedDataParallel.summon_full_params(fsdp1, writeback=False):
                    for name, p in fsdp1.named_parameters():
                        torch.testing.assert_close(p, expected[name])
                inside = fsdp1(x)
            after = fsdp1(x)
            assert torch.equal(after, raw)
            assert (inside - raw).abs().max() > 1e-4
        names = averager.averages["ema"].keys()
        assert names == {f"{dot}_flat_param[{dist.get_rank()} of {ranks}]" for dot in
                         ("", "_fsdp_wrapped_module.2.")}  # fmt: skip
    with pytest.raises(ValueError, match="expected a model in FullyShardedDataParallel"):
        sharding.fsdp1(make_model())


def continued(ranks: int, folder: Path) -> None:
    """Four processes save, two go on and save, three go on: see :func:`test_resharding`."""
    first = {4: 0, 2: 2, 3: 4}[ranks]
    model = shard(make_model(), mesh_of(ranks))
    averager = Averager(model, RULES)
    if first > 0:
        dcp.load({"averager": averager}, checkpoint_id=folder / f"at{first}")
        assert set(averager.n_averaged.values()) == {first}
    for step in range(first, first + 2):
        put(model, step)
        averager.update()
    if ranks == 4:
        saved = dcp.async_save({"averager": averager}, checkpoint_id=folder / "at2")
        averager.update()  # what is being saved is not written to
        saved.result()
    elif ranks == 2:
        dcp.save({"averager": averager}, checkpoint_id=folder / "at4")
    for name, expected in reference(first + 2 + (ranks == 4), None).averages.items():
        if ranks != 4:
            expect_equal(whole(averager.averages[name]), expected)


Check = Callable[[int, Path], None]
CHECKS: dict[int, list[Check]] = {
    4: [
        fsdp, one_launch, tensor_parallel, replicated, two_dimensional, first_on_meta,
        mixed_precision, offloaded, stale, another_model, updates_while_gathered, failures_within,
        full, batch_norm, skipped_steps, refusals, continued,
    ],
    2: [
        fsdp, tensor_parallel, stale, an_exception_before_every_line, one_process_fails, full, flat,
        continued,
    ],
    3: [continued],
}  # fmt: skip


def worker(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous{ranks}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    found = {}
    try:
        for check in CHECKS[ranks]:
            try:
                check(ranks, Path(folder))
            except BaseException:
                found[check.__name__] = traceback.format_exc()
                break  # the others may wait for this process
        torch.save(found, Path(folder) / f"{ranks}.{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> dict[int, list[dict[str, str]]]:
    """What failed, for each number of processes and each of them. Starting processes is what takes
    the time: one set of them does everything."""
    folder = tmp_path_factory.mktemp("ranks")
    result = {}
    for ranks in CHECKS:
        run_processes(worker, (ranks, str(folder)), ranks)
        result[ranks] = [torch.load(folder / f"{ranks}.{rank}.pt") for rank in range(ranks)]
    return result


@pytest.mark.parametrize(
    ("ranks", "name"),
    [(ranks, check.__name__) for ranks, checks in CHECKS.items() for check in checks],
)
def test_pieces(found: dict[int, list[dict[str, str]]], ranks: int, name: str) -> None:
    for rank, failed in enumerate(found[ranks]):
        assert name not in failed, f"process {rank}:\n{failed[name]}"
        # Those after one that failed have not run.
        assert not failed, f"not reached: {', '.join(failed)} failed in process {rank}"


def zero3_worker(rank: int, ranks: int, port: int, bf16: bool) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), DS_ACCELERATOR="cpu",
    )  # fmt: skip
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed.init_distributed("gloo", verbose=False)
    model = make_model()
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    adam = {"type": "Adam", "params": {"lr": 0.05, "torch_adam": True}}
    config = {
        "train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "optimizer": adam,
        "bf16": {"enabled": bf16},
    }  # fmt: skip
    deep, *_ = deepspeed.initialize(model=model, config=config)
    with pytest.raises(TypeError, match=r"0.weight: DeepSpeed has partitioned .*\(7, 10\)"):
        Averager(deep.module, {"ema": EMA(0.5)})
    with pytest.raises(TypeError, match="zero3"):
        AveragedModel(deep.module)
    averager = Averager(sharding.zero3(deep), {"ema": EMA(0.5)})
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(averager)
    x = make_input().to(torch.bfloat16 if bf16 else torch.float32)
    expected: dict[str, Tensor] = {}
    for _ in range(4):
        deep.backward(deep(x).float().pow(2).mean())
        deep.step()
        averager.update()
        for name, p in model.named_parameters():
            now = safe_get_full_fp32_param(p).clone()
            expected[name] = torch.lerp(expected.get(name, now), now, 0.5)
    alone = make_model()
    alone.load_state_dict(expected)
    alone.to(x.dtype)
    with torch.no_grad():
        raw = deep(x)  # which leaves gathered copies
        with averager.applied("ema"):
            assert torch.equal(deep(x), alone(x))
            for name, p in model.named_parameters():
                torch.testing.assert_close(safe_get_full_fp32_param(p), expected[name])
        assert torch.equal(deep(x), raw) and not torch.equal(raw, alone(x))
        averager.blend_("ema", 1.0)
        assert torch.equal(deep(x), alone(x))
    key = f"0.weight[{rank} of {ranks}]"
    assert averager.averages["ema"][key].shape == (35,)
    dist.destroy_process_group()


@pytest.mark.parametrize("bf16", [False, True])
def test_zero3(bf16: bool) -> None:
    pytest.importorskip("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_processes(zero3_worker, (2, port, bf16), 2)


def test_zero3_refuses_what_has_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = types.ModuleType("deepspeed.utils")
    utils.safe_get_local_fp32_param = lambda p: p.detach().clone()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)
    deep = types.SimpleNamespace(module=nn.Linear(2, 2), zero_optimization_stage=lambda: 3)
    with pytest.raises(ValueError, match="weight: its fp32 piece is offloaded"):
        sharding.zero3(deep)
    deep.zero_optimization_stage = lambda: 2
    with pytest.raises(ValueError, match=r"expected ZeRO stage 3, found 2.*engine.module"):
        sharding.zero3(deep)
