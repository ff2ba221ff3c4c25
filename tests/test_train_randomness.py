"""Seeds."""

from __future__ import annotations

import pytest

from swa_fast.train.randomness import derive_seed

pytestmark = pytest.mark.usefixtures("small")


def test_seeds_of_purposes_and_epochs_differ() -> None:
    seeds = {
        derive_seed(seed, purpose, epoch)
        for seed in (0, 1, 10)
        for purpose in ("init", "train", "augment", "bn")
        for epoch in range(20)
    }
    assert len(seeds) == 3 * 4 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)
