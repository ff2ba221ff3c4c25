"""Averages of a model that Hugging Face's ``Trainer`` trains: :class:`Averaging`.

Example::

    from swa_fast import EMA, SWA
    from swa_fast.integrations.huggingface import Averaging

    trainer = Trainer(model, args, train_dataset=train, eval_dataset=held_out)
    averaging = Averaging({"ema": EMA(0.999), "swa": SWA()}, evaluate="ema").attach(trainer)
    trainer.train()            # or trainer.train(resume_from_checkpoint=True)
    trainer.evaluate()         # the average, as every evaluation during training
    trainer.save_model("out")  # the average
    averaging.save_pretrained("out-swa", "swa")

A loop of one's own with ``accelerate`` needs no callback: an averager is an object that can be
checkpointed, and follows the prepared optimiser through accumulation and skipped steps::

    averager = Averager(accelerator.unwrap_model(model), {"ema": EMA(0.999)})
    attachment = averager.attach(optimizer)
    accelerator.register_for_checkpointing(averager, attachment)
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from swa_fast import EMA, SWA, Averager, Power, Window

from ._put import put

__all__ = ["Averaging", "read_average", "read_state", "write_state"]

_log = logging.getLogger("swa_fast")

TENSORS, DESCRIPTION = "averages.safetensors", "averager.json"
FORMAT = 1
_WRAPPED = ("train", "evaluate", "predict", "save_model")
# Callbacks of others that average: LerobotEMACallback, SWACallback, WeightAveraging.
_AVERAGES_TOO = re.compile(r"EMA|Ema(?![a-z])|SWA|Averag")


def write_state(
    folder: str | os.PathLike[str], state: Mapping[str, Any], extra: Mapping[str, Any]
) -> None:
    """Writes an averager's state into a checkpoint's folder.

    ``averages.safetensors`` holds the tensors as ``AVERAGE/TENSOR`` and, in its metadata, all the
    rest; ``averager.json`` repeats the metadata for people. Both appear at once or not at all, the
    former last, which alone is read.

    Args:
        folder: an existing one.
        state: ``state_dict`` of an Averager.
        extra: plain values beside it.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for average, named in state["averages"].items():
        seen: dict[int, str] = {}
        for name, tensor in named.items():
            key = f"{average}/{name}"
            first = seen.setdefault(id(tensor), key)
            if first == key:
                # Averages keep the strides of their sources; files of this format have none.
                tensors[key] = tensor.detach().contiguous()
            else:
                tied[key] = first
    plain = {key: value for key, value in state.items() if key != "averages"}
    description = {
        "format": FORMAT,
        "rows": list(state["averages"]),
        "tied": tied,
        "state": plain,
        **extra,
    }
    written: list[tuple[Path, Path]] = []
    try:
        for name in (DESCRIPTION, TENSORS):
            temporary = Path(folder) / f".{name}.{uuid.uuid4().hex}"
            written.append((temporary, Path(folder) / name))
            if name == TENSORS:
                save_file(tensors, temporary, {"format": "pt", "averager": json.dumps(description)})
            else:
                temporary.write_text(json.dumps(description, indent=2) + "\n")
        for temporary, final in written:
            os.replace(temporary, final)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)


