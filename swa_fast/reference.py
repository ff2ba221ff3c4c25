"""Every operator in plain PyTorch: the specification, the fallback and the test oracle.

Works on any device, for any strides, and in fp64. The operators' schemas are inferred from the
signatures here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _layout as layout

__all__ = [
    "batch_norm_collect",
    "batch_norm_merge_",
    "combine_",
    "philox",
    "swag_",
    "swap_",
    "update_",
]


def _math_dtype(average: Tensor, source: Tensor) -> torch.dtype:
    """Arithmetic type of a pair: float64 as soon as one side is float64, else float32."""
    if torch.float64 in (average.dtype, source.dtype):
        return torch.float64
    return torch.float32


def _weight(rule: list[float], n: Tensor) -> Tensor:
    """The source's weight as a float64 scalar on the counter's device."""
    kind, decay, min_decay, gamma, power, update_after_step = rule[:6]
    one = torch.ones((), dtype=torch.float64, device=n.device)
    if kind == layout.SWA:
        return one / (n + 1)
    if kind == layout.EXTERNAL:
        return torch.where(n == 0, one, 0 * one)
    if kind == layout.RING:
        return torch.where(n % int(gamma) == int(power), one, 0 * one)
    if kind == layout.FILLED:
        return torch.where(n > power, one / (power + 1), 0 * one)
    s = n - update_after_step
    positive = s.clamp(min=1).to(torch.float64)
    if kind == layout.CONSTANT:
        settled = one * (1.0 - decay)
    elif kind == layout.POWER_LAW:
        settled = -torch.expm1(power * torch.log1p(-1.0 / (positive + 1.0)))
    elif kind == layout.DEBIASED:
        settled = (1.0 - decay) / -torch.expm1(power * (positive + 1.0))
    else:
        if kind == layout.INVERSE_GAMMA:
            d = 1.0 - (1.0 + positive / gamma) ** -power
        elif kind == layout.EXPONENTIAL:
            d = -decay * torch.expm1(-positive / gamma)
        else:
            d = (1.0 + positive) / (10.0 + positive)
        settled = 1.0 - d.clamp(max=decay).clamp(min=min_decay)
    return torch.where(s <= 0, one, settled)


def _fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x y + z of float32 tensors, rounded once but for ties that float64 creates."""
    return (x.double() * y.double() + z.double()).float()


