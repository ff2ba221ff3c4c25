"""Installs the aten layer after torch was imported (called by the import hook)."""

import ctypes

_installed = False


def install():
    global _installed
    if _installed:
        return
    _installed = True
    import torch

    from . import build

    if not torch.version.cuda:
        raise RuntimeError("gpusim needs a CUDA build of torch")
    lib = ctypes.CDLL(str(build.aten()))
    names = sorted(
        n.split("::", 1)[1]
        for n in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
        if n.startswith("aten::")
    )
    arr = (ctypes.c_char_p * len(names))(*[n.encode() for n in names])
    if lib.gpusim_install(arr, len(names)) < 500:
        raise RuntimeError("gpusim: the aten layer could not be installed")
    # the fused attention kernels have no CPU counterpart: use the plain composition of operators
    for f in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):
        getattr(torch.backends.cuda, f, lambda on: None)(False)
