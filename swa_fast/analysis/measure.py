"""What a network is worth at given weights, with BatchNorm statistics of its own, and a cache of
what was measured."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import update_bn
from ..train.distributed import World
from ..train.errors import TrainError
from ..train.files import write_atomically

__all__ = ["Cache", "Problem", "Value"]

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]

# Bytes of batches that are kept, so that they are read, cropped and normalised once for all points.
_HELD = 1 << 30
# Of the measurement: a change of it that changes values gives it another number.
_VERSION = 1
# Weight vectors that are combined at once.
_TOGETHER = 16


@dataclass(frozen=True)
class Value:
    """Mean cross-entropy in nats and error in percent."""

    train_loss: float
    train_error: float
    test_loss: float
    test_error: float


class _Held:
    """Batches that are made once, if they fit into memory."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._held: list[tuple[Tensor, Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._held is not None:
            yield from self._held
            return
        held: list[tuple[Tensor, Tensor]] | None = []
        size = 0
        for batch in self._batches():
            size += sum(t.numel() * t.element_size() for t in batch)
            if held is not None and size <= _HELD:
                held.append(batch)
            else:
                held = None
            yield batch
        self._held = held


class Problem:
    """A network, whose weights are varied, and the data that it is measured on.

    A weight vector [n] holds all parameters of the network, one after the other, in the dtype of
    the first of them. Buffers are no part of it: BatchNorm statistics are estimated anew.

    Args:
        model: the network; overwritten at every measurement.
        train: called for the batches of images and labels of the training set, the same ones in the
            same order every time.
        test: those of the test set.
        identity: everything beside the weights that decides the values: data and settings.
        tolerance: of :func:`swa_fast.update_bn`, which may then stop before the end of the training
            set; None takes all of it.
        estimator: of :func:`swa_fast.update_bn`.
        loss: of outputs and labels, the sum over a batch.
        error: of outputs and labels, how many are wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Batches,
        test: Batches,
        identity: str,
        *,
        tolerance: float | None = None,
        estimator: str = "weighted",
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        error: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.model = model
        self._parameters = list(model.parameters())
        if not self._parameters:
            raise TrainError("expected a network with parameters, found none")
        self._train, self._test = _Held(train), _Held(test)
        self._tolerance, self._estimator = tolerance, estimator
        self._loss = loss or (lambda x, y: F.cross_entropy(x.float(), y, reduction="sum"))
        self._error = error or (lambda x, y: (x.argmax(1) != y).sum())
        settings = (_VERSION, identity, tolerance, estimator)
        self._identity = json.dumps(settings).encode()

    @property
    def size(self) -> int:
        """n."""
        return sum(parameter.numel() for parameter in self._parameters)

    def vector(self) -> Tensor:
        """The weights that the network has now."""
        first = self._parameters[0]
        return torch.cat([p.detach().reshape(-1).to(first.dtype) for p in self._parameters])

    def key(self, vector: Tensor) -> str:
        """A hash of everything that decides the value at a point."""
        digest = hashlib.sha256(self._identity)
        digest.update(vector.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def _become(self, vector: Tensor) -> None:
        parts = vector.split([parameter.numel() for parameter in self._parameters])
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.copy_(part.view(parameter.shape))
        # Where statistics are not finite, neither is the value, and the figure shows that.
        with contextlib.suppress(FloatingPointError):
            update_bn(self._train, self.model, estimator=self._estimator, tolerance=self._tolerance)
        self.model.eval()

    @torch.inference_mode()
    def _score(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        sums = torch.zeros(3, dtype=torch.float64)
        for images, labels in batches:
            outputs = self.model(images)
            found = (self._loss(outputs, labels), self._error(outputs, labels), len(labels))
            sums += torch.stack([torch.as_tensor(x, dtype=torch.float64).cpu() for x in found])
        loss, wrong, count = sums.tolist()
        return loss / count, 100 * wrong / count

    def value(self, vector: Tensor) -> Value:
        """The value at a point [n]."""
        self._become(vector)
        return Value(*self._score(self._train), *self._score(self._test))

    def probabilities(self, vector: Tensor) -> Tensor:
        """Softmax outputs at a point for the test set, float64 [N, K]."""
        self._become(vector)
        with torch.inference_mode():
            return torch.cat([self.model(x).double().softmax(1) for x, _ in self._test])

    def labels(self) -> Tensor:
        """Of the test set, int64 [N]."""
        return torch.cat([labels for _, labels in self._test])


class Cache:
    """Values by the hash of weights, data and settings: a file for each, so that an interrupted
    study goes on, processes share the points, and no point is measured twice.

    Args:
        folder: of the files; made when the first is written.
        world: the processes that share the points.
        progress: wraps the points that this process measures, given their number.
    """

    def __init__(
        self,
        folder: Path,
        world: World | None = None,
        progress: Callable[[Iterable[int], int], Iterable[int]] = lambda items, count: items,
    ) -> None:
        self.folder = folder
        self._world, self._progress = world, progress

    def _read(self, key: str) -> Value | None:
        names = [field.name for field in fields(Value)]
        try:
            found = json.loads((self.folder / f"{key}.json").read_text())
            # What is not finite has no number in JSON.
            return Value(
                *(math.nan if found[name] is None else float(found[name]) for name in names)
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, key: str, value: Value) -> None:
        content = {k: v if math.isfinite(v) else None for k, v in asdict(value).items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / f"{key}.json", json.dumps(content).encode())
        except OSError as error:
            raise TrainError(
                f"--out: expected a folder that can be written, found {self.folder} ({error})"
            ) from error

    def values(
        self, problem: Problem, count: int, points: Callable[[Sequence[int]], Tensor]
    ) -> list[Value]:
        """The values at ``count`` points.

        Args:
            problem: measures.
            count: how many.
            points: gives the weight vectors [K, n] of points by their numbers; asked for a few at a
                time.
        """
        keys: dict[int, str] = {}
        found: dict[int, Value] = {}
        for start in range(0, count, _TOGETHER):
            numbers = range(start, min(start + _TOGETHER, count))
            for i, vector in zip(numbers, points(numbers), strict=True):
                keys[i] = problem.key(vector)
                if (value := self._read(keys[i])) is not None:
                    found[i] = value
        rank, size = (0, 1) if self._world is None else (self._world.rank, self._world.size)
        # By their numbers: what is missing another process may see otherwise, a moment later.
        missing = [i for i in range(count) if i not in found]
        mine = [i for i in missing if i % size == rank]
        rows: dict[int, Tensor] = {}
        for at, i in enumerate(self._progress(mine, len(mine))):
            if i not in rows:
                chunk = mine[at : at + _TOGETHER]
                rows = dict(zip(chunk, points(chunk), strict=True))
            found[i] = problem.value(rows[i])
            self._write(keys[i], found[i])
        if self._world is not None:
            self._world.wait()
        for i in missing:
            if i not in found:
                value = self._read(keys[i])
                if value is None:
                    raise TrainError(
                        f"{self.folder}: expected the points of the other processes there, found "
                        "none; all processes must see the same files"
                    )
                found[i] = value
        return [found[i] for i in range(count)]
