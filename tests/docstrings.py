"""The code in a module's docstring."""

from __future__ import annotations

import re
import textwrap
from types import ModuleType

__all__ = ["code_of"]


def code_of(module: ModuleType) -> list[str]:
    """Each block of code, after a paragraph that ends with ``::``, without its indentation."""
    found = re.findall(r"::\n\n((?:^ {4}.*\n|^\n)+)", module.__doc__ or "", flags=re.M)
    return [textwrap.dedent(block) for block in found]
