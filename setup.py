"""Builds the C++ and CUDA libraries; everything static is in pyproject.toml.

swa_fast._C (CPU) is always built, swa_fast._C_cuda when a CUDA toolkit is found. Both use the
libtorch stable ABI and Python's limited API, so one wheel, built with any torch from 2.10, serves
every torch from 2.10 and every CPython from 3.10.

    SWA_FAST_NO_EXT=1     build neither: a pure-Python wheel (reference and Triton backends)
    SWA_FAST_CUDA=auto    build _C_cuda if a toolkit is found (default)
                  1       ... and fail if none is
                  0       do not look for one
    TORCH_CUDA_ARCH_LIST  such as "9.0" or "8.0;9.0+PTX", as PyTorch reads it. The default is for a
                          wheel that is carried elsewhere; one architecture builds much faster
    CUDA_HOME             the toolkit to use
    SWA_FAST_SANITIZE     gcc's sanitizers for _C, such as "address,undefined" (make test-asan)
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest torch the binary runs on
# Turing to consumer Blackwell. Code for X.0 also runs on later devices of the same major version
# (8.6 and 8.9, 10.3, 12.1). The PTX of 9.0 is for what lies between (11.0), that of 12.0 for what
# comes after.
DEFAULT_ARCH_LIST = "7.5;8.0;9.0+PTX;10.0;12.0+PTX"
CUDA_SOURCES = [
    "csrc/module_cuda.cpp",
    "csrc/batch_norm_cuda.cu",
    "csrc/combine_cuda.cu",
    "csrc/update_cuda.cu",
]
MIN_TOOLKIT = (12, 1)  # kernel arguments of more than 4 KB
MIN_SETUPTOOLS = 77  # that reads the licence in pyproject.toml
REPOSITORY = "https://github.com/swa-fast/swa_fast"
COMMIT = ROOT / "COMMIT"  # of a source distribution, which has no repository


def fail(message: str) -> None:
    raise SystemExit(f"swa_fast: {message}")


def check_setuptools(found: str) -> None:
    """One line instead of what an older one says of pyproject.toml. Fresh environments of Python
    3.10 and 3.11 come with 65."""
    if int(found.split(".")[0]) < MIN_SETUPTOOLS:
        fail(
            f"setuptools {found} is too old: with --no-build-isolation, run "
            f"`pip install 'setuptools>={MIN_SETUPTOOLS}'` first"
        )


def flag(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name) or allowed[0]
    if value not in allowed:
        fail(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")
    return value


def is_toolkit(root: Path) -> bool:
    return (root / "bin" / "nvcc").exists() and (root / "include" / "cuda_runtime.h").exists()


def toolkit_of_nvcc(nvcc: str) -> Path | None:
    """The toolkit behind an nvcc on PATH, which may be a link or a wrapper script."""
    root = Path(nvcc).resolve().parent.parent
    if is_toolkit(root):
        return root
    try:
        dryrun = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    top = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE)
    if top is None:
        return None
    root = Path(os.path.normpath(top.group(1).strip()))
    return root if is_toolkit(root) else None


def find_toolkit() -> tuple[Path | None, str]:
    """The CUDA toolkit's root, and where it was found or why there is none."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if value := os.environ.get(variable):
            if not is_toolkit(Path(value)):
                return None, (
                    f"{variable}={value} holds no CUDA toolkit (bin/nvcc and "
                    "include/cuda_runtime.h expected)"
                )
            return Path(value), variable
    nvcc = shutil.which("nvcc")
    if nvcc and (root := toolkit_of_nvcc(nvcc)):
        return root, "nvcc on PATH"

    def version_key(path: Path) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", path.name)]

    versioned = sorted(Path("/usr/local").glob("cuda-*"), key=version_key, reverse=True)
    for root in (Path("/usr/local/cuda"), *versioned, Path("/opt/cuda")):
        if is_toolkit(root):
            return root, "a usual place"
    for entry in sys.path:
        for root in sorted(Path(entry or ".").glob("nvidia/cu1?"), reverse=True):
            if is_toolkit(root):
                return root, "pip's cuda-toolkit"
    return None, (
        "no CUDA toolkit was found (looked at CUDA_HOME, CUDA_PATH, nvcc on PATH, "
        "/usr/local/cuda*, /opt/cuda and pip's cuda-toolkit)"
    )


