"""The two training runs of the paper's comparison, epoch by epoch, and their continuation.

Randomness: initial weights, the order, crops and flips of an epoch, and whatever the network itself
draws are functions of the seed and the epoch number alone (:func:`derive_seed`). So the SGD run and
the SWA run start from the same weights and see the same batches, and a continued run needs no saved
generator: its weights, averages and records are those of an uninterrupted one, bit by bit, on the
same machine with the same software.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import swa_fast
from swa_fast import AveragedModel, update_bn

from ..schedules import paper_lr, paper_swa_lr
from .config import TrainConfig
from .data import Dataset, TrainBatches, eval_batches, load_digits, load_images
from .errors import TrainError, import_extra
from .models import build_model
from .progress import Progress
from .report import draw_curves, summarise
from .state import RunFolder

__all__ = ["Run", "Trainer", "derive_seed", "run"]

#: The runs, in order, by the name in files and records.
METHODS = ("sgd", "swa")

_EVAL_BATCH = 512

Record = dict[str, Any]


def derive_seed(seed: int, purpose: str, epoch: int = 0) -> int:
    """A seed in [0, 2^63) for one purpose ("init", "train", "augment", "bn") in one epoch.

    The first 8 bytes of SHA-256 over "seed/purpose/epoch", without the top bit: neighbouring seeds
    and epochs give unrelated streams.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass
class Run:
    """State of one of the two runs after ``epoch`` finished epochs."""

    method: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    averaged: AveragedModel | None
    scaler: torch.amp.GradScaler
    epoch: int = 0
    records: list[Record] = field(default_factory=list)


