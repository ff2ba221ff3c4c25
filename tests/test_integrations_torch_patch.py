"""Code that averages by torch.optim.swa_utils, run on swa_fast."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from docstrings import code_of
from torch import nn
from torch.optim import swa_utils

import swa_fast
from swa_fast.integrations import torch_patch

TORCH = {name: getattr(swa_utils, name) for name in torch_patch._NAMES}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that has bound torch's names at its import, one of them under another name."""
    module = ModuleType("library_that_averages")
    exec(
        "from torch.optim.swa_utils import AveragedModel as Average, get_ema_avg_fn, update_bn\n"
        "from swa_fast import SWALR as chosen",
        module.__dict__,
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_every_name_of_torch_is_replaced_everywhere_and_comes_back(library: ModuleType) -> None:
    assert set(torch_patch._NAMES) == set(swa_utils.__all__)
    patch = swa_fast.patch_torch()
    try:
        assert issubclass(library.Average, swa_fast.AveragedModel)
        assert library.Average is swa_utils.AveragedModel
        assert library.update_bn is swa_utils.update_bn
        assert "library_that_averages.Average" in patch.replaced
        for name, theirs in TORCH.items():
            assert getattr(swa_utils, name) is not theirs, name
            parameters = list(inspect.signature(getattr(swa_utils, name)).parameters)
            expected = list(inspect.signature(theirs).parameters)
            assert parameters[: len(expected)] == expected
        model = nn.Linear(2, 2)
        average = library.Average(model, avg_fn=library.get_ema_avg_fn(0.9))
        average.update_parameters(model)
        assert average._storage is not None  # the fast path
        copy.deepcopy(average)
        again = pickle.loads(pickle.dumps(average))
        assert type(again) is type(average)
        assert patch.used == {"AveragedModel": 1, "get_ema_avg_fn": 1}
        # A module that is loaded meanwhile has ours, too.
        late = ModuleType("late_library")
        sys.modules["late_library"] = late
        exec("from torch.optim.swa_utils import AveragedModel", late.__dict__)
    finally:
        patch.undo()
        sys.modules.pop("late_library", None)
    for name, theirs in TORCH.items():
        assert getattr(swa_utils, name) is theirs, name
    assert library.Average is TORCH["AveragedModel"]
    # What a user took from swa_fast was none of torch's, before and after.
    assert library.chosen is swa_fast.SWALR
    patch.undo()
    # What was made meanwhile still works, and its pickles are found.
    average.update_parameters(model)
    assert type(pickle.loads(pickle.dumps(average))) is torch_patch.AveragedModel


def test_late_modules_get_torchs_own_back() -> None:
    with swa_fast.patch_torch():
        late = ModuleType("late_library")
        sys.modules["late_library"] = late
        exec("from torch.optim.swa_utils import AveragedModel", late.__dict__)
        assert late.AveragedModel is not TORCH["AveragedModel"]
    del sys.modules["late_library"]
    assert late.AveragedModel is TORCH["AveragedModel"]


def test_patches_nest_and_end_with_the_last() -> None:
    first = swa_fast.patch_torch()
    second = swa_fast.patch_torch()
    assert second.replaced == []
    first.undo()
    assert swa_utils.AveragedModel is not TORCH["AveragedModel"]
    second.undo()
    assert swa_utils.AveragedModel is TORCH["AveragedModel"]


def test_it_is_undone_by_an_error_and_names_what_it_could_not_reach() -> None:
    class Derived(swa_utils.AveragedModel):
        pass

    with pytest.raises(KeyError), swa_fast.patch_torch() as patch:
        raise KeyError
    assert swa_utils.AveragedModel is TORCH["AveragedModel"]
    assert any(name.endswith("Derived") for name in patch.unreachable)
    assert "Derived" in patch.report() and "used: nothing" in patch.report()


def test_modules_that_are_lazy_or_hostile_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was asked for")

    class Odd:
        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared")

        __hash__ = None  # type: ignore[assignment]

    lazy = Lazy("lazy")
    lazy.__dict__["odd"] = Odd()
    monkeypatch.setitem(sys.modules, "lazy", lazy)
    monkeypatch.setitem(sys.modules, "none", None)  # type: ignore[arg-type]
    swa_fast.patch_torch().undo()


def test_lightnings_own_callback_averages_by_it(tmp_path: Path) -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    with swa_fast.patch_torch() as patch:
        assert callbacks.AveragedModel is torch_patch.AveragedModel
        assert "lightning.pytorch.callbacks.weight_averaging.AveragedModel" in patch.replaced
    assert callbacks.AveragedModel is TORCH["AveragedModel"]


def run(*arguments: str, cwd: Path, report: str = "1") -> subprocess.CompletedProcess[str]:
    root = str(Path(swa_fast.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "swa_fast.patch", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": root, "SWA_FAST_PATCH_REPORT": report},
    )


SCRIPT = """
import sys
import beside
from torch import nn
from torch.optim.swa_utils import AveragedModel

average = AveragedModel(nn.Linear(2, 2))
assert __name__ == "__main__"
print(sys.argv[1:], sys.argv[0], AveragedModel.__mro__[1].__module__, beside.X)
if "fail" in sys.argv:
    sys.exit(3)
"""


def test_the_command_runs_a_script_as_python_does(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/train.py").write_text(SCRIPT)
    (tmp_path / "folder/beside.py").write_text("X = 7")
    result = run("folder/train.py", "--a", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "['--a', '1'] folder/train.py swa_fast.averaged_model 7\n"
    assert "used: AveragedModel 1" in result.stderr
    assert "torch.optim.swa_utils.AveragedModel" in result.stderr
    result = run("-m", "train", "fail", cwd=tmp_path / "folder", report="0")
    assert result.returncode == 3 and result.stderr == ""
    assert "swa_fast.averaged_model 7" in result.stdout


@pytest.mark.parametrize(
    "arguments", [[], ["-m"], ["missing.py"], ["-m", "missing_module"], ["-m", "a.b.c"]], ids=str
)
def test_without_a_script_there_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from swa_fast.patch import main

    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert ("expected a" in output.err and "found" in output.err) or "usage" in output.err
    assert swa_utils.AveragedModel is TORCH["AveragedModel"]


def test_the_example_of_the_docstring_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = code_of(torch_patch)
    code = code.replace("import lightning", "import torch")
    made = []
    exec(code, {"train": lambda: made.append(swa_utils.AveragedModel(nn.Linear(1, 1)))})
    assert isinstance(made[0], swa_fast.AveragedModel)
    assert "used: AveragedModel 1" in capsys.readouterr().out
    torch.manual_seed(0)