def toolkit_version(root: Path) -> tuple[int, int]:
    header = (root / "include" / "cuda_runtime_api.h").read_text(encoding="utf-8", errors="ignore")
    match = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header)
    if match is None:
        fail(f"{root}/include/cuda_runtime_api.h does not define CUDART_VERSION")
    assert match is not None
    number = int(match.group(1))
    return number // 1000, number % 1000 // 10


def cudart_library(root: Path) -> Path:
    # pip's toolkit has only the versioned name, so the linker is given the file's own name.
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        for library in sorted((root / folder).glob("libcudart.so*"), key=lambda p: len(p.name)):
            return library
    fail(f"{root} holds no libcudart.so: install the toolkit's cudart, or set SWA_FAST_CUDA=0")
    raise AssertionError


def gencode_flags(arch_list: str) -> list[str]:
    """nvcc's -gencode flags for a list such as "8.0;9.0+PTX".

    torch's own flags are not used: torch drops its list when any compiler flag contains the
    letters "arch", a path for instance.
    """
    flags = []
    for arch in arch_list.replace(" ", ";").split(";"):
        if not arch:
            continue
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if match is None:
            fail(
                f"TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0;9.0+PTX, found {arch!r} in "
                f"{arch_list!r}"
            )
        assert match is not None
        number = match.group(1) + match.group(2)
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match.group(3):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not flags:
        fail(f"TORCH_CUDA_ARCH_LIST: expected at least one architecture, found {arch_list!r}")
    return flags


