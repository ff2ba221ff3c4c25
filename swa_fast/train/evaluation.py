"""What networks are worth: loss and accuracy on the test set, also of averages and ensembles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swa_fast import update_bn

from .config import TrainConfig
from .data import Batch, Batches, Dataset, Placement
from .distributed import World
from .errors import Stopped, TrainError
from .randomness import derive_seed
from .sharded import gather

_BATCH = 512

#: Mean cross-entropy in nats, and accuracy in percent.
Score = tuple[float, float]


def autocast(config: TrainConfig) -> AbstractContextManager[Any]:
    """The mixed precision of a configuration, on its device."""
    dtype = torch.float16 if config.amp == "fp16" else torch.bfloat16
    device = torch.device(config.device).type
    return torch.autocast(device, dtype, enabled=config.amp != "none")


class Evaluation:
    """Measures networks on the test set.

    Args:
        config: the settings.
        dataset: whose test images to take.
        batches: the training images, for the BatchNorm statistics of averages.
        placement: where the images lie.
        world: the processes that share the test set.
        interrupted: asked between batches whether to stop.

    Attributes:
        test_batches: called for this process's share of the test set, in batches.
        test_labels: of this process's share of the test set, int64 [N].

    Raises:
        Stopped: all its methods do, between batches, when ``interrupted`` says so.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        batches: Batches,
        placement: Placement,
        world: World,
        interrupted: Callable[[], bool],
    ) -> None:
        self.config = config
        self.world = world
        self._device = placement.device
        self._batches = batches
        self.test_batches = dataset.test_batches(_BATCH, placement)
        mine = slice(placement.rank, None, placement.world_size)
        self.test_labels = dataset.test_labels[mine].to(placement.device)
        self._interrupted = interrupted

    def _interruptible(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            # Several processes would not stop at the same batch.
            if self.world.size == 1 and self._interrupted():
                raise Stopped
            yield batch

    def _logits(self, model: nn.Module) -> Iterator[Batch]:
        """What a network in evaluation mode makes of this process's share of the test set, float32
        [B, K], and the labels."""
        model.eval()
        gather(model)  # processes may have different numbers of batches
        for images, labels in self._interruptible(self.test_batches()):
            with autocast(self.config):
                logits = model(images)
            yield logits.float(), labels

    @torch.inference_mode()
    def score(self, model: nn.Module) -> Score:
        """Loss and accuracy of a network."""
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        for logits, labels in self._logits(model):
            sums[0] += F.cross_entropy(logits, labels, reduction="sum")
            sums[1] += (logits.argmax(1) == labels).sum()
            sums[2] += len(labels)
        return self._means(sums)

    @torch.inference_mode()
    def probabilities(self, model: nn.Module) -> Tensor:
        """Softmax outputs of a network for this process's share of the test set, float32 [N, K]."""
        return torch.cat([logits.softmax(1) for logits, _ in self._logits(model)])

    @torch.inference_mode()
    def score_probabilities(self, mean: Tensor) -> Score:
        """Loss and accuracy of probabilities, float32 [N, K], for this process's share."""
        labels = self.test_labels
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        # A probability that float32 rounds to zero is a small one, and no infinite loss.
        least = math.ldexp(1.0, -149)
        sums[0] = F.nll_loss(mean.clamp(min=least).log(), labels, reduction="sum")
        sums[1] = (mean.argmax(1) == labels).sum()
        sums[2] = len(labels)
        return self._means(sums)

    def _means(self, sums: Tensor) -> Score:
        loss, correct, count = self.world.sum(sums).tolist()
        return loss / count, 100 * correct / count

    def renew_statistics(self, model: nn.Module, epoch: int, share: float = 1.0) -> None:
        """Gives a network the BatchNorm statistics of the training images, cut as in an epoch, or
        of the first ``share`` of their shuffled batches.

        Raises:
            TrainError: activations are not finite.
        """
        config = self.config
        torch.manual_seed(derive_seed(config.seed, "bn-model", epoch) ^ self.world.rank)
        batches = self._batches.epoch(derive_seed(config.seed, "bn", epoch - 1))
        gather(model)
        try:
            with autocast(config):
                update_bn(
                    (images for images, _ in self._interruptible(batches)),
                    model,
                    estimator=config.bn_estimator,
                    max_batches=None if share == 1 else max(1, int(share * len(self._batches))),
                    group=True if self.world.size > 1 else None,
                    backend=config.backend,
                )
        except FloatingPointError as error:
            raise TrainError(
                f"epoch {epoch}: {error}; the training diverged, try a lower --lr or --swa-lr"
            ) from error
