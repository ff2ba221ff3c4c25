"""``update_bn``, the public front of the pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .options import Call, Options, device_of, process_group
from .report import BNReport
from .run import reestimate


@torch.no_grad()
def update_bn(
    loader: Iterable[Any],
    model: nn.Module,
    device: int | str | torch.device | None = None,
    *,
    estimator: str = "torch",
    unbiased: bool = True,
    max_batches: int | None = None,
    tolerance: float | None = None,
    call: Call | None = None,
    group: dist.ProcessGroup | bool | None = None,
    progress: bool = False,
    backend: str | None = None,
    channels_last: bool | None = None,
    graph: bool = False,
    keep_memory: bool = True,
) -> BNReport:
    r"""Replaces the running statistics of every BatchNorm layer by those of one pass over
    ``loader``. Drop-in for ``torch.optim.swa_utils.update_bn``.

    With the batches' sizes :math:`b_k`, numbers of values per channel :math:`m_k`, means
    :math:`\mu_k`, biased variances :math:`\sigma_k^2` and unbiased ones
    :math:`s_k^2 = \sigma_k^2 m_k / (m_k - 1)`, over :math:`K` batches, :math:`N = \sum b_k` and
    :math:`M = \sum m_k`:

    ========  =====================================================================================
    torch     :math:`\mu = \frac1K \sum \mu_k` and :math:`\sigma^2 = \frac1K \sum s_k^2`, what
              torch's function computes: a short last batch weighs as much as a full one
    weighted  :math:`\mu = \sum \frac{b_k}{N} \mu_k` and
              :math:`\sigma^2 = \sum \frac{b_k}{N} s_k^2`, the rule of the SWA paper's authors
    pooled    :math:`\mu = \sum \frac{m_k}{M} \mu_k` and
              :math:`\sigma^2 = \sum \frac{m_k}{M} (\sigma_k^2 + (\mu_k - \mu)^2)`, times
              :math:`M/(M-1)` if ``unbiased``: exactly the statistics of all values together, also
              where the batches' means differ (small batches, data in order)
    ========  =====================================================================================

    As in training each layer normalises by the statistics of its batch. Statistics are merged in
    float64 and written once, at the end.

    **Cost.** A layer reads its input once for the statistics, and in an ``nn.Sequential`` it is
    fused with a ReLU behind it, of which alone it is certain there that nobody else uses its
    output. One launch per batch merges all layers. The device is never waited for during the pass,
    and twice at its end, to raise on values that are not finite and on updates that were not seen.
    Every forward is run once and to its end, so that what a model keeps by itself (a counter, a
    lock, random numbers that dropout draws) is afterwards as after torch's pass. One exception: a
    model that cannot bear channels-last memory has the batch on which it fails run again.

    **The best setting** for the pass is the one of the training: call this inside the same
    ``torch.autocast``, where the device has the type in hardware. (A CPU without bf16 instructions
    is several times slower in bf16 than in fp32, and a warning in the log says so.) On the CPU,
    images are handed to models with convolutions in channels-last memory format, which is faster,
    unless the model cannot bear it (or ``channels_last=False``; random masks such as dropout's are
    then drawn in another order).
    Most of a pass over a large data set is spent on precision that nobody needs: see ``tolerance``.

    **Memory of the process.** With glibc on the CPU, malloc keeps large blocks for the time of the
    pass instead of returning them to the system, because clearing fresh pages takes as long as the
    computation. mallopt knows no smaller unit than the process: other threads' blocks are kept,
    too. When the pass ends, or the last of several that overlap in threads, also by an exception,
    free memory is returned, and malloc's thresholds are those that glibc arrives at by itself in a
    process that works with large tensors: blocks from 32 MiB on are mapped each for itself, and 64
    MiB may stay free at the end of each thread's heap. They no longer adapt by themselves.
    ``keep_memory=False``, ``SWA_FAST_KEEP_MEMORY=0`` and malloc's own environment variables leave
    malloc alone.

    **Modes.** A model in eval mode is put into training mode. A model in training mode is left as
    it is, submodules in eval mode included. BatchNorm layers that are in eval mode then are frozen:
    they keep their statistics and normalise by them. Modes are those of the model inside
    AveragedModel, ``torch.compile``, DataParallel and DistributedDataParallel, and the pass calls
    that model, uncompiled. All modes are restored.

    **Layers.** Without running statistics: left alone. Used several times in a forward: each use
    counts as a batch, as for torch. Not used: statistics stay (torch resets them). Calls of
    ``F.batch_norm`` on a layer's buffers count as uses of the layer, whoever makes them: the own
    forward of a subclass, on parts of a batch or with parts of it side by side, whatever momentum
    it passes, or the model itself. A forward that updates the buffers by hand is run with momentum
    1, and refused if what it writes still depends on what was there (its first batch is run through
    it a second time to see that). Updates that are not seen, such as by a scripted function, are
    refused at the end of the pass. Who reads the buffers during the pass finds what torch's pass
    would have there. Forwards may take derivatives. Lazy modules are initialised by a forward of
    the first batch. SyncBatchNorm that normalises over several ranks keeps doing so; unless the
    estimator is ``torch`` it needs ``group``, and it cannot have ``tolerance``. On the CPU, where
    it cannot synchronise, it is BatchNorm. Scripted models have no layers that could be seen, and
    are refused: re-estimate first, then script.

    Whatever raises, forwards, modes and momenta are restored, and no statistics have changed.

    Args:
        loader: batches, handed to the model as torch does: of a list or tuple the first element,
            anything else (a tensor, dict, dataclass, array, string, number, None) as it is.
        model: the model; one without layers to estimate is left alone and ``loader`` is not read.
        device: where tensors are moved before the forward, in nested lists, tuples, dicts and
            dataclasses and by an object's own ``to``; pinned ones asynchronously. None leaves them.
        estimator: ``torch``, ``weighted`` or ``pooled``, see above.
        unbiased: for pooled, whether the variance is divided by :math:`M - 1` or :math:`M`.
        max_batches: read no more than this many batches.
        tolerance: stop when the standard errors of all channels are below it: of the mean, relative
            to the standard deviation :math:`\sqrt{\sigma^2 + \epsilon}`, and of the variance,
            relative to :math:`\sigma^2 + \epsilon`. They are estimated from the scatter of the
            batches' statistics, :math:`\sqrt{\tau \sum_k (\mu_k - \bar\mu)^2 / (K (K - 1))}`, where
            :math:`\tau` (1 for batches in random order) is estimated from the correlation of
            neighbouring batches and of blocks of them: K batches are worth :math:`K/\tau`
            independent ones, of which there have to be 10. So the errors hold for shuffled data,
            and for data whose order is correlated or drifts over fewer batches than were read. They
            cannot hold for an order in which what comes later does not show at all in what was
            read, such as by class: a ``DataLoader`` with ``shuffle=False`` is therefore read to
            its end, with a warning in the log; other loaders have to see to it themselves. On a
            GPU the comparison lags behind by a batch or more. With ``group``, each rank stops by
            itself.
        call: ``call(model, batch)`` runs the forward, for models with other inputs; it is handed
            the whole batch, on ``device``, and the model without its wrappers.
        group: a process group, or True for the default one: every rank reads its own share of the
            data, of any length, and all end with the same statistics, those of all shares together.
            Ranks compare their layers before the pass and exchange statistics in one collective
            after it. A rank that fails makes all raise; one that is interrupted does not.
        progress: show a progress bar (tqdm).
        backend: ``cuda``, ``triton``, ``cpu`` or ``reference``; None chooses by device.
        channels_last: hand 4-dimensional tensors on the CPU over in channels-last memory format;
            None does for models with 2-d convolutions.
        graph: on a CUDA device, capture the forward of the fourth batch in a CUDA graph, and replay
            it for every later one: one launch for all of a batch. For models whose forward does the
            same work every time: what Python decides in it (a layer dropped at random, a value that
            changes from batch to batch) is decided once. Random numbers of the device, such as
            dropout's, are drawn anew. The capture waits for the device once and keeps the
            activations of one more batch. Batches of another shape are run by themselves, and so
            are all, with a warning in the log, where the first three forwards use the layers in
            different orders or wait for the device; with ``call``, forward hooks, FSDP, a
            synchronised layer or layers on several devices; and where a batch's input is not one
            tensor on the device. On the CPU it changes nothing.

    Returns:
        What was done, see :class:`BNReport`.

    Raises:
        ValueError: ``loader`` yields no batch; a batch has one value per channel in some layer
            (with pooled that is allowed, and such a layer puts out its bias); an argument outside
            its range; ranks whose layers differ.
        ValueError: also a layer whose running statistics are updated in a way that cannot be
            followed (see Layers); a scripted model.
        TypeError: an empty list or tuple as a batch; one without a tensor that the model fails on.
        FloatingPointError: activations that are not finite; the message names the first layer.
        ImportError: ``progress`` without tqdm.
        RuntimeError: another rank has failed.

    Sources: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", ICML 2015; Izmailov et al., "Averaging Weights Leads to Wider Optima
    and Better Generalization", UAI 2018; Wu and Johnson, "Rethinking 'Batch' in BatchNorm",
    arXiv 2105.07576.
    """
    options = Options(
        device=device_of(device),
        estimator=estimator,
        unbiased=unbiased,
        max_batches=max_batches,
        tolerance=tolerance,
        call=call,
        group=process_group(group),
        progress=progress,
        backend=backend,
        channels_last=channels_last,
        graph=graph,
        keep_memory=keep_memory,
    )
    return reestimate(loader, model, options)
