"""The error of everything that reads, averages and writes checkpoints."""

from __future__ import annotations

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint, or what was asked of it, that cannot be right; the message says what was found
    and what was expected. Nothing was written, and inputs are never changed."""
