"""Averages of parameters that several processes hold in pieces.

Each process averages its own piece: the update is elementwise, so it needs no communication, and
the pieces of the average are what the average of the whole would hold, bit for bit.

* DTensor parameters, of FSDP2 (``fully_shard``), HSDP, tensor parallelism and combinations of them:
  :class:`~swa_fast.Averager` takes the module itself.
* FSDP1 and DeepSpeed's ZeRO-3: through :func:`fsdp1` and :func:`zero3`, which say where the pieces
  lie. A state of theirs fits the same number of processes alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fsdp1", "zero3"]


def _loaded(module: str, name: str) -> Any:
    """A class of a module that need not be imported where there is no object of it."""
    found = sys.modules.get(module)
    return None if found is None else getattr(found, name, None)


def is_dtensor(value: object) -> bool:
    kind = _loaded("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(value, kind)


def why_partitioned(tensor: object) -> str | None:
    """Why a tensor does not hold the parameter that it stands for, and what to do; else None."""
    if hasattr(tensor, "ds_shape"):
        return (
            f"DeepSpeed has partitioned this parameter of shape {tuple(tensor.ds_shape)}; give "
            "swa_fast.sharding.zero3(engine)"
        )
    if getattr(tensor, "_fsdp_flattened", False) or getattr(tensor, "_is_flat_param", False):
        return (
            "FullyShardedDataParallel has flattened this parameter; shard by "
            "torch.distributed.fsdp.fully_shard, or give swa_fast.sharding.fsdp1(model)"
        )
    return None


def check_whole(model: nn.Module, what: str, remedy: str) -> None:
    """Refuses a model whose modules gather and scatter their parameters.

    Raises:
        TypeError: FSDP's modules or ZeRO-3's parameters are among them.
    """
    names = ("FSDPModule", "FullyShardedDataParallel")
    kinds = tuple(k for k in (_loaded("torch.distributed.fsdp", name) for name in names) if k)
    for name, module in model.named_modules():
        if kinds and isinstance(module, kinds):
            raise TypeError(
                f"{what}: {name or 'the model'} is sharded by "
                f"{'fully_shard' if isinstance(module, kinds[0]) else 'FullyShardedDataParallel'}"
                f"; {remedy}"
            )
    for name, parameter in model.named_parameters():
        if (reason := why_partitioned(parameter)) is not None:
            raise TypeError(f"{what}: {name}: {reason} to Averager")


def check_not_flat(model: nn.Module) -> None:
    """Refuses FSDP1, whose modules name pieces of flat parameters like whole ones.

    Raises:
        TypeError: a module is wrapped.
    """
    kind = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    if kind is not None and any(isinstance(module, kind) for module in model.modules()):
        raise TypeError(
            "params_or_module: found FullyShardedDataParallel, whose parameters are pieces of flat "
            "ones; shard by torch.distributed.fsdp.fully_shard, or give "
            "swa_fast.sharding.fsdp1(model)"
        )


@dataclass(frozen=True)
class Shard:
    """How a process' piece of a DTensor belongs to the whole.

    Attributes:
        mesh: the DeviceMesh.
        placements: one for each of its dimensions.
        shape: of the whole.
        stride: of the whole.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Any) -> tuple[Shard, Tensor]:
        """A DTensor's, and its piece.

        Raises:
            TypeError: the piece is itself a tensor subclass.
            ValueError: a placement is Partial, or the piece is not what the placements say.
        """
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        local: Tensor = tensor._local_tensor  # to_local() records for autograd, at 35 us
        shard = cls(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tensor.stride())
        if any(placement.is_partial() for placement in shard.placements):
            raise ValueError(
                f"{name}: found the placements {shard.placements}, of which a Partial one holds "
                "terms of a sum and no weights; redistribute the parameter first"
            )
        if type(local) not in (Tensor, nn.Parameter):
            raise TypeError(
                f"{name}: found a {type(local).__name__} inside a DTensor, expected a plain tensor"
            )
        expected, _ = compute_local_shape_and_global_offset(
            shard.shape, shard.mesh, shard.placements
        )
        if shard.mesh.get_coordinate() is not None and tuple(local.shape) != tuple(expected):
            raise ValueError(
                f"{name}: found a piece of shape {tuple(local.shape)}, expected "
                f"{tuple(expected)} of the whole {tuple(shard.shape)} with {shard.placements} on "
                f"{shard.mesh}"
            )
        return shard, local

    def wrap(self, local: Tensor) -> Tensor:
        """The DTensor with this piece, which it shares."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        # Not from_local, which would move what lies elsewhere than the parameters. Shape and stride
        # are the parameter's: they cannot be told from pieces of different sizes.
        meta = TensorMeta(self.shape, self.stride, local.dtype)
        spec = DTensorSpec(self.mesh, self.placements, tensor_meta=meta)
        whole: Tensor = DTensor(local.detach(), spec, requires_grad=False)
        return whole

    def cut(self, value: object) -> object:
        """This process' piece of a DTensor that is sharded in the same way, or of a whole tensor,
        without communication.

        Raises:
            ValueError: it is sharded in another way.
        """
        if not isinstance(value, Tensor):
            return value
        if is_dtensor(value):
            theirs, local = Shard.of("it", value)
            if theirs.shape != self.shape:
                raise ValueError(f"expected shape {tuple(self.shape)}, found {tuple(theirs.shape)}")
            if (theirs.mesh, theirs.placements) != (self.mesh, self.placements):
                raise ValueError(
                    f"expected {self.placements} on {self.mesh}, found {theirs.placements} on "
                    f"{theirs.mesh}; torch.distributed.checkpoint loads it into a state_dict() of "
                    "this averager"
                )
            return local
        if value.shape != self.shape:
            raise ValueError(f"expected shape {tuple(self.shape)}, found {tuple(value.shape)}")
        from torch.distributed.tensor import distribute_tensor

        # None: every process cuts its piece out of its own copy of the whole.
        on_mesh = value.detach().to(self.mesh.device_type)
        sharded: Any = distribute_tensor(on_mesh, self.mesh, self.placements, src_data_rank=None)
        local = sharded._local_tensor
        return local


class Front(list[tuple[str, Tensor]]):
    """Named pieces, and how what is written to them reaches the forward.

    Args:
        pairs: of name and piece.
        publish: called after the pieces were written by somebody else than the optimiser.
    """

    def __init__(
        self, pairs: Sequence[tuple[str, Tensor]], publish: Callable[[], None] | None = None
    ) -> None:
        super().__init__(pairs)
        self.publish = publish


def _ranks(group: Any = None) -> str:
    import torch.distributed as dist

    if not dist.is_initialized():
        return "[0 of 1]"
    return f"[{dist.get_rank(group)} of {dist.get_world_size(group)}]"


def fsdp1(model: nn.Module) -> Front:
    """The pieces of a model in FullyShardedDataParallel, for :class:`~swa_fast.Averager`.

    Each unit has one flat parameter, of which every process holds as many elements, the last ones
    padded. The names say which process of how many it is, so that no other's state is loaded.
    Buffers are not among them.

    Args:
        model: in which modules are wrapped by ``torch.distributed.fsdp.FullyShardedDataParallel``.

    Raises:
        ValueError: no module is wrapped, or it has not run yet and holds no pieces.
    """
    kind = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    units = {} if kind is None else {
        name: module for name, module in model.named_modules() if isinstance(module, kind)
    }  # fmt: skip
    if not units:
        raise ValueError(f"fsdp1: expected a model in FullyShardedDataParallel, found none in "
                         f"{type(model).__name__}")  # fmt: skip
    pairs = []
    for name, unit in units.items():
        handle: Any = unit._handle
        if handle is None:
            continue  # a unit all of whose parameters are in the units within it
        flat = handle.flat_param
        # Without sharding the parameter is whole and stays where it is.
        piece = getattr(flat, "_local_shard", flat)
        dot = f"{name}." if name else ""
        pairs.append((f"{dot}_flat_param{_ranks(unit.process_group)}", piece.detach()))

    def publish() -> None:
        # The root keeps what it has gathered, and the next forward would go on with it.
        from torch.distributed.fsdp._runtime_utils import _reshard

        for unit in units.values():
            handle: Any = unit._handle
            if handle is not None and handle.uses_sharded_strategy:
                _reshard(unit, handle, True)

    return Front(pairs, publish)


def zero3(engine: Any) -> Front:
    """The fp32 pieces of a DeepSpeed engine at ZeRO stage 3, for :class:`~swa_fast.Averager`.

    They are what the optimiser steps; ``Averager.applied`` writes the pieces in the compute dtype
    as well, and has gathered copies dropped. Frozen parameters and buffers are not among them. The
    names say which process of how many it is, so that no other's state is loaded. To save the whole
    average: ``with averager.applied(...): engine.save_16bit_model(...)``.

    Args:
        engine: what ``deepspeed.initialize`` returned.

    Raises:
        ValueError: another stage, or the optimiser's pieces are offloaded, so that they have no
            address that lasts.
    """
    from deepspeed.utils import safe_get_local_fp32_param

    stage = engine.zero_optimization_stage()
    if stage != 3:
        raise ValueError(
            f"zero3: expected ZeRO stage 3, found {stage}; stages 1 and 2 keep parameters whole, "
            "in the compute dtype: give Averager the module (engine.module)"
        )
    pieces = []
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        piece = safe_get_local_fp32_param(parameter)
        again = safe_get_local_fp32_param(parameter)
        # What is offloaded is a copy, made anew at each call.
        if piece.data_ptr() != again.data_ptr():
            raise ValueError(
                f"{name}: its fp32 piece is offloaded, expected one on the device; train without "
                "offload_optimizer"
            )
        pieces.append((name, parameter, piece))

    @torch.no_grad()
    def publish() -> None:
        for _, parameter, piece in pieces:
            parameter.ds_tensor.data.view(-1).copy_(piece.view(-1))
        engine.empty_partition_cache()

    return Front([(f"{name}{_ranks()}", piece) for name, _, piece in pieces], publish)


def _fsdp_modules(model: nn.Module) -> Iterator[Any]:
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    if kind is not None:
        yield from (module for module in model.modules() if isinstance(module, kind))


def _groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return list(several)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def reshard(model: nn.Module, force: bool = False) -> None:
    """Drops what FSDP2 has gathered, or is gathering ahead: a forward would go on with it, whatever
    was written to the pieces. Without communication.

    Args:
        model: any module.
        force: also during a forward, which is broken then: for one that has failed.

    Raises:
        RuntimeError: a forward is running, or failed in the middle.
    """
    for module in _fsdp_modules(model):
        groups = _groups(module)
        for group in groups:
            if group._all_gather_result is not None:
                group.wait_for_unshard()
        module.reshard()
        for group in groups:
            if not group.is_sharded and force:
                group._to_sharded()
            if not group.is_sharded:
                raise RuntimeError(
                    f"the parameters of {group._module_fqn or type(module).__name__} are gathered "
                    "for a forward that is running, or that failed; end it first, or call the root "
                    "module's reset_iter_state()"
                )


def out_of_reach(model: nn.Module | None, shards: dict[str, Shard]) -> str | None:
    """Why gathered copies of these parameters could not be dropped; None if they can."""
    if not shards:
        return None
    if model is None:
        return (
            "they were given as tensors; give Averager the module that fully_shard was applied to"
        )
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    reached: set[int] = set()
    for module in _fsdp_modules(model):
        reached.update(map(id, module.modules()))
    for name, module in model.named_modules():
        managed = kind is not None and getattr(module, "_is_fsdp_managed_module", False)
        if managed and id(module) not in reached and any(map(is_dtensor, module.parameters(False))):
            return (
                f"those of {name or type(module).__name__} belong to an FSDP module around the one "
                "that Averager was given; give it the outer one"
            )
    return None


def agree(shards: dict[str, Shard], fine: bool) -> bool:
    """Whether all processes of the meshes are fine: collective."""
    import torch.distributed as dist

    meshes: list[Any] = []
    for shard in shards.values():
        if shard.mesh not in meshes:
            meshes.append(shard.mesh)
    for mesh in meshes:
        failed = torch.tensor(int(not fine), device=mesh.device_type)
        for group in mesh.get_all_groups():
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=group)
        fine = not bool(failed)
    return fine


def _kept(value: Tensor, device: torch.device) -> Tensor:
    return value.to(device, copy=True)


def gather(
    tensors: dict[str, Tensor],
    shards: dict[str, Shard],
    dtype: torch.dtype | None,
    device: torch.device,
    rank: int,
) -> dict[str, Tensor] | None:
    """Whole tensors in one process, see :meth:`Averager.full_averages`."""
    import torch.distributed as dist

    here = dist.get_rank() if shards else rank
    for name, shard in shards.items():
        if rank not in shard.mesh.mesh.flatten().tolist():
            raise ValueError(f"rank: found {rank}, which holds no piece of {name} on {shard.mesh}")
    result: dict[str, Tensor] = {}
    error: Exception | None = None
    names: dict[int, str] = {}  # of tied tensors, the first
    for name, tensor in tensors.items():
        if names.setdefault(id(tensor), name) != name:
            if names[id(tensor)] in result:
                result[name] = result[names[id(tensor)]]
            continue
        value = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        if name in shards:
            on_mesh = value.to(shards[name].mesh.device_type)
            whole: Any = shards[name].wrap(on_mesh)
            value = whole.full_tensor()
        if here != rank or error is not None:
            continue
        try:
            result[name] = _kept(value, device)
        except RuntimeError as found:  # out of memory; the others wait for the tensors that follow
            error = found
    fine = agree(shards, error is None) if shards else error is None
    if error is not None:
        raise error
    if not fine:
        raise RuntimeError(f"full_averages: rank {rank} could not keep the tensors; see its error")
    return result if here == rank else None
