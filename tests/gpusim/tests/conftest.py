from pathlib import Path

import gpusim
import pytest
import torch
from gpusim.build import cache_dir, digest
from torch.utils.cpp_extension import load

EXT = Path(__file__).resolve().parent / "ext"

if not gpusim.active():
    raise pytest.UsageError(
        "the simulator's tests run under it: python tests/gpusim run python -m pytest "
        "tests/gpusim/tests"
    )


@pytest.fixture(autouse=True)
def _poisoned():
    """Not here: these tests count fills, and some read memory that nobody wrote."""


@pytest.fixture(autouse=True)
def _no_faults():
    gpusim.take_faults()
    gpusim.reset()
    yield
    left = gpusim.take_faults()
    assert not left, "\n".join(left)


@pytest.fixture(scope="session")
def extension():
    """A small extension, loaded; its library."""
    out = cache_dir() / ("test-ext-" + digest(sorted(EXT.iterdir()), torch.__version__))
    out.mkdir(exist_ok=True)
    load(
        "gpusim_test",
        [str(EXT / "kernels.cu"), str(EXT / "ops.cpp")],
        extra_include_paths=[str(EXT)],
        is_python_module=False,
        extra_cuda_cflags=["-O3"],
        build_directory=str(out),
    )
    return out / "gpusim_test.so"


@pytest.fixture(scope="session")
def ops(extension):
    return torch.ops.gpusim_test
