"""Training along a trajectory, epoch by epoch.

Initial weights, the order, crops and flips of an epoch, and whatever the network itself draws are
functions of the seed and the epoch number alone (:mod:`.randomness`). So all methods start from the
same weights and see the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swa_fast

from .averages import Average, WeightAverage, make_average
from .clock import Clock
from .config import TrainConfig
from .data import Dataset, Placement, Wrap, load_dataset
from .distributed import World
from .errors import TrainError
from .evaluation import Evaluation, Score, autocast
from .methods import Trajectory
from .models import build_model, load_pretrained, spec_of
from .randomness import derive_seed, set_random_state
from .sharded import shard

Record = dict[str, Any]


@dataclass
class Run:
    """State of a trajectory after ``epoch`` epochs and ``step`` steps of the next one.

    Attributes:
        forward: the network as training calls it: compiled, or distributed, or ``model`` itself.
        captured: whether the averages hold the weights of an epoch whose record is yet to come.
        loss, correct: sums over the steps of the present epoch, on the device.
        clock: seconds by phase of the present epoch.
        random: states of torch's generators, set when an epoch is continued in its middle.
    """

    trajectory: Trajectory
    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    averages: dict[str, Average]
    loss: Tensor
    correct: Tensor
    clock: Clock
    epoch: int = 0
    step: int = 0
    captured: bool = False
    random: dict[str, Tensor] | None = None
    records: list[Record] = field(default_factory=list)


def load_trainer(
    config: TrainConfig, world: World | None = None, progress: Wrap | None = None
) -> Trainer:
    """A trainer with the data of its configuration.

    Args:
        config: the settings.
        world: the processes that share each batch; None for this one alone.
        progress: as for :func:`~swa_fast.train.data.load_dataset`.

    Raises:
        TrainError: as :func:`load_data`.
    """
    return Trainer(config, load_data(config, progress), world or World())


def load_data(config: TrainConfig, progress: Wrap | None = None) -> Dataset:
    """The data of a configuration.

    Raises:
        TrainError: as :func:`~swa_fast.train.data.load_dataset`.
    """
    return load_dataset(
        config.dataset,
        config.data_dir,
        image_size=config.image_size,
        normalise=config.normalise,
        fraction=config.fraction,
        test_fraction=config.test_fraction,
        noise=config.noise,
        validation=config.validation,
        threads=config.threads,
        progress=progress,
    )


class Trainer:
    """Trains networks on a dataset by the recipe of a configuration.

    Sets torch's global random state in :meth:`start` and :meth:`train_epoch`.

    Args:
        config: the settings.
        dataset: the images.
        world: the processes that share each batch.
        interrupted: asked between batches of evaluations and BatchNorm passes whether to stop.

    Attributes:
        data: what results.json says of the dataset.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        world: World,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config = config
        self.world = world
        self.device = world.device(config.device)
        self.data = dataset.to_json()
        self._classes = len(dataset.classes)
        self._image_shape = dataset.image_shape
        placement = Placement(
            self.device, config.channels_last, world.rank, world.size, config.workers
        )
        self.batches = dataset.train_batches(config.batch_size, placement)
        self.evaluation = Evaluation(config, dataset, self.batches, placement, world, interrupted)

    def train_epoch(self, run: Run, between: Callable[[], None] = lambda: None) -> Record:
        """One epoch, or the rest of one: training, captures, and the scores of its record.

        Args:
            run: its state; advanced by an epoch, and the record appended.
            between: called after every training step, when the state can be saved; an exception
                that it raises leaves the run there.

        Raises:
            TrainError: a loss is not finite. The run must then be given up.
            Stopped: the training is to stop; the state can be saved.
        """
        epoch = run.epoch + 1
        if run.epoch == run.trajectory.begin and run.step == 0 and not run.captured:
            self._capture(run, run.epoch)
        self._begin(run)
        batches = self.batches.epoch(
            derive_seed(self.config.seed, "augment", run.epoch), first=run.step
        )
        while run.step < len(self.batches):
            with run.clock("data"):
                images, labels = next(batches)
            self._train_step(run, images, labels)
            run.step += 1
            between()
        if not run.captured:
            self._capture(run, epoch)
            run.captured = True
        record = self._record(run, epoch)
        run.epoch, run.step, run.captured, run.clock = epoch, 0, False, Clock(self.device)
        run.records.append(record)
        return record

    def _begin(self, run: Run) -> None:
        if run.step == 0:
            seed = derive_seed(self.config.seed, "train", run.epoch)
            # The processes draw masks of their own, the first those of a single process.
            torch.manual_seed(seed if self.world.rank == 0 else seed ^ self.world.rank)
            run.loss.zero_()
            run.correct.zero_()
        elif run.random is not None:
            set_random_state(run.random, self.device)
            run.random = None
        else:  # another number of processes has begun the epoch
            torch.manual_seed(
                derive_seed(self.config.seed, f"train-{run.step}", run.epoch) ^ self.world.rank
            )
        run.model.train()

    def _train_step(self, run: Run, images: Tensor, labels: Tensor) -> None:
        for group in run.optimizer.param_groups:
            group["lr"] = self._rate(run)
        with run.clock("forward_backward"):
            run.optimizer.zero_grad(set_to_none=True)
            share, count = self._share(run.step, len(labels)), self.config.accumulate
            for x, y in zip(images.chunk(count), labels.chunk(count), strict=True):
                with autocast(self.config):
                    logits = run.forward(x)
                smoothing = self.config.label_smoothing
                loss = F.cross_entropy(logits.float(), y, label_smoothing=smoothing)
                run.scaler.scale(loss * (share * (len(y) / len(labels)))).backward()
                # Sums stay on the device: reading them at every step would make the host wait.
                run.loss += loss.detach() * len(y)
                run.correct += (logits.argmax(1) == y).sum()
        with run.clock("optimizer"):
            run.scaler.step(run.optimizer)
            run.scaler.update()
        for average in run.averages.values():
            if average.every_step:
                average.capture(run.model, self.evaluation, run.clock)

    def _rate(self, run: Run) -> float:
        """The learning rate of the step that comes."""
        steps = len(self.batches)
        rate = run.trajectory.rate(run.epoch, run.step, steps)
        warm, done = self.config.warmup_epochs * steps, run.epoch * steps + run.step + 1
        return rate * done / warm if done < warm else rate

    def _share(self, step: int, count: int) -> float:
        """Weight of this process's mean loss. Gradients are averaged over the processes, each
        counting the same; this makes each image count the same."""
        if self.world.size == 1:
            return 1.0
        batch = min(self.config.batch_size, self.batches.images - step * self.config.batch_size)
        return count * self.world.size / batch

    def _capture(self, run: Run, epoch: int) -> None:
        for average in run.averages.values():
            if average.due(epoch):
                average.capture(run.model, self.evaluation, run.clock)

    def _record(self, run: Run, epoch: int) -> Record:
        """What an epoch leaves in results.json, see :mod:`.results`."""
        trajectory = run.trajectory
        reported = epoch in trajectory.reported or epoch == trajectory.end
        # The first epoch too, as in the authors' code.
        looked_at = reported or epoch == 1 or epoch % self.config.eval_every == 0
        # Networks without BatchNorm have no pass that could be shortened.
        curve = self.config.curve_data if spec_of(self.config.model).batch_norm else 1.0
        share = 1.0 if reported else curve
        test: Score | tuple[None, None] = (None, None)
        if looked_at:
            self.world.share_buffers(run.model)
            with run.clock("eval"):
                test = self.evaluation.score(run.model)
        averages: dict[str, Record] = {}
        for method, average in run.averages.items():
            found: Score | tuple[None, None] = (None, None)
            fresh = (average.every_step or average.due(epoch)) and not average.costly
            if average.captures and looked_at and (fresh or reported) and share > 0:
                found = average.score(epoch, self.evaluation, run.clock, share)
            averages[method] = {
                "captures": average.captures,
                "test_loss": found[0],
                "test_accuracy": found[1],
                "bn_share": None if found[0] is None or average.per_process else share,
            }
        loss, correct = self.world.sum(torch.stack((run.loss, run.correct.double()))).tolist()
        record: Record = {
            "trajectory": trajectory.name,
            "epoch": epoch,
            "lr": run.optimizer.param_groups[0]["lr"],
            "train_loss": loss / self.batches.images,
            "train_accuracy": 100 * correct / self.batches.images,
            "test_loss": test[0],
            "test_accuracy": test[1],
            "averages": averages,
            "seconds": run.clock.read(),
        }
        _check_finite(record)
        return record

    def start(self, trajectory: Trajectory) -> Run:
        """A trajectory before its first epoch; all get the same initial weights."""
        config = self.config
        model = self.build()
        if config.sync_bn and self.world.size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        sharded = config.shard != "none" and self.world.size > 1
        if sharded:
            shard(model, self.device, self.world.size)
        own: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
        own["fused"] = not sharded  # torch has no fused SGD of pieces
        optimizer: torch.optim.Optimizer
        if config.optimizer == "adamw":
            optimizer = torch.optim.AdamW(model.parameters(), **own)
        else:
            optimizer = torch.optim.SGD(
                model.parameters(), momentum=config.momentum, nesterov=config.nesterov, **own
            )
        forward: Callable[[Tensor], Tensor] = model
        if self.world.size > 1 and not sharded:
            forward = nn.parallel.DistributedDataParallel(
                model, device_ids=[self.device] if self.device.type == "cuda" else None
            )
        if config.compile:
            forward = torch.compile(forward)
        scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        averages = {
            method: make_average(method, captured, model, config, len(self.batches))
            for method, captured in trajectory.captures.items()
        }
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        clock = Clock(self.device)
        return Run(trajectory, model, forward, optimizer, scaler, averages, loss, correct, clock)

    def build(self) -> nn.Module:
        """The network with its initial weights: random ones of the seed, or pretrained ones.

        Raises:
            TrainError: pretrained weights cannot be had or are of another network.
        """
        config = self.config
        torch.manual_seed(derive_seed(config.seed, "init"))
        model = build_model(
            config.model,
            in_channels=self._image_shape[0],
            num_classes=self._classes,
            width=config.width,
        )
        if config.bn_gamma == "uniform":
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.uniform_(module.weight)
        if config.pretrained is not None:
            path = None if config.pretrained == "torchvision" else config.pretrained
            load_pretrained(model, config.model, path)
        model = model.to(self.device)
        # Only dense rows can be divided.
        if config.channels_last and config.shard == "none":
            model = model.to(memory_format=torch.channels_last)
        return model

    def check_backend(self) -> str:
        """Averages a tiny network once, so that an averaging backend that cannot work is reported
        before hours of training.

        Returns:
            The name of the backend that serves the averages.

        Raises:
            TrainError: it cannot; the message says why.
        """
        probe = nn.Linear(2, 1).to(self.device)
        try:
            average = WeightAverage(probe, None, backend=self.config.backend)
            average.capture(probe, self.evaluation, Clock(self.device))
            backend: str = swa_fast.choose_backend(self.device, self.config.backend)
            return backend
        except (RuntimeError, ValueError, TypeError) as error:
            raise TrainError(f"--backend: {error}") from error

    @torch.inference_mode()
    def check_images(self, model: nn.Module) -> None:
        """Shows an image to the network, before the files of an earlier run are given up.

        Raises:
            TrainError: it cannot take images of this size.
        """
        model.eval()
        try:
            model(torch.zeros(1, *self._image_shape, device=self.device))
        except RuntimeError as error:
            size = "x".join(map(str, self._image_shape[1:]))
            raise TrainError(
                f"--image-size: expected images that a {self.config.model} can take, found {size} "
                f"({' '.join(str(error).split())})"
            ) from error


def _check_finite(record: Record) -> None:
    """Raises TrainError for a loss that is not finite."""
    losses = {name: record[name] for name in ("train_loss", "test_loss")}
    for method, average in record["averages"].items():
        losses[f"test_loss of {method}"] = average["test_loss"]
    for name, value in losses.items():
        if value is not None and not math.isfinite(value):
            raise TrainError(
                f"{record['trajectory']} run, epoch {record['epoch']}: expected a finite {name}, "
                f"found {value}; the training diverged, try a lower --lr or --swa-lr"
            )