def _blend(average: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    """average + weight (source - average), in the form with the smaller error."""
    if average.dtype == torch.float64:
        return torch.lerp(average, source, weight)
    near = _fma(weight, source - average, average)
    far = _fma(weight - 1, source - average, source)
    return torch.where(weight < 0.5, near, far)


def philox(seed: int, groups: Tensor, n: Tensor, row: int) -> Tensor:
    """Philox4x32-10: for each counter four words of 32 random bits.

    Args:
        seed: the key, 64 bits.
        groups: int64 [count], the counter's first two words.
        n: int64 scalar, its third word (the lower 32 bits).
        row: its fourth.

    Returns:
        int64 [count, 4] with values below 2^32.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    low = 0xFFFFFFFF
    c0, c1 = groups & low, (groups >> 32) & low
    c2, c3 = (n & low).expand_as(groups), torch.full_like(groups, row)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        # The products wrap around in int64; their bits are those of the unsigned product.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & low) ^ c1 ^ k0,
            p1 & low,
            ((p0 >> 32) & low) ^ c3 ^ k1,
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack((c0, c1, c2, c3), dim=1)


def _round_stochastically(x: Tensor, first: int, seed: int, n: Tensor, row: int) -> Tensor:
    """float32 values, elements ``first`` and on of an average, to bfloat16: up with the
    probability of the distance from the next lower one."""
    place = torch.arange(first, first + x.numel(), device=x.device)
    start = first // 8
    groups = torch.arange(start, (first + x.numel() + 7) // 8, device=x.device)
    words = philox(seed, groups, n, row)
    word = words[place // 8 - start, place % 8 // 2]
    bits16 = (word >> (16 * (place % 2))) & 0xFFFF
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rounded = ((bits + bits16) & 0xFFFF0000).to(torch.uint32).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def update_(
    averages: list[Tensor],
    sources: list[Tensor],
    n_averaged: Tensor,
    counters: Tensor | None,
    rules: Tensor,
    table: Tensor,
    pairs: int,
    seed: int | None,
    skip_nonfinite: bool,
    short_segments: int = 0,
    found_inf: Tensor | None = None,
    steps: Tensor | None = None,
    every: int = 1,
    offset: int = 0,
) -> None:
    r"""Every average of one device moves towards its sources, in one launch.

    For each average :math:`j` with :math:`n_j` updates before this one and each segment of the
    table, with the weight :math:`w_j` of the average's rule at :math:`n_j`:

    .. math:: a \leftarrow a + w_j\,(b - a) \qquad n_j \leftarrow n_j + 1

    in float32 (float64 when either side is float64), rounded once; copied where :math:`w_j = 1` or
    the segment is marked so. The choices that depend on counters and values are made on the device:
    it is never waited for.

    Args:
        averages: for this backend alone: of average 0, then of average 1, and so on, the memory of
            each segment as one dimension; written. Other backends write to the table's addresses,
            whose memory the caller keeps.
        sources: for this backend alone: the memory of each segment's source as one dimension.
        n_averaged: int64 with k elements, :math:`n_j`; written, unless ``counters`` is None.
        counters: int64 [3], see :data:`swa_fast._layout.TICKET`; written. None counts nothing: the
            update leaves no trace but in the averages.
        rules: float64 [k, 8], see :data:`swa_fast._layout.KIND`; on the device for triton, else on
            the CPU.
        table: int64 [segments, 3 + k], see :mod:`swa_fast._layout`.
        pairs: bit :math:`4a + s` is set if a segment has the type codes :math:`a` and :math:`s`;
            what triton compiles for.
        seed: round bfloat16 averages stochastically with it; None rounds to nearest.
        skip_nonfinite: if an averaged source holds an infinity or NaN, write nothing but the count
            of skipped updates. Needs ``counters``.
        short_segments: how many segments at the end of the table are short enough for one warp to
            read at once; what cuda shares the work by. The result does not depend on it.
        found_inf: float32 with one element on the averages' device; where it is not 0 nothing
            happens, whatever the sources hold. Needs ``counters``.
        steps: int64 with one element on the averages' device, calls that ``found_inf`` did not
            skip; written. The update takes place when ``steps + offset`` is at least 0 and a
            multiple of ``every``. None: always. Needs ``counters``.
        every: at least 1.
        offset: any integer.
    """
    rows, segments = n_averaged.numel(), table.tolist()
    assert len(sources) == len(segments) and len(averages) == rows * len(segments)
    counts = n_averaged.view(-1)
    proceed = torch.ones((), dtype=torch.bool, device=n_averaged.device)
    if found_inf is not None:
        proceed = found_inf.view(()) == 0
    if steps is not None:
        step = steps.view(()) + offset
        steps += proceed
        proceed = proceed & (step >= 0) & (step % every == 0)
    due = proceed
    copied = [bool(segment[layout.PACKED] >> layout.COPIED & 1) for segment in segments]
    if skip_nonfinite:
        for source, always in zip(sources, copied, strict=True):
            if not always:
                proceed = proceed & source.isfinite().all()
    weights = [_weight(rule, n) for rule, n in zip(rules.tolist(), counts, strict=True)]
    for row, weight64 in enumerate(weights):
        own = averages[row * len(segments) : (row + 1) * len(segments)]
        for memory, source, segment, always in zip(own, sources, segments, copied, strict=True):
            dtype = memory.dtype
            if dtype == torch.uint8:
                memory.copy_(torch.where(proceed, source, memory))
                continue
            math = _math_dtype(memory, source)
            wide, old = source.to(math), memory.to(math)
            weight = torch.ones_like(weight64) if always else weight64
            new = torch.where(weight == 1, wide, _blend(old, wide, weight.to(math)))
            new = torch.where(weight == 0, old, new)
            random = seed is not None and dtype == torch.bfloat16 and math == torch.float32
            if random and not always:
                assert seed is not None
                place = segment[layout.PLACE]
                rounded = _round_stochastically(new, place, seed, counts[row], row)
                new = torch.where(weight == 0, memory, rounded)
            memory.copy_(torch.where(proceed, new.to(dtype), memory))
    if counters is not None:
        counts += proceed
        counters[layout.SKIPPED] += due & ~proceed


def swag_(
    averages: list[Tensor],
    sources: list[Tensor],
    n_averaged: Tensor,
    counters: Tensor,
    table: Tensor,
    pairs: int,
    columns: int,
    short_segments: int = 0,
    found_inf: Tensor | None = None,
    steps: Tensor | None = None,
    every: int = 1,
    offset: int = 0,
) -> None:
    r"""Mean, squared deviations and the last deviations of every source, in one launch.

    With :math:`n` updates before this one and the old mean :math:`\mu_n` (Welford)

    .. math::
        \mu \leftarrow \mu_n + \frac{x - \mu_n}{n + 1} \qquad
        M_2 \leftarrow M_2 + (x - \mu_n)(x - \mu) \qquad
        D_{n \bmod K} \leftarrow x - \mu \qquad n \leftarrow n + 1

    in float32 (float64 for float64 averages); :math:`\mu = x` and :math:`M_2 = 0` at :math:`n = 0`.

    Args:
        averages: as in :func:`update_`, of 2 + K rows or more: :math:`\mu`, :math:`M_2`,
            :math:`D_0` to :math:`D_{K-1}`; float32, or float64 where the source is; written.
        sources: as in :func:`update_`.
        n_averaged: int64 with one element, :math:`n`; written.
        counters: int64 [3]; written.
        table: as in :func:`update_`.
        pairs: as in :func:`update_`.
        columns: :math:`K`, at least 1.
        short_segments, found_inf, steps, every, offset: as in :func:`update_`.
    """
    proceed = torch.ones((), dtype=torch.bool, device=n_averaged.device)
    if found_inf is not None:
        proceed = found_inf.view(()) == 0
    if steps is not None:
        step = steps.view(()) + offset
        steps += proceed
        proceed = proceed & (step >= 0) & (step % every == 0)
    n = n_averaged.view(()).clone()
    weight = 1 / (n + 1).double()
    segments = len(sources)
    rows = [averages[row * segments : (row + 1) * segments] for row in range(2 + columns)]
    for at, source in enumerate(sources):
        mean, squares = rows[0][at], rows[1][at]
        x = source.to(mean.dtype)
        now = torch.where(n == 0, x, _blend(mean, x, weight.to(mean.dtype)))
        old, deviation = x - mean, x - now
        product = squares + old * deviation
        if mean.dtype != torch.float64:
            product = _fma(old, deviation, squares)
        grown = torch.where(n == 0, torch.zeros_like(x), product)
        for column in range(columns):
            memory = rows[2 + column][at]
            memory.copy_(torch.where(proceed & (n % columns == column), deviation, memory))
        squares.copy_(torch.where(proceed, grown, squares))
        mean.copy_(torch.where(proceed, now, mean))
    n_averaged += proceed


def swap_(
    averages: list[Tensor],
    sources: list[Tensor],
    table: Tensor,
    row: int,
    short_segments: int = 0,
) -> None:
    """The memory of the table's segments trades places between average ``row`` and the sources.

    Args:
        averages: as in :func:`update_`; written.
        sources: as in :func:`update_`; written.
        table: as in :func:`update_`; both sides of a segment have one type.
        row: which average.
        short_segments: as in :func:`update_`.
    """
    own = averages[row * len(sources) : (row + 1) * len(sources)]
    for memory, source in zip(own, sources, strict=True):
        kept = memory.clone()
        memory.copy_(source)
        source.copy_(kept)


def combine_(
    outputs: list[Tensor],
    sources: list[Tensor],
    coefficients: Tensor,
    double_precision: bool = False,
) -> None:
    r"""K weighted sums of r rows in one pass over them:

    .. math:: y_k = \sum_{j=1}^{r} c_{kj}\, x_j

    in float32, or in float64 with ``double_precision`` or when a row is float64: one product, then
    fused multiply-adds in the order of the sources, rounded once to the output's dtype.

    Args:
        outputs: :math:`y_k`, contiguous, all of one number of elements; overwritten.
        sources: :math:`x_j`, contiguous, of the same number of elements; none shares memory with
            an output.
        coefficients: :math:`c`, float64 [K, r], contiguous, on the CPU.
        double_precision: sum in float64 whatever the dtypes.
    """
    rows = [*outputs, *sources]
    wide = double_precision or any(row.dtype == torch.float64 for row in rows)
    for output, row in zip(outputs, coefficients.tolist(), strict=True):
        total = torch.zeros(())
        for j, (source, c) in enumerate(zip(sources, row, strict=True)):
            x = source.reshape(-1)
            if wide:
                total = x.double() * c if j == 0 else torch.add(total, x.double(), alpha=c)
            else:
                factor = torch.tensor(c, dtype=torch.float32, device=x.device)
                total = x.float() * factor if j == 0 else _fma(factor, x.float(), total)
        output.view(-1).copy_(total)


def batch_norm_collect(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
    normalise: bool,
    batch: Tensor,
    tickets: Tensor | None,
) -> Tensor:
    r"""BatchNorm in training mode with its batch's statistics. For each channel of :math:`m`
    values:

    .. math::
        \mu = \frac1m \sum x \qquad M_2 = \sum (x - \mu)^2 \qquad
        y = \frac{x - \mu}{\sqrt{M_2 / m + \epsilon}}\,\gamma + \beta

    and with ``relu`` :math:`\max(y, 0)`; all in float64, :math:`y` rounded once.

    Args:
        x: [N, C, ...] of any floating dtype and strides.
        weight: :math:`\gamma`, [C], or None for 1.
        bias: :math:`\beta`, [C], or None for 0.
        eps: :math:`\epsilon`.
        relu: whether to clamp :math:`y` at 0.
        normalise: False returns an empty tensor instead of :math:`y`.
        batch: float64 [4, C]; overwritten with the rows :math:`m`, N, :math:`\mu`, :math:`M_2`.
        tickets: of other backends; not used.

    Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", ICML 2015.
    """
    shape = [1, -1] + [1] * (x.dim() - 2)
    others = [d for d in range(x.dim()) if d != 1]
    m = x.numel() // x.shape[1]
    deviation = x.double()
    mean = deviation.mean(others)
    deviation = deviation - mean.view(shape)
    m2 = deviation.square().sum(others)
    batch[0] = m
    batch[1] = x.shape[0]
    batch[2] = mean
    batch[3] = m2
    if not normalise:
        return x.new_empty(0)
    scale = (m2 / m + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    y = deviation * scale.view(shape)
    if bias is not None:
        y = y + bias.double().view(shape)
    if relu:
        y = y.relu()
    return torch.empty_like(x).copy_(y)


def batch_norm_merge_(accumulators: Tensor, batch: Tensor, estimator: int) -> None:
    """Merges one batch's statistics, see :func:`swa_fast._ops.batch_norm_merge_`.

    Which channels the batch used is decided on the device: the function never waits for it.
    """
    m, b, mu, m2 = batch.unbind()
    total, n, k, mean, spread, mean_mean, mean_m2, var_mean, var_m2 = accumulators.unbind()
    used = m > 0
    uses = k + 1
    variance = m2 / (m - 1).clamp(min=1)
    delta = mu - mean
    if estimator == layout.POOLED:
        share = m / (total + m)
        spread = spread + (m2 + delta * delta * total * share)
    else:
        share = 1 / uses if estimator == layout.TORCH else b / (n + b)
        spread = spread + share * (variance - spread)
    moved = [total + m, n + b, uses, mean + share * delta, spread]
    for value, average, m2_of_average in ((mu, mean_mean, mean_m2), (variance, var_mean, var_m2)):
        delta = value - average
        average = average + delta / uses
        moved += [average, m2_of_average + delta * (value - average)]
    accumulators.copy_(torch.where(used, torch.stack(moved), accumulators))
    batch[0].zero_()
