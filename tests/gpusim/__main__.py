"""python tests/gpusim [--report] run CMD...   run a command on the simulated device
python tests/gpusim build                    only build the libraries
python tests/gpusim check FILE...            can every kernel of these .so and .ptx files be run?
python tests/gpusim env                      print the environment as shell exports
"""

import os
import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:  # started by the folder's name, which puts the folder's inside on the path
    sys.path[0] = str(HERE.parent)
from gpusim import build  # noqa: E402


def environment(report=False):
    core = build.core()
    e = {
        "GPUSIM_ACTIVE": "1",
        "LD_PRELOAD": str(core / "libcudart.so.13"),
        "LD_LIBRARY_PATH": ":".join(filter(None, [str(core), os.environ.get("LD_LIBRARY_PATH")])),
        "PYTHONPATH": ":".join(
            filter(None, [str(HERE / "_site"), str(HERE.parent), os.environ.get("PYTHONPATH")])
        ),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "TRITON_LIBCUDA_PATH": str(core),
        "GPUSIM_CUOBJDUMP": build.cuobjdump(),
        "GPUSIM_CACHE": str(build.cache_dir()),
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or "9.0+PTX",
    }
    h = build.cuda_home()
    if h and not os.environ.get("CUDA_HOME"):
        e["CUDA_HOME"] = str(h)
    if report:
        e["GPUSIM_REPORT"] = "1"
    return e


def main(argv):
    report = False
    while argv and argv[0] == "--report":
        report = True
        argv = argv[1:]
    if not argv or argv[0] not in ("run", "build", "env", "check"):
        print(__doc__)
        return 2
    if argv[0] == "build":
        print(build.core())
        try:
            import torch  # noqa: F401

            print(build.aten())
        except ImportError:
            pass
        return 0
    e = environment(report)
    if argv[0] == "check":
        import ctypes

        os.environ.update(
            {k: v for k, v in e.items() if k.startswith("GPUSIM_") and k != "GPUSIM_ACTIVE"}
        )
        lib = ctypes.CDLL(e["LD_PRELOAD"])
        lib.gpusim_check.restype = ctypes.c_char_p
        text = "".join(
            lib.gpusim_check(os.path.abspath(f).encode()).decode("utf-8", "replace")
            for f in argv[1:]
        )
        print(text, end="")
        return 1 if "FAIL" in text or not text else 0
    if argv[0] == "env":
        for k, v in e.items():
            print(f"export {k}={shlex.quote(v)}")
        return 0
    cmd = argv[1:]
    if not cmd:
        print(__doc__)
        return 2
    if cmd[0] in ("python", "python3"):
        cmd[0] = sys.executable  # the interpreter that runs gpusim
    os.environ.update(e)
    os.execvp(cmd[0], cmd)


sys.exit(main(sys.argv[1:]))
