"""The package as installed: import, report, backends that are missing, the build script."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import run_processes

import swa_fast
import swa_fast.__main__ as swa_fast_main
from swa_fast import _backends
from swa_fast.__main__ import main

CHECKOUT = Path(__file__).resolve().parent.parent


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_same_names_as_torch() -> None:
    import inspect

    from torch.optim import swa_utils

    assert set(swa_utils.__all__) <= set(swa_fast.__all__)
    for name in swa_utils.__all__:
        theirs = list(inspect.signature(getattr(swa_utils, name)).parameters.values())
        ours = list(inspect.signature(getattr(swa_fast, name)).parameters.values())
        assert [p.name for p in ours][: len(theirs)] == [p.name for p in theirs]
        assert [p.default for p in ours][: len(theirs)] == [p.default for p in theirs]
        assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_kernels_exist_once() -> None:
    result = python(
        "import sys, swa_fast.kernels; print('kernels' in sys.modules, swa_fast.kernels.__name__)"
    )
    assert result.stdout == "False swa_fast.kernels\n", result.stderr


def test_import_loads_nothing_heavy() -> None:
    heavy = {
        "swa_fast._C", "swa_fast._C_cuda", "sklearn", "matplotlib", "PIL", "triton",
        "torch._dynamo",
    }  # fmt: skip
    result = python(
        "import sys, torch; before = set(sys.modules); import swa_fast; "
        f"print(sorted({heavy} & (set(sys.modules) - before)))"
    )
    assert result.stdout == "[]\n", result.stderr


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["swa_fast"] == swa_fast.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["build"] == _backends.build_info()
    assert set(facts["backends"]) == set(_backends.BACKENDS)
    for state in facts["backends"].values():
        assert state["usable"] == (state["reason"] is None) == (state["self_check"] is not None)
        assert state["self_check"] in (None, "passed")
    assert facts["backends"]["reference"]["usable"]
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "reference    usable on cpu, self-check passed" in text


def nobody_reads(rank: int) -> None:
    """Commands whose standard output is a pipe that nobody reads any more, with every line written
    at once and with all of them at the end, when Python would complain."""
    from swa_fast.train import cli

    def run(command: Callable[[list[str]], int], arguments: list[str], at_once: bool) -> int:
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
        os.close(writing)
        sys.stdout = os.fdopen(1, "w", buffering=1 if at_once else -1, closefd=False)
        try:
            return command(arguments)
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            sys.stdout.flush()

    def elsewhere(**options: Any) -> int:
        raise BrokenPipeError

    def line(**options: Any) -> int:
        print("a line")
        return 0

    cli.commands.presets = line
    for at_once in (False, True):
        assert run(main, [], at_once) == 0
        assert run(main, ["--json"], at_once) == 0
        assert run(cli.main, ["--help"], at_once) == 0
        assert run(cli.main, ["presets"], at_once) == (141 if at_once else 0)
    cli.commands.presets = elsewhere
    with open(os.devnull, "w") as sys.stdout, pytest.raises(BrokenPipeError):
        cli.main(["presets"])


def test_commands_end_quietly_when_nobody_reads() -> None:
    run_processes(nobody_reads, (), 1)


@pytest.mark.parametrize(
    "replaced, message",
    [
        ("update_", "after 3 updates n_averaged is {'swa': 0}"),
        ("swap_", "the weight with the average applied came out 3.0 with an error"),
        ("batch_norm_collect", ""),
        ("batch_norm_merge_", ""),
    ],
)
def test_a_self_check_fails_for_every_operator_that_does_nothing(
    replaced: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from swa_fast import _ops

    packet = getattr(torch.ops.swa_fast, replaced)

    def nothing(*arguments: Any) -> Any:
        return torch.zeros_like(arguments[0]) if replaced == "batch_norm_collect" else None

    for backend in _backends.BACKENDS:
        monkeypatch.setattr(packet, backend, nothing)
        if replaced in ("update_", "swap_"):
            monkeypatch.setitem(getattr(_ops, f"_{replaced.strip('_')}s"), backend, nothing)
    assert main([]) == 1
    assert f"self-check failed: {message}" in capsys.readouterr().out


def test_why_unusable() -> None:
    assert _backends.why_unusable("reference", "mps") is None
    assert "serves CPU tensors" in str(_backends.why_unusable("cpu", "cuda"))
    assert "serves CUDA tensors" in str(_backends.why_unusable("cuda", "cpu"))
    with pytest.raises(ValueError, match="backend: expected one of"):
        _backends.why_unusable("fast", "cpu")
    assert _backends.choose_backend("mps") == "reference"


@pytest.mark.parametrize(
    ("capability", "arch_list", "code"),
    [
        ((8, 0), "8.0;9.0+PTX", "sm_80"),
        ((8, 9), "8.0;8.6;9.0+PTX", "sm_86"),
        ((8, 0), "8.6+PTX", None),
        ((7, 5), "8.0;9.0+PTX", None),
        ((9, 0), "9.0+PTX", "sm_90"),
        ((9, 0), "8.0+PTX", "compute_80"),
        ((10, 3), "9.0 10.0", "sm_100"),
        ((12, 0), "8.0+PTX;9.0+PTX", "compute_90"),
        ((12, 0), "9.0;10.0", None),
        ((9, 0), "9.0a", "sm_90a"),
        ((10, 0), "9.0a+PTX", None),
        ((10, 3), "10.0a", None),
        ((10, 3), "10.0f", "sm_100f"),
        ((10, 0), "", None),
    ],
)
def test_code_for_a_device(capability: tuple[int, int], arch_list: str, code: str | None) -> None:
    assert _backends.code_for(capability, arch_list) == code


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing remembered of what loads and who serves, before and after."""
    remembered = (
        _backends.build_info,
        _backends._load_library,
        _backends.cpu_library,
        _backends.cuda_code,
        _backends._triton_reason,
        _backends._log_choice,
    )
    for function in remembered:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in remembered:
        function.cache_clear()


