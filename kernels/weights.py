"""What the Triton kernels ask the counters of a device: how much a source weighs, and whether an
update takes place. Rules: csrc/update.h."""

import os

import triton
import triton.language as tl

from swa_fast import _layout as layout

__all__ = ["INTERPRETED", "LANES", "gate", "load_scalar", "weight_of"]

LANES = tl.constexpr(128)  # threads of a program: what is loaded by LANES is loaded once
# Triton's interpreter reduces tuples lane by lane, in Python: a hundred times slower than sums.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
WARP = tl.constexpr(32)  # what is loaded by WARP every warp has a copy of, without a barrier

DECAY, MIN_DECAY = tl.constexpr(layout.DECAY), tl.constexpr(layout.MIN_DECAY)
GAMMA, POWER = tl.constexpr(layout.GAMMA), tl.constexpr(layout.POWER)
UPDATE_AFTER_STEP = tl.constexpr(layout.UPDATE_AFTER_STEP)
CONSTANT = tl.constexpr(layout.CONSTANT)
SWA, INVERSE_GAMMA = tl.constexpr(layout.SWA), tl.constexpr(layout.INVERSE_GAMMA)
RATIO, EXTERNAL = tl.constexpr(layout.RATIO), tl.constexpr(layout.EXTERNAL)
POWER_LAW, DEBIASED = tl.constexpr(layout.POWER_LAW), tl.constexpr(layout.DEBIASED)
EXPONENTIAL = tl.constexpr(layout.EXPONENTIAL)
RING, FILLED = tl.constexpr(layout.RING), tl.constexpr(layout.FILLED)


@triton.jit
def load_scalar(pointer):
    lane = tl.arange(0, WARP)
    return tl.sum(tl.load(pointer + lane, mask=lane == 0, other=0))


@triton.jit
def _add5(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def _expm1(x):
    """exp(x) - 1 in fp64 for x < 0 without the error of the difference (Kahan)."""
    power = tl.exp(x)
    result = power - 1.0
    # Where the difference is exact anyway the quotient would be one by an infinity or by zero.
    if (power > 0.5) & (power < 1.0):
        result *= x / tl.log(power)
    elif power == 1.0:
        result = x
    return result


@triton.jit
def weight_of(rule_ptr, n):
    """The source's weight in fp64, see WeightRule in csrc/update.h."""
    kind = load_scalar(rule_ptr)
    one = tl.full([], 1.0, tl.float64)
    count = n.to(tl.float64)
    weight = one / (count + 1.0)
    if kind == EXTERNAL:
        weight = tl.where(n == 0, one, 0.0 * one)
    elif kind > SWA:
        column = tl.arange(0, LANES)
        rule = tl.load(
            rule_ptr + column, mask=(column >= DECAY) & (column <= UPDATE_AFTER_STEP), other=0.0
        )
        zero = tl.zeros_like(rule)
        decay = tl.where(column == DECAY, rule, zero)
        min_decay = tl.where(column == MIN_DECAY, rule, zero)
        gamma = tl.where(column == GAMMA, rule, zero)
        power = tl.where(column == POWER, rule, zero)
        after = tl.where(column == UPDATE_AFTER_STEP, rule, zero)
        if INTERPRETED:
            decay, min_decay, gamma = tl.sum(decay), tl.sum(min_decay), tl.sum(gamma)
            power, after = tl.sum(power), tl.sum(after)
        else:
            decay, min_decay, gamma, power, after = tl.reduce(
                (decay, min_decay, gamma, power, after), 0, _add5
            )
        s = count - after
        if kind == RING:
            # Exact for counts below 2^48; a division of integers takes more registers.
            rest = count - gamma * tl.floor(count / gamma)
            weight = tl.where(rest == power, one, 0.0 * one)
        elif kind == FILLED:
            weight = tl.where(count > power, one / (power + 1.0), 0.0 * one)
        elif s <= 0.0:
            weight = one
        elif kind == CONSTANT:
            weight = 1.0 - decay
        else:
            d = (1.0 + s) / (10.0 + s)
            if kind != RATIO:
                x = power * (s + 1.0)
                if kind == EXPONENTIAL:
                    x = -s / gamma
                elif kind != DEBIASED:
                    # (1 + s / gamma)^-power or (1 + 1 / s)^-power, of which the logarithm's
                    # argument loses what it rounds off.
                    y = 1.0 / s
                    if kind == INVERSE_GAMMA:
                        y = s / gamma
                    u = 1.0 + y
                    x = -power * (tl.log(u) + (y - (u - 1.0)) / u)
                d = -_expm1(x)
            if kind == POWER_LAW:
                weight = d
            elif kind == DEBIASED:
                weight = (1.0 - decay) / d
            else:
                if kind == EXPONENTIAL:
                    d *= decay
                weight = 1.0 - tl.maximum(tl.minimum(d, decay), min_decay)
    return weight


@triton.jit
def gate(found_inf_ptr, steps_ptr, every, offset):
    """1 or 0 each: what the optimiser's step counts for, and whether an update is due after it."""
    counted, due = tl.full([], 1, tl.int64), tl.full([], 1, tl.int64)
    if found_inf_ptr is not None:
        counted = (load_scalar(found_inf_ptr) == 0.0).to(tl.int64)
    if steps_ptr is not None:
        step = load_scalar(steps_ptr) + offset
        due = ((step >= 0) & (step % every == 0)).to(tl.int64)
    return counted, due * counted
