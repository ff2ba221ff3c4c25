"""Curves for TensorBoard."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_runs import assert_every_epoch_once

pytestmark = pytest.mark.usefixtures("small")


def test_tensorboard_holds_every_epoch_once(finished: Path) -> None:
    assert_every_epoch_once(finished)
