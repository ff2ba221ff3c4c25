"""Every block of code in the README and in docs/ runs, or is a command that there is."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [
    page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if page.exists()
]
BLOCK = re.compile(r"^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LIBRARIES = {
    "accelerate", "diffusers", "ema_pytorch", "lightning", "safetensors", "timm", "torch_ema",
    "transformers", "ultralytics",
}  # fmt: skip


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The blocks of a language, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if match["language"] == language:
            yield text.count("\n", 0, match.start("code")) + 1, match["code"]


def missing_library(code: str) -> str | None:
    """What a block imports, also by an integration of ours, and is not installed."""
    names: list[str] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    names = [name.removeprefix("swa_fast.integrations.") for name in names]
    names = ["transformers" if name == "huggingface" else name.split(".")[0] for name in names]
    return next((n for n in names if n in LIBRARIES and importlib.util.find_spec(n) is None), None)


def with_python() -> list[object]:
    found = []
    for page in PAGES:
        code = "".join(code for _, code in blocks(page, "python"))
        if code:
            marks = [pytest.mark.gpu] if "cuda" in code else []
            found.append(pytest.param(page, id=page.stem, marks=marks))
    return found


@pytest.mark.parametrize("page", with_python())
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page in one scope, in their order, in an empty folder; where they join processes,
    as the only one."""
    monkeypatch.chdir(tmp_path)
    # Trainers of libraries join a group and leave it to the end of the process.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # What torchrun sets.
    for name, value in zip(
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
        ("0", "1", "0", "127.0.0.1", port),
        strict=True,
    ):
        monkeypatch.setenv(name, value)
    scope: dict[str, object] = {"__name__": "__main__"}
    # Of what an update is equivalent to.
    weights, averages = torch.ones(3), [torch.zeros(3)]
    scope |= {"n": 3, "averages": averages, "parameters": [weights]}
    ran = False
    for line, code in blocks(page, "python"):
        if missing_library(code) is not None:
            continue
        with warnings.catch_warnings():
            # The libraries' own, and torch's of what one process cannot shard.
            if (LIBRARIES | {"FullyShardedDataParallel"}) & set(re.findall(r"\w+", code)):
                warnings.simplefilter("ignore")
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), scope)
        ran = True
    if not ran:
        pytest.skip("its libraries are not installed")
    if page.stem in ("README", "index"):
        assert averages[0].eq(0.25).all()
    if page.stem == "README":
        averaged, averager = scope["averaged"], scope["averager"]
        assert averaged.n_averaged.item() == 10  # type: ignore[attr-defined]
        assert averaged.module[1].num_batches_tracked.item() == 10  # type: ignore[attr-defined]
        assert averager.n_averaged == {"swa": 10, "ema": 10}  # type: ignore[attr-defined]


# --- commands -----------------------------------------------------------------------------------


def commands() -> list[object]:
    found = []
    for page in PAGES:
        for line, code in blocks(page, "sh"):
            for text in code.replace("\\\n", " ").splitlines():
                words = shlex.split(text, comments=True)
                if words:
                    found.append(pytest.param(words, id=f"{page.stem}:{line}:{' '.join(words)}"))
    return found


def test_every_block_is_of_a_known_kind() -> None:
    """A block without a language would be checked by nobody. Output and directives are marked."""
    for page in PAGES:
        for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
            kind = match["language"]
            assert kind in ("python", "sh", "text") or kind[:1] == "{", (page, match["code"])


@pytest.mark.parametrize("words", commands())
def test_command_exists(words: list[str]) -> None:
    if not (ROOT / "Makefile").exists():
        pytest.skip("no checkout")
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    words = [word for word in words if word != "..."]
    program, arguments = words[0], words[1:]
    if program == "torchrun":
        program, arguments = "python", arguments[arguments.index("-m") :]
    if program.startswith("python") and arguments[0] == "-m":
        program, arguments = f"python -m {arguments[1]}", arguments[2:]
    if program == "python -m swa_fast.train":
        arguments = arguments if arguments[:1] in (["train"], ["run"]) else ["train", *arguments]
    if program == "python -m swa_fast.analysis":
        arguments = ["analyze", *arguments]

    if program in ("swa-fast", "python -m swa_fast.train", "python -m swa_fast.analysis"):
        pytest.importorskip("tqdm")
        from swa_fast.train.cli import build_parser

        build_parser().parse_args(arguments)
    elif program in ("python -m swa_fast", "python -m swa_fast.patch"):
        module = program.split()[-1].removeprefix("swa_fast").lstrip(".") or "__main__"
        text = (ROOT / f"swa_fast/{module}.py").read_text()
        if module == "__main__":
            assert all(option in text for option in arguments)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in arguments:
            name, _, value = word.partition("=")
            pattern = rf"^{name} \?=" if value else rf"^{name}:"
            assert re.search(pattern, makefile, re.MULTILINE), word
    elif program == "pip":
        project = (ROOT / "pyproject.toml").read_text()
        for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(arguments)):
            assert all(re.search(rf"^{e} = \[", project, re.MULTILINE) for e in extra.split(","))
    elif program.startswith("python") or program == "pytest":
        path = ROOT / arguments[0]
        script = (path / "__main__.py" if path.is_dir() else path).read_text()
        options = [word.split("=")[0] for word in arguments[1:] if word.startswith("--")]
        assert all(option in script for option in options), options
    elif program == "bash":
        assert (ROOT / arguments[0]).exists()
    else:
        assert program in ("export", "git", "conda", "sphinx-build", "cd"), words


# --- troubleshooting ----------------------------------------------------------------------------


def flat(node: ast.expr) -> str:
    """A string with … for what varies."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(flat, node.values))
    if isinstance(node, ast.BinOp):
        return flat(node.left) + flat(node.right)
    return "…"


def test_troubleshooting_is_about_messages_that_there_are() -> None:
    if not (ROOT / "setup.py").exists():
        pytest.skip("no checkout")
    found = set()
    for file in [ROOT / "setup.py", *(ROOT / "swa_fast").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Constant, ast.JoinedStr)):
                found.add(flat(node))
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### (.*)$", page, flags=re.MULTILINE)
    messages = [m for heading in headings for _, m in re.findall(r"(`+) ?(.+?) ?\1(?!`)", heading)]
    assert len(messages) >= len(headings) > 30
    for message in messages:
        parts = [part for part in message.split("…") if len(part) > 3]
        assert any(all(part in text for part in parts) for text in found), message


def test_every_environment_variable_is_documented() -> None:
    package = Path(importlib.util.find_spec("swa_fast").origin).parent  # type: ignore[union-attr, arg-type]
    sources = [*package.rglob("*.py"), *ROOT.glob("setup.py"), *(ROOT / "bench").glob("*.py")]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    page = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    # With a value: macros of the C++ have such names, too.
    used = set(re.findall(r"""environ[^\n]*?["'](SWA_FAST_\w+)["']""", text))
    used |= set(re.findall(r"""flag\("(SWA_FAST_\w+)\"""", text))
    assert len(used) >= 3
    assert not [name for name in used if f"| `{name}` |" not in page]
