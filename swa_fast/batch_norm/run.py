"""The pass over the data: modes, layers, batches, ranks, and the result into the layers."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._layout import MEAN, SPREAD
from .batches import EMPTY, Loader, describe, in_order, tensors_of
from .collector import Collector
from .convergence import MIN_INDEPENDENT, Convergence
from .layers import (
    REFUSED_SCRIPT,
    Layer,
    has_lazy_tensors,
    kept_scripts,
    refuse_shared,
    scripted_layers,
    select,
    unwrap,
)
from .malloc import KeptMemory
from .options import Options
from .ranks import agree, merge_ranks
from .report import BNReport
from .statistics import (
    check_finite,
    eps_of,
    standard_errors,
    used_layers,
    write,
)

_log = logging.getLogger("swa_fast")


@contextlib.contextmanager
def _progress(loader: Iterable[Any], options: Options) -> Iterator[Callable[[], object]]:
    if not options.progress:
        yield lambda: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True: tqdm is not installed: `pip install tqdm`") from error
    total = options.max_batches
    # A DataLoader over an iterable data set has a __len__ that raises.
    with contextlib.suppress(TypeError, AttributeError):
        total = len(loader)  # type: ignore[arg-type]
        total = total if options.max_batches is None else min(total, options.max_batches)
    with tqdm(total=total, desc="BatchNorm statistics", unit="batch") as bar:
        yield bar.update


def _has_bf16() -> bool:
    """Whether the CPU has instructions that multiply bf16 numbers."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16"))


def _advise_on_autocast(collector: Collector) -> None:
    """Says that the pass is slow where bf16 is emulated: several times as long as in fp32."""
    if (
        any(s.device.type == "cpu" for s in collector.statistics)
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not _has_bf16()
    ):
        _warn_of_bf16()


@functools.cache
def _warn_of_bf16() -> None:
    """Once: training that does without the instructions knows it after the first pass."""
    _log.warning(
        "update_bn: under torch.autocast in bfloat16, for which this CPU has no instructions: the "
        "pass is several times faster in float32, outside autocast"
    )


def _forward(collector: Collector, loader: Loader, batch: Any) -> None:
    item = loader.input_of(batch, collector.batches)
    try:
        collector.forward(item)
    except (TypeError, AttributeError) as error:
        if next(tensors_of(item), None) is not None or hasattr(item, "to"):
            raise
        # torch's pass hands over whatever comes, and so does this one; but it can say more.
        raise TypeError(
            f"loader: expected batches that the model can be called with, found {describe(batch)} "
            f"in batch {collector.batches}: {error}; call= runs models with other inputs"
        ) from error


def _read_all(
    collector: Collector, loader: Loader, options: Options, step: Callable[[], object]
) -> Convergence | None:
    """Runs a forward of every batch, until the loader, ``max_batches`` or the tolerance ends it."""
    # What follows is drawn and counted as in any other loop over the batches: each forward is run
    # once and to its end, so that what a model keeps by itself (a counter, a lock, the state of a
    # random generator) is afterwards as it is behind torch's pass.
    statistics = collector.statistics
    convergence = None
    if options.tolerance is not None:
        convergence = Convergence(statistics, options.tolerance)
    # On the CPU a check after every batch costs nothing. Ranks check together, at the end.
    look = options.group is None and all(s.device.type == "cpu" for s in statistics)
    may_end = convergence is not None and not loader.in_order
    if convergence is not None and loader.in_order:
        _log.warning(
            "update_bn: tolerance=%g: the DataLoader reads its data in order (shuffle=False), of "
            "which a part may say nothing about the rest, so all is read",
            options.tolerance,
        )
    for batch in loader:
        drawn = torch.get_rng_state() if loader.channels_last else None
        try:
            _forward(collector, loader, batch)
        except RuntimeError:
            if drawn is None:
                raise
            # Models flatten activations by view(), which the other memory format does not allow.
            loader.channels_last = False
            torch.set_rng_state(drawn)
            retry = True
        else:
            retry = False
        if retry:
            _forward(collector, loader, batch)
        first = next(tensors_of(batch), None)
        collector.samples += collector.rows if first is None or not first.dim() else len(first)
        step()
        if look and not all(
            math.isfinite(s.accumulators[MEAN : SPREAD + 1].sum()) for s in statistics
        ):
            check_finite([s.accumulators for s in statistics], statistics)
        if convergence is not None:
            convergence.update()
            if may_end and collector.batches >= MIN_INDEPENDENT and convergence.reached():
                break
    return convergence


def _initialise_lazy(model: nn.Module, loader: Loader, options: Options) -> None:
    """Gives lazy modules their shapes by a forward of the first batch that estimates nothing."""
    model.eval()
    batch = loader.input_of(loader.first(), 0)
    if options.call is None:
        model(batch)
    else:
        options.call(model, batch)