@pytest.fixture
def devices(fresh: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, tuple[int, int]]]:
    """CUDA devices that exist by name and capability only, and a library for 8.0 and PTX of 9.0."""
    capabilities = {0: (8, 6), 1: (10, 0), 2: (7, 5)}
    library = ModuleType("swa_fast._C_cuda")
    library.arch_list = "8.0;9.0+PTX"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swa_fast._C_cuda", library)
    monkeypatch.setattr(_backends, "_load_library", functools.cache(lambda name: None))
    monkeypatch.setattr(_backends, "_triton_reason", functools.cache(lambda: None))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, function in {
        "is_available": lambda: True,
        "device_count": lambda: len(capabilities),
        "current_device": lambda: 2,
        "get_device_capability": lambda i=None: capabilities[2 if i is None else i],
        "get_device_name": lambda i=None: f"GPU {2 if i is None else i}",
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    yield capabilities


def test_a_device_without_code_is_served_by_triton(devices, caplog) -> None:
    caplog.set_level("INFO", "swa_fast")
    chosen = [_backends.choose_backend(torch.device("cuda", i)) for i in (0, 1, 2, 2)]
    assert chosen == ["cuda", "cuda", "triton", "triton"]
    assert _backends.choose_backend("cuda") == "triton"  # the current device
    reason = _backends.why_unusable("cuda", "cuda:2")
    assert reason is not None
    assert (
        "holds code for 8.0;9.0+PTX" in reason and "GPU 2) is of compute capability 7.5" in reason
    )
    assert 'TORCH_CUDA_ARCH_LIST="7.5"' in reason
    said = [r for r in caplog.records if "cuda:2" in r.getMessage()]
    assert [r.levelname for r in said] == ["WARNING"]
    assert "served by the triton backend, because cuda cannot" in said[0].getMessage()
    with pytest.raises(_backends.BackendError, match=r"compute capability 7\.5"):
        _backends.choose_backend(torch.device("cuda", 2), "cuda")


def test_report_says_which_code_each_device_runs(devices, monkeypatch, capsys) -> None:
    monkeypatch.setattr(swa_fast_main, "_self_check", lambda backend, device: "passed")
    assert main(["--json"]) == 0
    code = json.loads(capsys.readouterr().out)["code"]
    assert [code[f"cuda:{i}"]["kind"] for i in range(3)] == ["native", "ptx", "triton"]
    assert code["cpu"]["kind"] == "cpu"
    main([])
    text = capsys.readouterr().out
    assert "cuda:0       native code (sm_80)" in text
    assert "cuda:1       PTX (compute_90), compiled by the driver at first use, which takes" in text
    assert "cuda:2       Triton" in text and "compute capability 7.5" in text
    monkeypatch.setenv("SWA_FAST_BACKEND", "reference")
    main([])
    assert "cuda:0       plain PyTorch, as SWA_FAST_BACKEND asks" in capsys.readouterr().out
    monkeypatch.setenv("SWA_FAST_BACKEND", "cpu")
    main(["--json"])
    assert json.loads(capsys.readouterr().out)["code"]["cuda:0"]["kind"] == "none"


@pytest.mark.parametrize(
    ("torch_version", "torch_cuda", "built", "error", "expected"),
    [
        (
            "2.9.1+cu130",
            "13.0",
            {},
            "",
            r"needs torch 2.10 or newer .* 2.9.1.*--upgrade 'torch>=",
        ),
        (
            "2.14.1+cu128",
            "12.8",
            {"cuda": "13.0"},
            "",
            r"built for CUDA 13 and .* for CUDA 12.8: in",
        ),
        (
            "2.14.1+cu128",
            "12.8",
            {},
            "libcudart.so.13: cannot open shared object file: No such file or directory",
            r"built for CUDA 13 and .* for CUDA 12.8: install a torch for CUDA 13, or build .* 12 ",
        ),
        (
            "2.14.1+cu130",
            "13.0",
            {"cuda": "13.0"},
            "libcudart.so.13: cannot open shared object file: No such file or directory",
            r"CUDA runtime .* is not found; install it with `pip install nvidia-cuda-runtime`",
        ),
        (
            "2.12.0+cu130",
            "13.0",
            {"cuda": "13.0", "torch": "2.14.1"},
            "/x/_C_cuda.abi3.so: undefined symbol: torch_new_function",
            r"torch 2.12.0.cu130 has no torch_new_function .* with torch 2.14.1 .* reinstall",
        ),
    ],
    ids=["old torch", "other CUDA", "other CUDA, no facts", "no runtime", "symbol"],
)
def test_a_library_that_does_not_load_names_the_remedy(
    fresh, monkeypatch, caplog, torch_version, torch_cuda, built, error, expected
) -> None:
    real = importlib.import_module

    def import_module(name: str, *arguments: Any) -> Any:
        if name == "swa_fast._C_cuda":
            assert error, "it was loaded although that could not work"
            raise ImportError(error)
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_backends, "build_info", functools.cache(lambda: built))
    monkeypatch.setattr(_backends, "_triton_reason", functools.cache(lambda: None))
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    reason = _backends.why_unusable("cuda", "cuda")
    assert reason is not None and re.search(expected, reason)
    with pytest.raises(_backends.BackendError, match=expected):
        _backends.choose_backend("cuda", "cuda")
    assert [_backends.choose_backend("cuda") for _ in range(2)] == ["triton", "triton"]
    assert [r.levelname for r in caplog.records] == ["WARNING"]


