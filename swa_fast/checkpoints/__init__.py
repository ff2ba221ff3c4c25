"""Averages of checkpoints on disk: safetensors, files of torch.save, Hugging Face folders, and
folders of torch.distributed.checkpoint, a chunk at a time."""

from .averaging import AverageReport, average
from .entries import Checkpoint
from .errors import CheckpointError
from .formats import reader
from .soup import SoupReport, greedy
from .weights import expand, merge_weights, select

__all__ = [
    "AverageReport",
    "Checkpoint",
    "CheckpointError",
    "SoupReport",
    "average",
    "expand",
    "greedy",
    "merge_weights",
    "reader",
    "select",
]