def _prepare(
    loader: Iterable[Any],
    model: nn.Module,
    named: Sequence[tuple[str, nn.Module]],
    options: Options,
) -> tuple[Collector | None, tuple[str, ...], Loader | None]:
    """Sets the modes and selects the layers, upon which all ranks have to agree.

    Args:
        named: the model's modules with their names.

    Returns:
        The collector, None without layers; the names of the frozen layers; the loader if it had to
        be read, else None.

    Raises:
        ValueError: a layer cannot be served, or ranks differ.
        RuntimeError: another rank cannot take part.
    """
    modules = [module for _, module in named]
    modes = [module.training for module in modules]
    group = options.group
    source = None
    problem: Exception | None = None
    if any(isinstance(module, _BatchNorm) for module in modules) and has_lazy_tensors(modules):
        if group is None:
            source = Loader(loader, options)
            _initialise_lazy(model, source, options)
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
        else:
            problem = ValueError(
                "group: expected an initialised model, found lazy modules; run a forward of it "
                "first"
            )
    if options.switch_mode and not model.training:
        model.train()
    layers: list[Layer] = []
    frozen: tuple[str, ...] = ()
    collector = None
    if problem is None:
        try:
            layers, frozen = select(named)
            refuse_shared(layers, options)
            if scripted := scripted_layers(named):
                raise ValueError(REFUSED_SCRIPT.format(scripted[0][0] or "(the model itself)"))
            collector = Collector(model, modules, layers, options) if layers else None
        except Exception as error:
            problem = error
    if group is not None:
        agree(group, layers, (options.estimator, options.unbiased), problem)
    elif problem is not None:
        raise problem
    return collector, frozen, source


def reestimate(loader: Iterable[Any], wrapped: nn.Module, options: Options) -> BNReport:
    """Runs the pass that :func:`swa_fast.update_bn` describes. Gradients have to be off.

    Args:
        wrapped: the model with its wrappers.
    """
    started = time.perf_counter()
    options = options.completed_for(wrapped)
    model = unwrap(wrapped)
    # Listed once: the names of a deep model take longer than a small batch.
    named = list(model.named_modules())
    modes = [(module, module.training) for _, module in named]
    group = options.group
    convergence: Convergence | None = None
    # Compiled code would not see that forwards are replaced. Importing torch._dynamo is slow,
    # and without it nothing can be compiled.
    eager: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if "torch._dynamo" in sys.modules:
        eager = torch.compiler.set_stance("force_eager")
    try:
        with eager:
            collector, frozen, source = _prepare(loader, model, named, options)
            if collector is not None:
                try:
                    _advise_on_autocast(collector)
                    batches = source or Loader(loader, options)
                    on_cpu = any(s.device.type == "cpu" for s in collector.statistics)
                    # Named, so that it lives as long as a traceback of what fails within.
                    kept = KeptMemory(options.keep_memory and on_cpu)
                    with (
                        kept,
                        kept_scripts(named),
                        collector.replaced_forwards(),
                        _progress(loader, options) as step,
                    ):
                        convergence = _read_all(collector, batches, options, step)
                        collector.check_untouched()
                except Exception:
                    if group is not None:
                        # The others wait for this rank.
                        with contextlib.suppress(Exception):
                            merge_ranks(collector, group, failed=True)
                    raise
    finally:
        for module, mode in modes:
            module.training = mode
    if collector is None:
        if frozen:
            _log.warning(
                "update_bn: nothing to do: all %d BatchNorm layers are in eval mode inside a model "
                "in training mode, so they count as frozen",
                len(frozen),
            )
        seconds = time.perf_counter() - started
        return BNReport(options.estimator, "", 0, 0, (), (), frozen, None, None, None, seconds)

    statistics = collector.statistics
    if group is None:
        read, samples = collector.batches, collector.samples
        accumulators = [s.accumulators.cpu() for s in statistics]
    else:
        accumulators, read, samples = merge_ranks(collector, group, failed=False)
    if read == 0:
        raise ValueError(EMPTY + ("" if group is None else " on all ranks"))
    check_finite(accumulators, statistics)
    used = used_layers(statistics, accumulators, options.unbiased)
    seen = set(used)
    # Without a group the accumulators are on their devices already.
    results = accumulators if group is not None else [s.accumulators for s in statistics]
    write(statistics, results, used, options.unbiased)

    errors = [
        standard_errors(
            merged,
            part.estimator,
            eps_of(part, merged.device),
            None if convergence is None else convergence.dependences[place].inflation(),
        )
        for place, (part, merged) in enumerate(zip(statistics, accumulators, strict=True))
    ]
    mean_error, var_error = torch.stack(errors).amax(0).tolist()
    converged = correlation = None
    if options.tolerance is not None and convergence is not None:
        correlation = convergence.correlation()
        # A part of what is read in order says nothing about the rest.
        converged = (
            max(mean_error, var_error) <= options.tolerance
            and convergence.enough()
            and not (in_order(loader) and read == options.max_batches)
        )
    return BNReport(
        estimator=options.estimator,
        backend=", ".join(sorted({s.backend for s in statistics})),
        batches=read,
        samples=samples,
        layers=tuple(layer.name for layer in used),
        unused=tuple(layer.name for layer in collector.layers if layer not in seen),
        frozen=frozen,
        mean_error=mean_error if math.isfinite(mean_error) else None,
        var_error=var_error if math.isfinite(var_error) else None,
        converged=converged,
        correlation=correlation,
        seconds=time.perf_counter() - started,
        replayed=collector.replayed,
    )
