"""The options of a BatchNorm pass: what they take from the model, and devices and groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from swa_fast.batch_norm.options import Options, device_of, process_group


def test_memory_format_is_the_models_unless_it_is_given() -> None:
    flat, images = nn.Linear(2, 2), nn.Sequential(nn.Conv2d(2, 2, 1))
    assert Options().completed_for(flat).channels_last is False
    assert Options().completed_for(images).channels_last is True
    assert Options(channels_last=False).completed_for(images).channels_last is False
    assert Options(channels_last=True).completed_for(flat).channels_last is True


def data_parallel(module: nn.Module) -> nn.Module:
    """A wrapper whose constructor has not looked for GPUs."""
    wrapper = nn.DataParallel.__new__(nn.DataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = module
    return wrapper


def test_batches_go_where_the_data_parallel_wrapper_would_move_them() -> None:
    elsewhere = data_parallel(nn.Linear(2, 2, device="meta"))
    assert Options().completed_for(elsewhere).device == torch.device("meta")
    cpu = torch.device("cpu")
    assert Options(device=cpu).completed_for(elsewhere).device == cpu
    # fvcore hands batches over as they come.
    assert Options(whole_batch=True).completed_for(elsewhere).device is None
    assert Options().completed_for(data_parallel(nn.Linear(2, 2))).device is None
    assert Options().completed_for(nn.Linear(2, 2, device="meta")).device is None
    assert Options().completed_for(data_parallel(nn.ReLU())).device is None


def test_completing_keeps_every_other_option() -> None:
    options = Options(estimator="pooled", unbiased=False, max_batches=3, tolerance=0.1)
    completed = options.completed_for(nn.Linear(2, 2))
    assert completed.channels_last is False
    assert completed == Options(
        estimator="pooled", unbiased=False, max_batches=3, tolerance=0.1, channels_last=False
    )


def test_devices_and_groups_as_users_write_them() -> None:
    assert device_of(None) is None
    assert device_of("meta") == torch.device("meta")
    assert process_group(None) is None and process_group(False) is None
    with pytest.raises(ValueError, match="group: expected an initialised"):
        process_group(True)


@pytest.mark.gpu
def test_a_device_is_known_with_its_index() -> None:
    assert device_of("cuda") == device_of(0) == torch.device("cuda", 0)
