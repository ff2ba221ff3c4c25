"""Every operator in plain PyTorch: the specification, the fallback and the test oracle.

Works on any device, for any strides, and in fp64. Nothing here imports the rest of the package.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["average_", "exchange_", "philox", "update_"]


def _math_dtype(average: Tensor, source: Tensor) -> torch.dtype:
    """Arithmetic type of a pair: float64 as soon as one side is float64, else float32."""
    if torch.float64 in (average.dtype, source.dtype):
        return torch.float64
    return torch.float32


def average_(
    averages: list[Tensor], sources: list[Tensor], n_averaged: Tensor, decay: float | None
) -> None:
    r"""Running average of many tensors, in place.

    .. math::
        a \leftarrow \begin{cases} b & n = 0 \\ a + w\,(b - a) & n > 0 \end{cases}
        \qquad w = \begin{cases} 1/(n+1) & \text{decay is None (SWA)} \\
                                 1 - \text{decay} & \text{otherwise (EMA)} \end{cases}

    in float64 when either tensor of a pair is float64, else in float32, rounded once at the end.
    The choice between the two cases is made on the device: the function never waits for it.

    Args:
        averages: tensors :math:`a`, written.
        sources: tensors :math:`b`, one for each average, of its shape and on its device.
        n_averaged: one int64, :math:`n`; not changed.
        decay: None for equal weights, else the decay of the exponential average.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
    UAI 2018 (equal weights).
    """
    for average, source in zip(averages, sources, strict=True):
        math = _math_dtype(average, source)
        n = n_averaged.to(average.device)
        one = torch.ones((), dtype=math, device=average.device)
        weight = one / (n + 1).to(math) if decay is None else one * (1.0 - decay)
        wide = source.to(math)
        updated = torch.lerp(average.to(math), wide, weight)
        average.copy_(torch.where(n == 0, wide, updated))


# Type codes of the table's runs and kinds of the rules, as in csrc/update.h.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8)
_SWA, _CONSTANT, _INVERSE_GAMMA, _RATIO, _EXTERNAL = range(5)


def _weight(rule: list[float], n: Tensor) -> Tensor:
    """The source's weight as a float64 scalar on the counter's device."""
    kind, decay, min_decay, gamma, power, update_after_step = rule[:6]
    one = torch.ones((), dtype=torch.float64, device=n.device)
    if kind == _SWA:
        return one / (n + 1)
    if kind == _EXTERNAL:
        return torch.where(n == 0, one, 0 * one)
    s = n - update_after_step
    if kind == _CONSTANT:
        settled = one * (1.0 - decay)
    else:
        positive = s.clamp(min=1).to(torch.float64)
        if kind == _INVERSE_GAMMA:
            d = 1.0 - (1.0 + positive / gamma) ** -power
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


def _memory(averages: list[Tensor], row: int, run: list[int], count: int) -> Tensor:
    """What a run of ``count`` elements covers in average ``row``."""
    _, offset, _, packed = run
    dtype = _DTYPES[(packed >> 32) & 0xFF]
    memory = averages[packed >> 49][row].view(torch.uint8)
    return memory[offset : offset + count * dtype.itemsize].view(dtype)


def update_(
    averages: list[Tensor],
    state: Tensor,
    rules: Tensor,
    table: Tensor,
    sources: list[Tensor],
    pairs: int,
    seed: int | None,
    guard: bool,
) -> None:
    r"""Every average of one device moves towards its sources, see :func:`swa_fast._ops.update_`.

    Each run of the table is read from ``sources`` instead of from an address, and its place in an
    average is counted in bytes from the start of the row. The choices that depend on counters and
    values are made on the device: the function never waits for it.
    """
    rows = averages[0].shape[0]
    runs = list(zip(table.tolist(), sources, strict=True))
    proceed = torch.ones((), dtype=torch.bool, device=state.device)
    if guard:
        for run, source in runs:
            if not run[3] >> 48 & 1:
                proceed = proceed & source.isfinite().all()
    weights = [_weight(rule, n) for rule, n in zip(rules.tolist(), state, strict=False)]
    for run, source in runs:
        copied = bool(run[3] >> 48 & 1)
        for row in range(rows):
            memory = _memory(averages, row, run, source.numel())
            dtype = memory.dtype
            if dtype == torch.uint8:
                memory.copy_(torch.where(proceed, source, memory))
                continue
            math = _math_dtype(memory, source)
            wide, old = source.to(math), memory.to(math)
            weight = torch.ones_like(weights[row]) if copied else weights[row]
            new = torch.where(weight == 1, wide, _blend(old, wide, weight.to(math)))
            new = torch.where(weight == 0, old, new)
            random = seed is not None and dtype == torch.bfloat16 and math == torch.float32
            if random and not copied:
                assert seed is not None
                place = run[1] // dtype.itemsize
                rounded = _round_stochastically(new, place, seed, state[row], row)
                new = torch.where(weight == 0, memory, rounded)
            memory.copy_(torch.where(proceed, new.to(dtype), memory))
    state[:rows] += proceed
    state[-1] += ~proceed


def exchange_(averages: list[Tensor], sources: list[Tensor], table: Tensor, row: int) -> None:
    """Exchanges the runs of the table between average ``row`` and ``sources``, in place."""
    for run, source in zip(table.tolist(), sources, strict=True):
        memory = _memory(averages, row, run, source.numel())
        kept = memory.clone()
        memory.copy_(source)
        source.copy_(kept)
