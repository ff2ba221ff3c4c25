"""What the machine code of a GPU kernel shows of its speed: loads in flight, barriers, spills.

Reads what ``cuobjdump -sass`` prints. A multiprocessor issues the instructions of a warp in order
and stops at the first one that needs a register whose load is still on its way, so the loads that
were issued before it are what the warp has in flight. Code is read from top to bottom: a
conditional branch counts as not taken, and behind an unconditional one nothing is in flight. So
alternatives that lie behind one another are not added up, and a loop is seen as one turn of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

__all__ = ["Code", "Loads", "read"]

# One instruction: an optional condition, the operation, its operands.
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_REGISTER = re.compile(r"\bR(\d+)\b")
# Where code ends or goes on elsewhere, unless it has a condition, which may be an operand.
_LEAVES = ("BRA", "EXIT", "RET", "BRX", "JMP")


@dataclasses.dataclass(frozen=True)
class Loads:
    """The most global loads of a thread that are issued before the first of them is needed."""

    wide: int = 0  # of 128 bits and more
    narrow: int = 0  # of fewer
    strong: int = 0  # of what other blocks wrote, past the first-level cache


@dataclasses.dataclass(frozen=True)
class Code:
    loads: Loads
    wide_stores: int  # instructions
    local: int  # instructions that read or write local memory: spills
    barriers: int  # instructions that wait for the block's other threads


def _instructions(text: str) -> Iterator[tuple[str | None, str, list[str]]]:
    for condition, operation, operands in _INSTRUCTION.findall(text):
        yield condition or None, operation, [part.strip() for part in operands.split(",")]


def _bits(operation: str) -> int:
    """Of what a load or store moves for a thread."""
    found = re.search(r"\.(?:[US])?(8|16|32|64|128|256)\b", operation)
    return int(found[1]) if found else 32


def _kind(operation: str) -> str:
    if ".STRONG" in operation:
        return "strong"
    return "wide" if _bits(operation) >= 128 else "narrow"


def _loads(text: str) -> Loads:
    most = dict.fromkeys(("wide", "narrow", "strong"), 0)
    flying = dict.fromkeys(most, 0)
    awaited: set[int] = set()

    def arrive() -> None:
        for kind, count in flying.items():
            most[kind] = max(most[kind], count)
            flying[kind] = 0
        awaited.clear()

    for condition, operation, operands in _instructions(text):
        used = {int(number) for part in operands for number in _REGISTER.findall(part)}
        is_load = operation.startswith("LDG")
        if is_load:
            first = int(_REGISTER.findall(operands[0])[0]) if _REGISTER.search(operands[0]) else -1
            written = set(range(first, first + max(1, _bits(operation) // 32)))
            used |= written
        if used & awaited:
            arrive()
        if is_load and first >= 0:
            awaited |= written
            flying[_kind(operation)] += 1
        elif condition is None and len(operands) == 1 and operation.startswith(_LEAVES):
            arrive()
    arrive()
    return Loads(**most)


def read(text: str) -> Code:
    """
    Args:
        text: of one kernel, as cuobjdump prints it.
    """
    operations = [operation for _, operation, _ in _instructions(text)]
    return Code(
        _loads(text),
        sum(o.startswith("STG") and _bits(o) >= 128 for o in operations),
        sum(o.split(".")[0] in ("LDL", "STL") for o in operations),
        sum(o.startswith("BAR.SYNC") or o.startswith("BAR.RED") for o in operations),
    )