class Trainer:
    """Trains networks on a dataset by the recipe of a configuration.

    Sets torch's global random state in :meth:`start` and :meth:`train_epoch`.

    Args:
        config: the settings.
        dataset: the images; they are copied to the device as bytes.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        self.config = config
        self.device = torch.device(config.device)
        self._classes = len(dataset.classes)
        self._channels = dataset.train_images.shape[1]
        self.batches = TrainBatches(
            dataset,
            batch_size=config.batch_size,
            device=self.device,
            channels_last=config.channels_last,
        )
        self._test_batches = eval_batches(
            dataset,
            batch_size=_EVAL_BATCH,
            device=self.device,
            channels_last=config.channels_last,
        )

    def start(self, method: str) -> Run:
        """A run before its first epoch; both methods get the same weights."""
        config = self.config
        torch.manual_seed(derive_seed(config.seed, "init"))
        model = build_model(
            config.model,
            in_channels=self._channels,
            num_classes=self._classes,
            width=config.width,
        ).to(self.device)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )
        averaged = self._new_average(model) if method == "swa" else None
        scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        return Run(method, model, optimizer, averaged, scaler)

    def _new_average(self, model: nn.Module) -> AveragedModel:
        if self.config.backend is None:
            return AveragedModel(model)
        return AveragedModel(model, backend=self.config.backend)

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
            self._new_average(probe).update_parameters(probe)
            backend: str = swa_fast.choose_backend(self.device.type, self.config.backend)
            return backend
        except (RuntimeError, ValueError, TypeError) as error:
            raise TrainError(f"--backend: {error}") from error

    def learning_rate(self, method: str, epoch: int) -> float:
        """The rate of the epoch that follows ``epoch`` finished ones."""
        config = self.config
        if method == "sgd":
            return paper_lr(epoch, lr=config.lr, total=config.epochs, final_lr=0.01 * config.lr)
        return paper_swa_lr(epoch, lr=config.lr, swa_lr=config.swa_lr, start=config.swa_start_epoch)

    def train_epoch(self, run: Run, step: Callable[[], None] = lambda: None) -> Record:
        """One epoch of a run: training, capture, BatchNorm pass of the average, evaluation.

        Args:
            run: its state; advanced by an epoch, and the record appended.
            step: called after every training step.

        Raises:
            TrainError: a loss is not finite. The run must then be given up.
        """
        config = self.config
        epoch = run.epoch
        seconds = {"train": 0.0, "average": 0.0, "bn": 0.0, "eval": 0.0}
        rate = self.learning_rate(run.method, epoch)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(derive_seed(config.seed, "train", epoch))

        with self._phase(seconds, "train"):
            train_loss, train_accuracy = self._train(run, epoch, step)
        record: Record = {
            "method": run.method,
            "epoch": epoch + 1,
            "lr": rate,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": None,
            "test_accuracy": None,
            "captures": 0,
            "swa_test_loss": None,
            "swa_test_accuracy": None,
            "seconds": seconds,
        }
        averaging = run.averaged is not None and epoch + 1 >= config.swa_start_epoch
        if run.averaged is not None and averaging:
            with self._phase(seconds, "average"):
                run.averaged.update_parameters(run.model)
            record["captures"] = epoch + 2 - config.swa_start_epoch
        if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
            with self._phase(seconds, "eval"):
                record["test_loss"], record["test_accuracy"] = self.evaluate(run.model)
            if run.averaged is not None and averaging:
                with self._phase(seconds, "bn"), self._autocast():
                    seed = derive_seed(config.seed, "bn", epoch)
                    update_bn((images for images, _ in self.batches.epoch(seed)), run.averaged)
                with self._phase(seconds, "eval"):
                    record["swa_test_loss"], record["swa_test_accuracy"] = self.evaluate(
                        run.averaged
                    )
        for name in ("train_loss", "test_loss", "swa_test_loss"):
            if record[name] is not None and not math.isfinite(record[name]):
                raise TrainError(
                    f"{run.method} run, epoch {epoch + 1}: expected a finite {name}, found "
                    f"{record[name]}; the training diverged, try a lower --lr or --swa-lr"
                )
        run.epoch += 1
        run.records.append(record)
        return record

    def _train(self, run: Run, epoch: int, step: Callable[[], None]) -> tuple[float, float]:
        run.model.train()
        # Sums stay on the device: reading them at every step would make the host wait.
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        seed = derive_seed(self.config.seed, "augment", epoch)
        for images, labels in self.batches.epoch(seed):
            with self._autocast():
                logits = run.model(images)
            loss = F.cross_entropy(logits.float(), labels)
            run.optimizer.zero_grad(set_to_none=True)
            run.scaler.scale(loss).backward()
            run.scaler.step(run.optimizer)
            run.scaler.update()
            loss_sum += loss.detach() * len(labels)
            correct += (logits.argmax(1) == labels).sum()
            step()
        count = self.batches.images
        return loss_sum.item() / count, 100 * correct.item() / count

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Mean cross-entropy (nats) and accuracy (percent) on the test set, in evaluation mode."""
        model.eval()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        count = 0
        for images, labels in self._test_batches():
            with self._autocast():
                logits = model(images)
            loss_sum += F.cross_entropy(logits.float(), labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
            count += len(labels)
        return loss_sum.item() / count, 100 * correct.item() / count

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = torch.float16 if self.config.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.config.amp != "none")

    @contextmanager
    def _phase(self, seconds: dict[str, float], name: str) -> Iterator[None]:
        """Adds the time of its body to ``seconds[name]``, the device's work included."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds[name] += time.perf_counter() - start

    def state(self, run: Run) -> dict[str, Any]:
        """Everything from which :meth:`restore` continues the run."""
        return {
            "config": self.config.to_json(),
            "epoch": run.epoch,
            "records": run.records,
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "averaged": None if run.averaged is None else run.averaged.state_dict(),
            "scaler": run.scaler.state_dict(),
        }

    def restore(self, run: Run, state: dict[str, Any], path: Path) -> None:
        """Puts a run made by :meth:`start` into a saved state.

        Args:
            run: its weights, optimiser, average and records are replaced.
            state: as :meth:`state` gave it.
            path: the file it came from, for messages.

        Raises:
            TrainError: the state is of other settings or does not fit the network.
        """
        try:
            saved = TrainConfig.from_json(state["config"])
            if differences := saved.differences(self.config):
                found = ", ".join(f"{name} = {getattr(saved, name)}" for name in differences)
                expected = ", ".join(
                    f"{name} = {getattr(self.config, name)}" for name in differences
                )
                raise TrainError(f"expected {expected} as in results.json, found {found}")
            if not 0 < state["epoch"] == len(state["records"]) <= self.config.epochs:
                raise TrainError(
                    f"expected a record for each of {self.config.epochs} epochs at most, found "
                    f"epoch {state['epoch']} and {len(state['records'])} records"
                )
            run.model.load_state_dict(state["model"])
            run.optimizer.load_state_dict(state["optimizer"])
            run.scaler.load_state_dict(state["scaler"])
            if run.averaged is not None:
                run.averaged.load_state_dict(state["averaged"])
        except TrainError as error:
            raise TrainError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise TrainError(
                f"{path}: expected the state of a {self.config.model}, found one that does not "
                f"fit: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        run.epoch = state["epoch"]
        run.records = list(state["records"])


def load_dataset(config: TrainConfig, progress: Progress) -> Dataset:
    """The dataset that a configuration names.

    Raises:
        TrainError: as the loaders.
    """
    if config.dataset == "digits":
        return load_digits()
    assert config.data_dir is not None
    return load_images(
        config.data_dir, config.image_size, threads=config.threads, progress=progress.over
    )


def environment(config: TrainConfig) -> dict[str, Any]:
    """Versions and hardware that a result depends on, as JSON values."""
    device = torch.device(config.device)
    return {
        "swa_fast": swa_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": config.threads,
        "git_commit": _git_commit(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the checkout that swa_fast runs from; None for an installed copy."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", os.fspath(checkout), "rev-parse", "--verify", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def run(
    config: TrainConfig,
    folder: RunFolder,
    progress: Progress,
    previous: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains by plain SGD, then with SWA, and leaves the files of :class:`RunFolder`.

    Torch's global random state is overwritten; its number of threads is restored.

    Args:
        config: the settings.
        folder: an existing folder. A new run replaces the one it may hold, once everything is
            known to be in order.
        progress: where progress is shown.
        previous: content of results.json of the run to continue; None starts a new one.

    Returns:
        The content of results.json.

    Raises:
        TrainError: the data or the checkpoints cannot be used, or the training diverged.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        # Fixed algorithms: the autotuner may choose others in a process that continues a run.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            return _run(config, folder, progress, previous)
    finally:
        progress.stop()
        torch.set_num_threads(threads)


def _run(
    config: TrainConfig,
    folder: RunFolder,
    progress: Progress,
    previous: dict[str, Any] | None,
) -> dict[str, Any]:
    import_extra("matplotlib.figure")  # needed only at the end, which is late to miss it
    dataset = load_dataset(config, progress)
    results: dict[str, Any] = {
        "status": "running",
        "config": config.to_json(),
        "environment": environment(config),
        "data": dataset.to_json(),
        "records": [],
        "summary": [],
    }
    if previous is not None:
        _compare(previous, results, progress, folder)
        results["environment"] = previous["environment"]
        results["records"] = previous["records"]
    progress.say(
        f"{config.dataset}: {len(dataset.train_images)} training and {len(dataset.test_images)} "
        f"test images of {len(dataset.classes)} classes"
        + (f"; {dataset.skipped_files} other files skipped" if dataset.skipped_files else "")
    )
    trainer = Trainer(config, dataset)
    results["environment"]["averaging_backend"] = trainer.check_backend()
    if previous is None:
        folder.clear()
    runs = [_prepare(trainer, folder, method, results["records"]) for method in METHODS]
    progress.say(
        f"{config.model}: {sum(p.numel() for p in runs[0].model.parameters()):,} parameters, "
        f"on {config.device}"
    )
    folder.write_results(results)

    for current in runs:
        progress.start(
            current.method.upper(),
            epochs=config.epochs,
            steps=len(trainer.batches),
            done=current.epoch,
        )
        while current.epoch < config.epochs:
            record = trainer.train_epoch(current, progress.step)
            folder.save_checkpoint(current.method, trainer.state(current))
            results["records"] = [record for each in runs for record in each.records]
            folder.write_results(results)
            progress.epoch(record)
        progress.stop()
        final = current.model if current.averaged is None else current.averaged.module
        folder.save_model(current.method, final.state_dict())

    results["records"] = [record for each in runs for record in each.records]
    results["summary"] = summarise(results["records"])
    draw_curves(results, folder.file("curves.png"))
    results["status"] = "complete"
    folder.write_results(results)
    return results


def _prepare(trainer: Trainer, folder: RunFolder, method: str, records: list[Record]) -> Run:
    """A new run, or the one on disk."""
    run = trainer.start(method)
    path = folder.file(f"{method}.pt")
    state = folder.load_checkpoint(method, trainer.device)
    if state is not None:
        trainer.restore(run, state, path)
    # A checkpoint is written before its record is listed, so it can only be ahead.
    listed = sum(record["method"] == method for record in records)
    if run.epoch < listed:
        raise TrainError(
            f"{path}: expected a state after epoch {listed} or later, as results.json lists, "
            f"found {'no file' if state is None else f'epoch {run.epoch}'}"
        )
    return run


def _compare(
    previous: dict[str, Any], current: dict[str, Any], progress: Progress, folder: RunFolder
) -> None:
    """Refuses other data; mentions other software or hardware."""
    if previous["data"] != current["data"]:
        changed = [
            key for key in current["data"] if previous["data"].get(key) != current["data"][key]
        ]
        raise TrainError(
            f"{folder.file('results.json')}: expected the data that the run began with, found "
            f"other {', '.join(changed)}"
        )
    for key, value in current["environment"].items():
        before = previous["environment"].get(key)
        if before != value:
            progress.say(
                f"note: {key} was {before} when the run began and is {value} now; results may "
                f"differ from those of an uninterrupted run"
            )
