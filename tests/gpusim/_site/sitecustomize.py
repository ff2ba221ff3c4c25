# Put on PYTHONPATH by `python -m gpusim run`: installs the aten layer as soon as torch is imported.
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))


class _Loader(importlib.abc.Loader):
    def __init__(self, inner):
        self.inner = inner

    def create_module(self, spec):
        return self.inner.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        from gpusim import _torch

        _torch.install()


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torch" or path is not None:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


if os.environ.get("GPUSIM_ACTIVE") == "1":
    root = os.path.dirname(os.path.dirname(_here))
    if root not in sys.path:
        sys.path.append(root)
    sys.meta_path.insert(0, _Finder())

# hand over to another sitecustomize, if there is one
_rest = [p for p in sys.path if os.path.abspath(p or ".") != _here]
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", _rest)
if _spec is not None and _spec.loader is not None:
    _m = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_m)