def nvcc_options(toolkit: tuple[int, int], architectures: int) -> list[str]:
    """What makes the library small and its build quick, as far as this nvcc knows it."""
    # ninja compiles the files side by side; cores that it leaves idle share the architectures.
    cores = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    threads = max(1, min(architectures, cores // sum(s.endswith(".cu") for s in CUDA_SOURCES)))
    options = [f"--threads={threads}"]
    if toolkit >= (12, 6):
        options.append("-static-global-template-stub=true")
    if toolkit >= (12, 8):
        options.append("--compress-mode=size")
    return options


def compiler_version(compiler: str) -> str:
    output = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return output.stdout.splitlines()[0] if output.stdout else compiler


def commit() -> str | None:
    """The source's commit, with a plus where it was changed since; None where nothing tells it."""

    def git(*arguments: str) -> str:
        found = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return found.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return recorded_commit()
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return recorded_commit()


def recorded_commit() -> str | None:
    return COMMIT.read_text(encoding="utf-8").strip() or None if COMMIT.exists() else None


def extensions(info: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Extension modules and build commands; records in ``info`` what is built and what is not."""
    cuda = flag("SWA_FAST_CUDA", ("auto", "1", "0"))
    if flag("SWA_FAST_NO_EXT", ("0", "1")) == "1":
        if cuda == "1":
            fail("SWA_FAST_CUDA=1 contradicts SWA_FAST_NO_EXT=1")
        info["skipped"] = dict.fromkeys(("_C", "_C_cuda"), "SWA_FAST_NO_EXT=1 when it was built")
        return [], {}

    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        fail(
            f"no C++ compiler ({compiler} not found): install one, or set SWA_FAST_NO_EXT=1 for "
            "the pure-Python package"
        )
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        fail(
            f"torch cannot be imported ({error}): with --no-build-isolation, install torch>=2.10 "
            "first"
        )
    info["torch"] = torch.__version__
    info["compiler"] = compiler_version(compiler.split()[0])

    # Messages of failed checks carry __FILE__: the builder's paths do not belong in a wheel.
    prefixes = [f"{ROOT}/=", *(f"{path}/=" for path in cpp_extension.include_paths())]
    prefix_maps = [f"-ffile-prefix-map={prefix}" for prefix in prefixes]
    abi = [
        "-DTORCH_STABLE_ONLY",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    ]
    # Sums are fused where the source says so, not where a compiler finds it convenient: every
    # processor rounds alike.
    exact = "-ffp-contract=off"
    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", exact, *abi, *prefix_maps]
    link = ["-Wl,--as-needed", "-Wl,-s"] if sys.platform == "linux" else []
    if sanitizers := os.environ.get("SWA_FAST_SANITIZE"):
        # vptr asks for the type information of torch's classes, which stays in torch. The first
        # finding ends the process, so that no test passes over it.
        sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
        cxx += ["-O1", "-g", "-fno-omit-frame-pointer", *sanitize]
        link = sanitize
    common: dict[str, Any] = {
        "include_dirs": ["csrc"],
        "depends": [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").glob("*.[hc]*"))],
        "extra_link_args": link,
        "py_limited_api": True,
    }
    modules = [
        cpp_extension.CppExtension(
            "swa_fast._C",
            [
                "csrc/module_cpu.cpp",
                "csrc/batch_norm_cpu.cpp",
                "csrc/combine_cpu.cpp",
                "csrc/update_cpu.cpp",
            ],
            extra_compile_args={"cxx": cxx},
            **common,
        )
    ]

    toolkit, where = (None, "SWA_FAST_CUDA=0") if cuda == "0" else find_toolkit()
    if toolkit is not None and toolkit_version(toolkit) < MIN_TOOLKIT:
        found = ".".join(map(str, toolkit_version(toolkit)))
        toolkit, where = None, f"the CUDA toolkit ({where}) is {found}, 12.1 or newer is needed"
    if toolkit is None:
        if cuda == "1":
            fail(f"SWA_FAST_CUDA=1, but {where}")
        info["skipped"] = {"_C_cuda": where}
        print(f"swa_fast: building the CPU kernels only: {where}", file=sys.stderr)
    else:
        arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCH_LIST
        cudart = cudart_library(toolkit)
        nvcc = ["-O3", "-Xcompiler=-fvisibility=hidden", *abi, *gencode_flags(arch_list)]
        nvcc += [f"-Xcompiler={prefix_map}" for prefix_map in prefix_maps]
        nvcc += nvcc_options(toolkit_version(toolkit), len(arch_list.split(";")))
        # With a CPU build of torch the environment variable alone would have no effect.
        cpp_extension.CUDA_HOME = str(toolkit)
        module = cpp_extension.CUDAExtension(
            "swa_fast._C_cuda",
            CUDA_SOURCES,
            extra_compile_args={
                "cxx": [*cxx, f'-DSWA_FAST_ARCH_LIST="{arch_list}"'],
                "nvcc": nvcc,
            },
            **common,
        )
        # One function of libtorch_cuda is called (current_stream in csrc/stable_compat.h). It is
        # left undefined here, since a torch built for the CPU has no such library to link with.
        # Where this file is loaded it is found through libtorch, which is nothing but the list of
        # torch's libraries: hence it has to stay needed, although it defines no symbol.
        module.libraries = ["c10", "torch_cpu"]
        module.library_dirs.append(str(cudart.parent))
        keep_torch = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
        module.extra_link_args = [*module.extra_link_args, *keep_torch, f"-l:{cudart.name}"]
        modules.append(module)
        info["cuda"] = ".".join(map(str, toolkit_version(toolkit)))
        info["arch_list"] = arch_list
        print(
            f"swa_fast: building the CUDA kernels for {arch_list} with {toolkit} ({where})",
            file=sys.stderr,
        )
    return modules, {"build_ext": cpp_extension.BuildExtension}


INFO: dict[str, Any] = {
    "python": platform.python_version(),
    "platform": platform.platform(terse=True),
    "commit": commit(),
}


class BuildPy(build_py):
    """Starts from an empty folder and puts the build facts into the package."""

    def run(self) -> None:
        editable = getattr(self, "editable_mode", False)
        if not editable:
            # setuptools packs whatever lies there, so a module renamed since the last build would
            # be in the wheel under both names. The libraries come later (build_ext).
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        root = ROOT if editable else Path(self.build_lib)
        target = root / "swa_fast" / "_build_info.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(INFO, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class Sdist(sdist):
    """Puts the commit into the source distribution, for the build facts of what is made of it."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        found = Path(base_dir) / COMMIT.name
        found.unlink(missing_ok=True)  # a link to the file of the sources
        found.write_text(f"{INFO['commit'] or ''}\n", encoding="utf-8")


def long_description() -> str:
    """The README for the package index, from where links into the repository lead to nothing."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^]]*\])\((?!https?:)([^)]+)\)", rf"\1({REPOSITORY}/raw/main/\2)", text)
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", rf"]({REPOSITORY}/blob/main/\1)", text)


# Metadata commands (egg_info, sdist) need neither torch nor a compiler.
builds = any(
    command in sys.argv
    for command in ("build_ext", "bdist_wheel", "editable_wheel", "build", "install", "develop")
)
ext_modules, commands = extensions(INFO) if builds else ([], {})

check_setuptools(setuptools.__version__)
setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    ext_modules=ext_modules,
    cmdclass={"build_py": BuildPy, "sdist": Sdist, **commands},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