def test_an_interpreter_that_does_not_work_says_so(fresh, monkeypatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr("numpy.__version__", "2.10.1")
    assert "Triton 3.6.0 does not work beside numpy 2.10.1" in str(
        _backends.why_unusable("triton", "cpu")
    )
    _backends._triton_reason.cache_clear()
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    assert "Triton 3.9.0 refuses a mask" in str(_backends.why_unusable("triton", "cpu"))


@pytest.mark.gpu
def test_the_library_says_for_which_devices_it_is() -> None:
    assert _backends.why_unusable("cuda", "cuda") is None
    code, reason = _backends.cuda_code(None)
    assert code is not None and re.fullmatch(r"(sm|compute)_\d+[af]?", code) and reason is None


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package's Python files alone, as in a checkout that was never built."""
    source = Path(swa_fast.__file__).parent
    for file in [*source.glob("*.py"), *source.glob("batch_norm/*.py")]:
        copy = tmp_path / "swa_fast" / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    return tmp_path


def use_copy(copied: Path, code: str) -> str:
    # -I keeps an editable install's finder from answering first.
    code = f"import sys; sys.path.insert(0, {str(copied)!r}); " + code
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


AVERAGE = """
import torch, swa_fast
from swa_fast import _backends
model = torch.nn.Linear(2, 2)
averaged = swa_fast.AveragedModel(model)
averaged.update_parameters(model)
print(torch.equal(averaged.module.weight, model.weight), _backends.choose_backend("cpu"))
try:
    swa_fast.AveragedModel(model, backend="cpu").update_parameters(model)
except _backends.BackendError as error:
    print(error)
"""


def test_without_libraries_the_reference_serves(copied: Path) -> None:
    out = use_copy(copied, f"exec({AVERAGE!r})")
    assert out.startswith("True reference\nbackend=cpu: this copy of swa_fast")
    assert "was never built" in out


def test_source_checkout_is_recognised(copied: Path) -> None:
    (copied / "setup.py").touch()
    assert "it is a source checkout: run `pip install -e .`" in use_copy(
        copied, f"exec({AVERAGE!r})"
    )


def test_skipped_library_says_why(copied: Path) -> None:
    facts = {"torch": "2.13.0", "skipped": {"_C": "SWA_FAST_NO_EXT=1 when it was built"}}
    (copied / "swa_fast" / "_build_info.json").write_text(json.dumps(facts))
    assert "it was not built: SWA_FAST_NO_EXT=1" in use_copy(copied, f"exec({AVERAGE!r})")


def test_library_that_does_not_load_says_why(copied: Path) -> None:
    (copied / "swa_fast" / "_build_info.json").write_text(json.dumps({"torch": "9.9"}))
    (copied / "swa_fast" / "_C.abi3.so").write_bytes(b"not a library")
    out = use_copy(copied, f"exec({AVERAGE!r})")
    assert "swa_fast._C does not load" in out and "built with torch 9.9" in out


# --- setup.py, where there is a checkout ---------------------------------------------------------


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (CHECKOUT / "setup.py").exists():
        pytest.skip("no checkout")
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    spec = importlib.util.spec_from_file_location("swa_fast_setup", CHECKOUT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    return module


def make_toolkit(root: Path, version: int = 13000) -> Path:
    (root / "bin").mkdir(parents=True)
    (root / "include").mkdir()
    (root / "bin" / "nvcc").touch(0o755)
    (root / "include" / "cuda_runtime.h").touch()
    (root / "include" / "cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n")
    return root


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_toolkit_from_cuda_home(setup_script, tmp_path, monkeypatch) -> None:
    root = make_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(root))
    assert setup_script.find_toolkit() == (root, "CUDA_HOME")
    assert setup_script.toolkit_version(root) == (13, 0)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found, reason = setup_script.find_toolkit()
    assert found is None and f"CUDA_HOME={tmp_path} holds no CUDA toolkit" in reason


def test_toolkit_behind_a_link_and_a_wrapper(setup_script, tmp_path, monkeypatch) -> None:
    root = make_toolkit(tmp_path / "cuda")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "nvcc").symlink_to(root / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "links"))
    assert setup_script.find_toolkit() == (root, "nvcc on PATH")
    executable(tmp_path / "wrapper" / "nvcc", f"#!/bin/sh\necho '#$ TOP={root}/bin/..' >&2\n")
    monkeypatch.setenv("PATH", str(tmp_path / "wrapper"))
    assert setup_script.find_toolkit() == (root, "nvcc on PATH")