def read_state(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The averager's state that :func:`write_state` wrote, and what was beside it.

    Raises:
        FileNotFoundError: there is none in the folder.
        ValueError: it is damaged or of another format.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / TENSORS
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected averages ({TENSORS}), found none")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("averager", "")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        description = json.loads(text)
        if description["format"] != FORMAT:
            raise ValueError(f"format: expected {FORMAT}, found {description['format']!r}")
        for key, first in description["tied"].items():
            tensors[key] = tensors[first]
        averages: dict[str, dict[str, Tensor]] = {row: {} for row in description["rows"]}
        for key, tensor in tensors.items():
            row, name = key.split("/", 1)
            averages[row][name] = tensor
        state = {**description.pop("state"), "averages": averages}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected averages of swa_fast, found {error!r}") from error
    return state, description


def read_average(folder: str | os.PathLike[str], name: str | None = None) -> dict[str, Tensor]:
    """One average of a checkpoint, for ``model.load_state_dict(..., strict=False)``.

    Args:
        folder: a checkpoint of a Trainer that :class:`Averaging` was attached to.
        name: of the average; None takes the one that evaluations used, or the first.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_state`.
        KeyError: there is no average of that name.
    """
    state, description = read_state(folder)
    if name is None:
        name = description.get("evaluate") or description["rows"][0]
    if name not in state["averages"]:
        raise KeyError(f"name: expected one of {', '.join(state['averages'])}, found {name!r}")
    average: dict[str, Tensor] = state["averages"][name]
    return average


class Averaging(TrainerCallback):
    """Averages the weights that a ``Trainer`` trains; evaluates, saves and ends with an average.

    * Averages are updated after the optimiser's steps, by a hook of the optimiser: once for a step
      over accumulated gradients, and not at a step that the gradient scaler skipped.
    * ``evaluate`` and ``predict`` see the average, for each of several data sets, and the live
      weights come back after them, also when they raise. Before the first update they see the live
      weights. So ``metric_for_best_model`` and early stopping go by the average.
    * Every ``checkpoint-N`` holds the state of the averages, beside the live weights from which the
      Trainer resumes; ``save_total_limit`` deletes them together.
    * ``train(resume_from_checkpoint=...)`` goes on exactly, bit for bit.
    * When training has ended the model holds the average; with ``load_best_model_at_end`` that of
      the best checkpoint. What was attached stays: another ``train`` starts new averages.

    Args:
        averages: rules by name, as for :class:`swa_fast.Averager`; or one rule, which is then named
            ``average``. Names are without ``/``.
        evaluate: the average that evaluations see and training ends with; True takes the first one,
            False leaves the live weights in place always.
        at_end: put the average into the model when training has ended.
        every, start: update after the optimiser's steps ``start + every``, ``start + 2 every``, ...
        resume: what happens where a checkpoint to resume from holds no averages: ``exact`` raises,
            ``anew`` starts them from its weights, with a warning in the log.
        options: of :class:`swa_fast.Averager`: ``dtype``, ``device``, ``buffers``, ``filter``,
            ``trainable_only`` (for adapters on a frozen or quantised model) and so on.

    Attributes:
        averager: the :class:`swa_fast.Averager` of the last training, or None before.

    Raises:
        ValueError: an argument outside its range.
        TypeError: ``averages`` hold no rules.

    Models that are sharded between processes (FSDP, DeepSpeed) are refused by :meth:`attach`.
    """

    def __init__(
        self,
        averages: Mapping[str, Any] | Any,
        *,
        evaluate: str | bool = True,
        at_end: bool = True,
        every: int = 1,
        start: int = 0,
        resume: str = "exact",
        **options: Any,
    ) -> None:
        named = dict(averages) if isinstance(averages, Mapping) else {"average": averages}
        for name, rule in named.items():
            if "/" in name:
                raise ValueError(f"averages: expected names without '/', found {name!r}")
            if not isinstance(rule, SWA | EMA | Power | Window) and not callable(rule):
                raise TypeError(f"averages[{name!r}]: expected a rule, found {type(rule).__name__}")
        if not named:
            raise ValueError("averages: expected at least one rule, found none")
        if isinstance(evaluate, str) and evaluate not in named:
            raise ValueError(f"evaluate: expected one of {', '.join(named)}, found {evaluate!r}")
        if resume not in ("exact", "anew"):
            raise ValueError(f"resume: expected 'exact' or 'anew', found {resume!r}")
        self._rules, self._options = named, options
        self._evaluate = evaluate if isinstance(evaluate, str) else next(iter(named))
        self._swaps = evaluate is not False
        self._at_end, self._every, self._start, self._resume = at_end, every, start, resume
        self.averager: Averager | None = None
        self._attachment: Any = None
        self._trainer: Any = None
        self._originals: dict[str, Any] = {}
        self._resume_from: str | bool | None = None
        self._checkpoint: str | None = None  # where the Trainer saves at the moment
        self._inside = False
        self._in_place = False  # the model holds what evaluations are to see

    def attach(self, trainer: Trainer) -> Averaging:
        """Adds this callback to a Trainer and wraps its ``train``, ``evaluate``, ``predict`` and
        ``save_model``, the only way to learn when an evaluation begins, what training resumes from
        and where a checkpoint goes. :meth:`detach` undoes it.

        Returns:
            This object.

        Raises:
            RuntimeError: it is attached already.
            ValueError: another callback that averages is there, or the model is sharded.
        """
        if self._trainer is not None:
            raise RuntimeError("attach: this Averaging is attached already; detach() it first")
        for kind in ("fsdp", "deepspeed"):
            if getattr(trainer, f"is_{kind}_enabled", False):
                raise ValueError(
                    "trainer: expected a model that every process holds whole, found "
                    f"{kind}, which shards it"
                )
        for callback in trainer.callback_handler.callbacks:
            if callback is not self and _AVERAGES_TOO.search(type(callback).__name__):
                raise ValueError(
                    "trainer: expected no other callback that averages, found "
                    f"{type(callback).__name__}"
                )
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._trainer = trainer
        wrappers = (self._train, self._on_average, self._on_average, self._save_model)
        for name, wrapper in zip(_WRAPPED, wrappers, strict=True):
            method = getattr(trainer, name)
            # What was on the instance before, by another wrapper, comes back by detach.
            self._originals[name] = trainer.__dict__.get(name)
            setattr(trainer, name, functools.wraps(method)(wrapper(method)))
        return self

    def detach(self) -> None:
        """Undoes :meth:`attach`. The averages stay in ``averager``."""
        if self._trainer is None:
            return
        self._stop()
        for name, original in self._originals.items():
            if original is None:
                delattr(self._trainer, name)
            else:
                setattr(self._trainer, name, original)
        self._originals.clear()
        self._trainer.remove_callback(self)
        self._trainer = None

    def _stop(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    def _train(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def train(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            self._resume_from = resume_from_checkpoint
            try:
                return method(resume_from_checkpoint, *args, **kwargs)
            finally:
                # Also after an error: the optimiser may be used by others.
                self._stop()

        return train

    def _save_model(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def save_model(output_dir: Any = None, *args: Any, **kwargs: Any) -> Any:
            self._checkpoint = output_dir
            return method(output_dir, *args, **kwargs)

        return save_model

    def _on_average(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._applied():
                return method(*args, **kwargs)

        return run

    @contextmanager
    def _applied(self) -> Iterator[None]:
        """The average in the model's place. Within it, as in an ``evaluate`` of several data sets
        which calls itself for each, it does nothing."""
        averager = self.averager
        if self._inside or self._in_place or not self._swaps or averager is None:
            yield
            return
        if averager.n_averaged[self._evaluate] == 0:
            _log.info("the average %r has seen no update: evaluating the model", self._evaluate)
            yield
            return
        self._inside = True
        try:
            with averager.applied(self._evaluate):
                yield
        finally:
            self._inside = False

    def save_pretrained(
        self, folder: str | os.PathLike[str], name: str | None = None, **options: Any
    ) -> None:
        """Saves an average as a model for ``from_pretrained``, in the model's dtype.

        Args:
            folder: where to.
            name: of the average; None takes the one that evaluations see.
            options: of the model's ``save_pretrained``.

        Raises:
            RuntimeError: nothing was averaged yet.
            KeyError: there is no average of that name.
            TypeError: the model has no ``save_pretrained``.
        """
        if self.averager is None:
            raise RuntimeError("save_pretrained: nothing has been averaged yet")
        model = self._model()
        if not hasattr(model, "save_pretrained"):
            raise TypeError(
                f"save_pretrained: expected a PreTrainedModel, found {type(model).__name__}"
            )
        options.setdefault("is_main_process", self._trainer.args.should_save)
        name = self._evaluate if name is None else name
        if self._in_place and name == self._evaluate:
            model.save_pretrained(folder, **options)
            return
        with self.averager.applied(name):
            model.save_pretrained(folder, **options)

    def _model(self) -> Any:
        if self._trainer is None:
            raise RuntimeError("Averaging: not attached to a trainer")
        return self._trainer.accelerator.unwrap_model(self._trainer.model, keep_torch_compile=False)

    # The Trainer's events, in the order of a training.

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any
    ) -> None:
        """Makes the averages, of the model as it was placed and loaded. Also when the Trainer
        starts again with a smaller batch."""
        if self._trainer is None:
            raise RuntimeError("Averaging: call attach(trainer), which adds the callback by itself")
        self._stop()
        self.averager, self._in_place = None, False
        averager = Averager(model, self._rules, **self._options)
        attachment = averager.attach(optimizer, every=self._every, start=self._start)
        try:
            self._resume_into(averager, attachment, args, state)
        except BaseException:
            attachment.remove()
            raise
        self.averager, self._attachment = averager, attachment

    def _resume_into(self, averager: Averager, attachment: Any, args: Any, state: Any) -> None:
        folder = self._resume_from
        if folder is True:
            folder = get_last_checkpoint(args.output_dir)
        if not folder:
            return
        try:
            saved, beside = read_state(str(folder))
        except FileNotFoundError as error:
            if self._resume == "anew":
                _log.warning("%s; averages start anew at step %s", error, state.global_step)
                return
            raise ValueError(
                f"resume_from_checkpoint: {error}; resume from another checkpoint, or start the "
                "averages anew from its weights with Averaging(..., resume='anew')"
            ) from error
        if beside.get("global_step") != state.global_step:
            raise ValueError(
                f"{folder}: expected averages of step {state.global_step}, found those of step "
                f"{beside.get('global_step')}"
            )
        averager.load_state_dict(saved)
        attachment.load_state_dict(beside["attachment"])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Writes the averages beside the checkpoint that the Trainer has just written."""
        if self.averager is None or self._attachment is None:
            return
        # On every process, because it may wait for others where the averages are on a device.
        averages = self.averager.state_dict()
        extra = {
            "attachment": self._attachment.state_dict(),
            "evaluate": self._evaluate if self._swaps else None,
            "global_step": state.global_step,
        }
        if args.should_save:
            folder = self._checkpoint
            if folder is None or not Path(folder).name.endswith(f"-{state.global_step}"):
                folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            write_state(folder, averages, extra)
        # Another process may read them next, if this checkpoint is the best and the last.
        self._trainer.accelerator.wait_for_everyone()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Puts the average into the model: the last, or that of the best checkpoint, whose live
        weights the Trainer has just loaded."""
        self._stop()
        if self.averager is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            try:
                saved, _beside = read_state(state.best_model_checkpoint)
                self.averager.load_state_dict(saved)
            except (FileNotFoundError, ValueError) as error:
                _log.warning("%s; the model keeps the best checkpoint's weights", error)
                self._in_place = True
                return
        if not (self._swaps and self._at_end):
            return
        if self.averager.n_averaged[self._evaluate] == 0:
            _log.warning("the average %r has seen no update: the model stays", self._evaluate)
            return
        model = self._trainer.model
        with self.averager.applied(self._evaluate):
            values = [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]
        put(model, values)
        self._in_place = True
