"""Training along trajectories, epoch by epoch, and the continuation of what was stopped.

Randomness: initial weights, the order, crops and flips of an epoch, and whatever the network itself
draws are functions of the seed and the epoch number alone (:func:`derive_seed`). So all methods
start from the same weights and see the same batches, and a continued run needs no saved generator
but in the middle of an epoch: its weights, averages and records are those of an uninterrupted one,
bit by bit, on the same machine with the same software.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swa_fast
from swa_fast import update_bn

from .config import TrainConfig
from .data import Dataset, eval_batches, train_batches
from .distributed import World
from .errors import Stopped, TrainError
from .methods import Average, Ensemble, Trajectory, WeightAverage
from .models import build_model, load_pretrained
from .stream import StreamedDataset

__all__ = ["PHASES", "Record", "Run", "Trainer", "derive_seed"]

#: What the time of an epoch is spent on, by the keys of a record's ``seconds``.
PHASES = ("data", "forward_backward", "optimizer", "average", "bn", "eval")

_EVAL_BATCH = 512

Record = dict[str, Any]


def derive_seed(seed: int, purpose: str, epoch: int = 0) -> int:
    """A seed in [0, 2^63) for one purpose ("init", "train", "augment", "bn") in one epoch.

    The first 8 bytes of SHA-256 over "seed/purpose/epoch", without the top bit: neighbouring seeds
    and epochs give unrelated streams.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class _Clock:
    """Seconds by phase. On a GPU they are measured by events on the stream, so that nothing waits
    before :meth:`read`; there they hold the work of the device and the time that it idled because
    the host came late.

    Args:
        device: that works.
        before: seconds to begin with, as :meth:`read` gave them.
    """

    def __init__(self, device: torch.device, before: Mapping[str, float] | None = None) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = {**dict.fromkeys(PHASES, 0.0), **(before or {})}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._cuda:
            start = torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._events.append((phase, start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """The sums so far. Waits for the device."""
        if self._events:
            torch.cuda.synchronize()
            for phase, start, end in self._events:
                self._seconds[phase] += start.elapsed_time(end) / 1e3
            self._events.clear()
        return dict(self._seconds)


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
    clock: _Clock
    epoch: int = 0
    step: int = 0
    captured: bool = False
    random: dict[str, Tensor] | None = None
    records: list[Record] = field(default_factory=list)


class Trainer:
    """Trains networks on a dataset by the recipe of a configuration.

    Sets torch's global random state in :meth:`start` and :meth:`train_epoch`.

    Args:
        config: the settings.
        dataset: the images.
        world: the processes that share each batch.
        interrupted: asked between batches of evaluations and BatchNorm passes whether to stop.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset | StreamedDataset,
        world: World,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config = config
        self.world = world
        self.device = world.device(config.device)
        self._classes = len(dataset.classes)
        self._image_shape = dataset.image_shape
        self._interrupted = interrupted
        options: dict[str, Any] = {
            "device": self.device,
            "channels_last": config.channels_last,
            "rank": world.rank,
            "world_size": world.size,
            "workers": config.workers,
        }
        self.batches = train_batches(dataset, batch_size=config.batch_size, **options)
        self._test_batches = eval_batches(dataset, batch_size=_EVAL_BATCH, **options)
        self._test_labels: Tensor | None = None

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
        if config.pretrained is not None:
            path = None if config.pretrained == "torchvision" else config.pretrained
            load_pretrained(model, config.model, path)
        model = model.to(self.device)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return model

    def start(self, trajectory: Trajectory) -> Run:
        """A trajectory before its first epoch; all get the same initial weights."""
        config = self.config
        model = self.build()
        if config.sync_bn and self.world.size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            fused=True,
        )
        forward: Callable[[Tensor], Tensor] = model
        if self.world.size > 1:
            forward = nn.parallel.DistributedDataParallel(
                model, device_ids=[self.device] if self.device.type == "cuda" else None
            )
        if config.compile:
            forward = torch.compile(forward)
        return Run(
            trajectory,
            model,
            forward,
            optimizer,
            torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16"),
            {
                method: self._new_average(method, model, captured)
                for method, captured in trajectory.captures.items()
            },
            loss=torch.zeros((), dtype=torch.float64, device=self.device),
            correct=torch.zeros((), dtype=torch.int64, device=self.device),
            clock=_Clock(self.device),
        )

    def _new_average(
        self, method: str, model: nn.Module, captured: Callable[[int], bool] | None
    ) -> Average:
        if method == "fge":
            assert captured is not None
            return Ensemble(captured)
        decay = None
        if method == "ema":
            decay = max(0.0, 1.0 - 1.0 / (self.config.ema_epochs * len(self.batches)))
        return WeightAverage(model, captured, decay=decay, backend=self.config.backend)

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
            average.capture(probe, self.probabilities)
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

    def continue_from(self, run: Run, state: Mapping[str, Any], path: Path) -> None:
        """Puts a new run at the end of the first part of another trajectory: its weights, buffers
        and momenta.

        Args:
            run: as :meth:`start` made it.
            state: as :meth:`state` gave it for the other trajectory.
            path: the file it came from, for messages.

        Raises:
            TrainError: the state is of other settings or does not fit the network.
        """
        with self._fitting(path):
            self._check_config(state)
            if state["epoch"] != run.trajectory.begin or state["step"] != 0:
                raise TrainError(
                    f"expected the state after epoch {run.trajectory.begin}, found one after epoch "
                    f"{state['epoch']} and step {state['step']}"
                )
            run.model.load_state_dict(state["model"])
            run.optimizer.load_state_dict(state["optimizer"])
            run.scaler.load_state_dict(state["scaler"])
        run.epoch = run.trajectory.begin

    def train_epoch(self, run: Run, between: Callable[[], None] = lambda: None) -> Record:
        """One epoch, or the rest of one: training, captures, BatchNorm passes of the averages,
        evaluation.

        Args:
            run: its state; advanced by an epoch, and the record appended.
            between: called after every training step, when the state can be saved; an exception
                that it raises leaves the run there.

        Raises:
            TrainError: a loss is not finite. The run must then be given up.
            Stopped: the training is to stop; the state can be saved.
        """
        config, trajectory = self.config, run.trajectory
        clock, epoch = run.clock, run.epoch + 1
        if run.epoch == trajectory.begin and run.step == 0 and not run.captured:
            self._capture(run, run.epoch, clock)
        self._train(run, clock, between)
        if not run.captured:
            self._capture(run, epoch, clock)
            run.captured = True
        reported = epoch in trajectory.reported or epoch == trajectory.end
        looked_at = reported or epoch % config.eval_every == 0
        test: tuple[float, float] | tuple[None, None] = (None, None)
        averages: dict[str, Record] = {}
        if looked_at:
            self.world.share_buffers(run.model)
            with clock("eval"):
                test = self.evaluate(run.model)
        for method, average in run.averages.items():
            found: tuple[float, float] | tuple[None, None] = (None, None)
            fresh = average.every_step or average.due(epoch)
            if average.captures and looked_at and (fresh or reported):
                found = self._evaluate_average(average, epoch, clock)
            averages[method] = {
                "captures": average.captures,
                "test_loss": found[0],
                "test_accuracy": found[1],
            }
        loss, correct = self._totals(run)
        record: Record = {
            "trajectory": trajectory.name,
            "epoch": epoch,
            "lr": run.optimizer.param_groups[0]["lr"],
            "train_loss": loss / self.batches.images,
            "train_accuracy": 100 * correct / self.batches.images,
            "test_loss": test[0],
            "test_accuracy": test[1],
            "averages": averages,
            "seconds": clock.read(),
        }
        for name, value in (
            ("train_loss", record["train_loss"]),
            ("test_loss", record["test_loss"]),
            *((f"test_loss of {m}", average["test_loss"]) for m, average in averages.items()),
        ):
            if value is not None and not math.isfinite(value):
                raise TrainError(
                    f"{trajectory.name} run, epoch {epoch}: expected a finite {name}, found "
                    f"{value}; the training diverged, try a lower --lr or --swa-lr"
                )
        run.epoch, run.step, run.captured, run.clock = epoch, 0, False, _Clock(self.device)
        run.records.append(record)
        return record

    def _train(self, run: Run, clock: _Clock, between: Callable[[], None]) -> None:
        config, epoch, steps = self.config, run.epoch, len(self.batches)
        if run.step == 0:
            seed = derive_seed(config.seed, "train", epoch)
            # The processes draw masks of their own, the first those of a single process.
            torch.manual_seed(seed if self.world.rank == 0 else seed ^ self.world.rank)
            run.loss.zero_()
            run.correct.zero_()
        elif run.random is not None:
            self._set_random(run.random)
            run.random = None
        run.model.train()
        averages = [average for average in run.averages.values() if average.every_step]
        batches = iter(
            self.batches.epoch(derive_seed(config.seed, "augment", epoch), first=run.step)
        )
        while run.step < steps:
            with clock("data"):
                images, labels = next(batches)
            rate = run.trajectory.rate(epoch, run.step, steps)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            with clock("forward_backward"):
                with self._autocast():
                    logits = run.forward(images)
                loss = F.cross_entropy(logits.float(), labels)
                run.optimizer.zero_grad(set_to_none=True)
                run.scaler.scale(loss * self._share(run.step, len(labels))).backward()
                # Sums stay on the device: reading them at every step would make the host wait.
                run.loss += loss.detach() * len(labels)
                run.correct += (logits.argmax(1) == labels).sum()
            with clock("optimizer"):
                run.scaler.step(run.optimizer)
                run.scaler.update()
            if averages:
                with clock("average"):
                    for average in averages:
                        average.capture(run.model, self.probabilities)
            run.step += 1
            between()

    def _share(self, step: int, count: int) -> float:
        """Weight of this process's mean loss. Gradients are averaged over the processes, each
        counting the same; this makes each image count the same."""
        if self.world.size == 1:
            return 1.0
        batch = min(self.config.batch_size, self.batches.images - step * self.config.batch_size)
        return count * self.world.size / batch

    def _capture(self, run: Run, epoch: int, clock: _Clock) -> None:
        for average in run.averages.values():
            if average.due(epoch):
                if isinstance(average, Ensemble):
                    self.world.share_buffers(run.model)
                with clock("eval" if isinstance(average, Ensemble) else "average"):
                    average.capture(run.model, self.probabilities)

    def _evaluate_average(self, average: Average, epoch: int, clock: _Clock) -> tuple[float, float]:
        if isinstance(average, Ensemble):
            with clock("eval"):
                return self._evaluate_ensemble(average)
        assert isinstance(average, WeightAverage)
        config = self.config
        torch.manual_seed(derive_seed(config.seed, "bn-model", epoch) ^ self.world.rank)
        batches = self.batches.epoch(derive_seed(config.seed, "bn", epoch - 1))
        with clock("bn"), self._autocast():
            update_bn(
                (images for images, _ in self._interruptible(batches)),
                average.averaged,
                estimator=config.bn_estimator,
                group=True if self.world.size > 1 else None,
                backend=config.backend,
            )
        with clock("eval"):
            return self.evaluate(average.averaged)

    def _interruptible(
        self, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            # Several processes would not stop at the same batch.
            if self.world.size == 1 and self._interrupted():
                raise Stopped
            yield batch

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Mean cross-entropy (nats) and accuracy (percent) on the test set, in evaluation mode."""
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for images, labels in self._interruptible(self._test_batches()):
            with self._autocast():
                logits = model(images)
            sums[0] += F.cross_entropy(logits.float(), labels, reduction="sum")
            sums[1] += (logits.argmax(1) == labels).sum()
            sums[2] += len(labels)
        loss, correct, count = self.world.sum(sums).tolist()
        return loss / count, 100 * correct / count

    @torch.inference_mode()
    def probabilities(self, model: nn.Module) -> Tensor:
        """Softmax outputs in evaluation mode for this process's share of the test set, float32
        [N, K]."""
        model.eval()
        outputs, labels = [], []
        for images, targets in self._interruptible(self._test_batches()):
            with self._autocast():
                logits = model(images)
            outputs.append(logits.float().softmax(1))
            labels.append(targets)
        self._test_labels = torch.cat(labels)
        return torch.cat(outputs)

    @torch.inference_mode()
    def _evaluate_ensemble(self, ensemble: Ensemble) -> tuple[float, float]:
        if self._test_labels is None:
            self._test_labels = torch.cat(
                [labels for _, labels in self._interruptible(self._test_batches())]
            )
        mean, labels = ensemble.mean, self._test_labels
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        # A probability that float32 rounds to zero is a small one, and no infinite loss.
        least = math.ldexp(1.0, -149)
        sums[0] = F.nll_loss(mean.clamp(min=least).log(), labels, reduction="sum")
        sums[1] = (mean.argmax(1) == labels).sum()
        sums[2] = len(labels)
        loss, correct, count = self.world.sum(sums).tolist()
        return loss / count, 100 * correct / count

    def _totals(self, run: Run) -> tuple[float, float]:
        sums = torch.stack((run.loss, run.correct.double()))
        loss, correct = self.world.sum(sums).tolist()
        return loss, correct

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = torch.float16 if self.config.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.config.amp != "none")

    def _random(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set_random(self, states: Mapping[str, Tensor]) -> None:
        # map_location has moved them to the device; generators want them on the CPU.
        torch.set_rng_state(states["cpu"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"].cpu(), self.device)

    def state(self, run: Run) -> dict[str, Any]:
        """Everything from which :meth:`restore` continues the run. All processes must call it."""
        shared = {m: a for m, a in run.averages.items() if not isinstance(a, Ensemble)}
        own = {m: a for m, a in run.averages.items() if isinstance(a, Ensemble)}
        ranks = self.world.gather(
            {
                "random": self._random(),
                "averages": {method: average.state_dict() for method, average in own.items()},
                "loss": run.loss,
                "correct": run.correct,
            }
        )
        return {
            "config": self.config.to_json(),
            "epoch": run.epoch,
            "step": run.step,
            "captured": run.captured,
            "seconds": run.clock.read(),
            "records": run.records,
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "averages": {method: average.state_dict() for method, average in shared.items()},
            "scaler": run.scaler.state_dict(),
            "ranks": ranks,
        }

    def restore(self, run: Run, state: Mapping[str, Any], path: Path) -> None:
        """Puts a run made by :meth:`start` into a saved state.

        Args:
            run: its weights, optimiser, averages and records are replaced.
            state: as :meth:`state` gave it.
            path: the file it came from, for messages.

        Raises:
            TrainError: the state is of other settings, or of another number of processes, or does
                not fit the network.
        """
        trajectory = run.trajectory
        with self._fitting(path):
            self._check_config(state)
            if len(state["ranks"]) != self.world.size:
                raise TrainError(
                    f"expected {self.world.size} processes, found the state of "
                    f"{len(state['ranks'])}; continue with as many as the run began with"
                )
            epochs = state["epoch"] - trajectory.begin
            if not (0 <= epochs == len(state["records"]) and state["epoch"] <= trajectory.end):
                raise TrainError(
                    f"expected a record for each epoch from {trajectory.begin + 1} to "
                    f"{trajectory.end} at most, found epoch {state['epoch']} and "
                    f"{len(state['records'])} records"
                )
            own = state["ranks"][self.world.rank]
            run.model.load_state_dict(state["model"])
            run.optimizer.load_state_dict(state["optimizer"])
            run.scaler.load_state_dict(state["scaler"])
            for method, average in run.averages.items():
                per_process = isinstance(average, Ensemble)
                average.load_state_dict((own if per_process else state)["averages"][method])
            run.loss.copy_(own["loss"])
            run.correct.copy_(own["correct"])
            run.random = own["random"]
            run.epoch, run.step = int(state["epoch"]), int(state["step"])
            run.captured = bool(state["captured"])
            run.clock = _Clock(self.device, state["seconds"])
            run.records = list(state["records"])

    def _check_config(self, state: Mapping[str, Any]) -> None:
        saved = TrainConfig.from_json(state["config"])
        if differences := saved.differences(self.config):
            found = ", ".join(f"{name} = {getattr(saved, name)}" for name in differences)
            expected = ", ".join(f"{name} = {getattr(self.config, name)}" for name in differences)
            raise TrainError(f"expected {expected} as in results.json, found {found}")

    @contextmanager
    def _fitting(self, path: Path) -> Iterator[None]:
        try:
            yield
        except TrainError as error:
            raise TrainError(f"{path}: {error}") from error
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise TrainError(
                f"{path}: expected the state of a {self.config.model}, found one that does not "
                f"fit: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