def test_toolkit_from_pip(setup_script, tmp_path, monkeypatch) -> None:
    root = make_toolkit(tmp_path / "site" / "nvidia" / "cu13")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setattr(Path, "glob", _only_under(tmp_path))
    monkeypatch.setattr(setup_script, "is_toolkit", lambda p: tmp_path in p.parents and p.exists())
    assert setup_script.find_toolkit() == (root, "pip's cuda-toolkit")
    (root / "lib").mkdir()
    (root / "lib" / "libcudart.so.13").touch()
    assert setup_script.cudart_library(root).name == "libcudart.so.13"


def _only_under(folder: Path):
    real = Path.glob

    def glob(self: Path, pattern: str):
        return real(self, pattern) if folder in (self, *self.parents) else iter(())

    return glob


def test_gencode_flags(setup_script) -> None:
    assert setup_script.gencode_flags("8.0;9.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert setup_script.gencode_flags("9.0a 12.0") == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
    ]
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST: expected numbers .* 'Hopper'"):
        setup_script.gencode_flags("8.0;Hopper")
    with pytest.raises(SystemExit, match="at least one architecture"):
        setup_script.gencode_flags(";")


def test_the_oldest_torch_is_the_same_everywhere(setup_script) -> None:
    major, minor = _backends._OLDEST_TORCH
    assert int(setup_script.TORCH_TARGET_VERSION, 16) == (major << 56) + (minor << 48)
    for file in ("pyproject.toml", "Makefile", "README.md", "docs/install.md", "setup.py"):
        found = set(re.findall(r"torch>=([\d.]+)", (CHECKOUT / file).read_text()))
        assert found == {f"{major}.{minor}"}, file


