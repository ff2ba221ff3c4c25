"""What a pass reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BNReport:
    """What :func:`update_bn` did. With ``group`` the numbers are those of all ranks together.

    Attributes:
        estimator: ``torch``, ``weighted`` or ``pooled``.
        backend: what computed the statistics; several names for a model on several devices.
        batches: batches read, K.
        samples: sum of the batches' sizes (dimension 0 of a batch's first tensor).
        layers: names of the layers whose statistics were written, as in
            ``model.named_modules()`` of the model without its wrappers.
        unused: names of layers that no forward came by; their statistics are as before.
        frozen: names of layers in eval mode inside a model in training mode; as before, too.
        mean_error: standard error of the mean, relative to the standard deviation, of the worst
            channel; None below two batches.
        var_error: standard error of the variance, relative to the variance, of the worst channel;
            None below two batches.
        converged: whether both errors are within the tolerance; None if none was asked for.
        seconds: time of the pass, loader included.
        correlation: with a tolerance, the largest correlation of neighbouring batches' statistics
            in a layer, on this rank: about 0 for batches in random order. None without.
        replayed: batches whose forward was replayed from a CUDA graph, on this rank.
    """

    estimator: str
    backend: str
    batches: int
    samples: int
    layers: tuple[str, ...]
    unused: tuple[str, ...]
    frozen: tuple[str, ...]
    mean_error: float | None
    var_error: float | None
    converged: bool | None
    seconds: float
    replayed: int = 0
    correlation: float | None = None

    def __str__(self) -> str:
        if not (self.layers or self.unused or self.frozen):
            return "update_bn: the model has no BatchNorm layers with running statistics"
        parts = [
            f"update_bn: {len(self.layers)} layers from {self.samples} samples in "
            f"{self.batches} batches, {self.seconds:.3g} s",
            f"estimator {self.estimator}, backend {self.backend}",
        ]
        if self.mean_error is not None and self.var_error is not None:
            reached = {None: "", True: ", within the tolerance", False: ", above the tolerance"}
            parts.append(
                f"largest standard error: mean {self.mean_error:.2g} standard deviations, "
                f"variance {self.var_error:.2g} of it{reached[self.converged]}"
            )
        if self.correlation is not None:
            parts.append(f"correlation of neighbouring batches {self.correlation:.2g}")
        for what, names in (("unused", self.unused), ("frozen", self.frozen)):
            if names:
                parts.append(f"{what}: {', '.join(names)}")
        return "; ".join(parts)
