"""Triton kernels. Import the module of a kernel family; this file imports none of them."""

__all__: list[str] = []