def test_one_version_and_one_repository(setup_script) -> None:
    version = re.escape(swa_fast.__version__)
    for file, pattern in {
        "CITATION.cff": rf"^version: {version}$",
        "CHANGELOG.md": rf"^## \[{version}\]",
        "conda/recipe.yaml": rf'^  version: "{version}"$',
    }.items():
        if (CHECKOUT / file).exists():
            assert re.search(pattern, (CHECKOUT / file).read_text(), re.MULTILINE), file
    for file in ("pyproject.toml", "CITATION.cff", "docs/conf.py", "conda/recipe.yaml"):
        if (CHECKOUT / file).exists():
            found = set(
                re.findall(r"https://github.com/swa[\w-]*/\w+", (CHECKOUT / file).read_text())
            )
            assert found == {setup_script.REPOSITORY}, file


def test_the_index_gets_a_readme_whose_links_lead_somewhere(setup_script) -> None:
    text = setup_script.long_description()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 20 and all(link.startswith("https://") for link in links)
    assert f"({setup_script.REPOSITORY}/raw/main/bench/results/update.svg)" in text
    for link in links:
        path = re.sub(r".*/(?:raw|blob)/main/", "", link)
        assert not link.startswith(setup_script.REPOSITORY + "/") or (CHECKOUT / path).exists(), (
            link
        )


def test_an_old_setuptools_is_named(setup_script) -> None:
    setup_script.check_setuptools("77.0.3")
    with pytest.raises(SystemExit, match=r"setuptools 65\.5\.0 is too old: .* 'setuptools>=77'"):
        setup_script.check_setuptools("65.5.0")


def test_a_source_distribution_knows_its_commit(setup_script, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(setup_script, "ROOT", tmp_path)
    monkeypatch.setattr(setup_script, "COMMIT", tmp_path / "COMMIT")
    assert setup_script.commit() is None
    (tmp_path / "COMMIT").write_text("0123456789\n")
    assert setup_script.commit() == "0123456789"


def test_the_carried_wheel_serves_every_device_since_turing(setup_script) -> None:
    carried = setup_script.DEFAULT_ARCH_LIST
    capabilities = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]
    for capability in capabilities:
        code = _backends.code_for(capability, carried)
        assert code is not None and code.startswith("sm_"), capability
    assert _backends.code_for((11, 0), carried) == "compute_90"
    assert _backends.code_for((13, 0), carried) == "compute_120"
    assert _backends.code_for((7, 0), carried) is None


def test_nvcc_options(setup_script, monkeypatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "12")
    assert setup_script.nvcc_options((12, 1), 7) == ["--threads=4"]
    assert setup_script.nvcc_options((13, 0), 1) == [
        "--threads=1",
        "-static-global-template-stub=true",
        "--compress-mode=size",
    ]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SWA_FAST_CUDA": "yes"}, "SWA_FAST_CUDA: expected one of auto, 1, 0, found 'yes'"),
        ({"SWA_FAST_NO_EXT": "1", "SWA_FAST_CUDA": "1"}, "contradicts"),
        ({"CXX": "no-such-compiler"}, "no C\\+\\+ compiler .* set SWA_FAST_NO_EXT=1"),
        ({"SWA_FAST_CUDA": "1", "CUDA_HOME": "/nowhere"}, "SWA_FAST_CUDA=1, but CUDA_HOME="),
    ],
    ids=["value", "contradiction", "compiler", "toolkit"],
)
def test_impossible_builds_fail_with_one_line(
    setup_script, monkeypatch, environment: dict[str, str], message: str
) -> None:
    for variable in ("SWA_FAST_CUDA", "SWA_FAST_NO_EXT", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=message) as caught:
        setup_script.extensions({})
    assert "\n" not in str(caught.value)


def test_pure_python_build_needs_no_torch(setup_script, monkeypatch) -> None:
    monkeypatch.setenv("SWA_FAST_NO_EXT", "1")
    monkeypatch.delenv("SWA_FAST_CUDA", raising=False)
    info: dict[str, object] = {}
    assert setup_script.extensions(info) == ([], {})
    assert set(info["skipped"]) == {"_C", "_C_cuda"}


def test_guarantees_name_tests_that_exist() -> None:
    folder = Path(__file__).resolve().parent
    text = (folder.parent / "docs" / "guarantees.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 50 and text.count("::") == len(named)
    for file, test in named:
        source = (folder / file).read_text(encoding="utf-8")
        assert f"def {test}(" in source, f"{file}::{test}"
