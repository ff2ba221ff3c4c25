"""Averages of a model that Lightning trains: its own two callbacks, made fast and safe.

Example::

    from swa_fast import SWA
    from swa_fast.integrations.lightning import EMAWeightAveraging, WeightAveraging

    trainer = Trainer(max_epochs=10, callbacks=EMAWeightAveraging(decay=0.999))
    trainer.fit(model, loader)  # validates the average, checkpoints hold both, ends with it

    # The SWA of the paper: equal weights, and BatchNorm statistics of the average from 50 batches.
    swa = WeightAveraging(rule=SWA(), update_bn=50)
    trainer = Trainer(max_epochs=10, callbacks=swa)
    trainer.fit(model, loader)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch import callbacks as stock
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import swa_fast

from ._put import put

__all__ = ["EMAWeightAveraging", "WeightAveraging"]

_log = logging.getLogger("swa_fast")

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


class WeightAveraging(stock.WeightAveraging):
    """Lightning's callback of this name, on a :class:`swa_fast.AveragedModel`.

    Its arguments, its ``should_update``, and the keys of its checkpoints are the same, so that
    either continues from the other's: ``state_dict`` is the average, ``current_model_state`` the
    live weights and ``averaging_state`` the count. Where it differs, on purpose:

    * the live weights come back after a validation that raises or is interrupted, and a checkpoint
      that is written during a validation holds what belongs under each key;
    * an average that has seen no update is not used: validation and checkpoints go by the live
      weights, which training ends with, instead of those that it started from;
    * a step that the gradient scaler skipped is not averaged;
    * the average is moved to the device of the training, where ``device`` is None;
    * ``latest_update_epoch`` is saved, too;
    * ``validate`` outside of ``fit`` sees the model as it is.

    Args:
        device: where the average lives; None keeps it beside the model.
        use_buffers: average the buffers, too, instead of copying the last ones; None does, unless
            ``update_bn`` is given, which replaces those that matter.
        update_bn: re-estimate BatchNorm statistics of the average before each validation and at the
            end of training, by :func:`swa_fast.update_bn` over this many training batches, or all
            with True. No epoch is added to training, whose random numbers are left alone.
        bn_loader: batches for that, or a function that returns them; None iterates the training's
            ``DataLoader`` anew.
        bn_call: ``bn_call(model, batch)`` runs the forward on a batch; None calls the model on the
            first element of a batch that is a tuple or list, and on any other as it is.
        kwargs: of :class:`swa_fast.AveragedModel`: ``avg_fn``, ``multi_avg_fn``, or ``rule``, an
            ``SWA``, ``EMA`` or ``Power``; ``dtype``; ``backend``.

    Raises:
        ValueError: ``update_bn`` below 0, with ``use_buffers=True``, or without anything to read.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool | None = None,
        *,
        update_bn: int | bool = False,
        bn_loader: Batches | None = None,
        bn_call: Callable[[Any, Any], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(update_bn, int) or update_bn < 0:
            raise ValueError(f"update_bn: expected a number of batches, found {update_bn!r}")
        if update_bn and use_buffers:
            raise ValueError(
                "update_bn: expected use_buffers=False or None, since averaged statistics would "
                "mix with re-estimated ones; found use_buffers=True"
            )
        super().__init__(
            device=device,
            use_buffers=not update_bn if use_buffers is None else use_buffers,
            **kwargs,
        )
        self._update_bn, self._bn_loader, self._bn_call = update_bn, bn_loader, bn_call
        self._average_model: swa_fast.AveragedModel | None = None
        self._context: AbstractContextManager[None] | None = None  # entered during a validation
        self._hooks: list[Any] = []
        self._stepped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the average, of the module after ``configure_model``."""
        if stage != "fit":
            return
        if type(pl_module).configure_model is not LightningModule.configure_model:
            _log.warning("WeightAveraging: layers that configure_model shards are averaged whole")
            pl_module.configure_model()
        self._average_model = swa_fast.AveragedModel(
            pl_module,
            device=self._device or pl_module.device,
            use_buffers=self._use_buffers,
            **self._kwargs,
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the average to where the strategy has moved the module since."""
        assert self._average_model is not None
        if self._device is None:
            self._average_model.to(pl_module.device)
        if (
            self._update_bn
            and self._bn_call is None
            and type(pl_module).forward is LightningModule.forward
        ):
            raise ValueError(
                "update_bn: expected a module with a forward, or bn_call=; found neither"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follows the optimisers, which alone know whether a step took place."""
        self._release()
        self._hooks = [o.register_step_post_hook(self._after_step) for o in trainer.optimizers]
        if self._update_bn and self._bn_loader is None:
            self._training_loader(trainer)

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        # There while a fused optimiser skips a step by itself.
        found_inf = getattr(optimizer, "found_inf", None)
        self._stepped = self._stepped or found_inf is None or not bool(found_inf)

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Updates the average after a step of the optimiser, if ``should_update`` says so."""
        stepped, self._stepped = self._stepped or not self._hooks, False
        if stepped:
            super().on_train_batch_end(trainer, pl_module, *args)

    def _has_average(self) -> bool:
        average = self._average_model
        return average is not None and int(average.n_averaged) > 0

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the average into the module, with BatchNorm statistics of its own."""
        if trainer.state.fn != "fit":
            return
        self._swap_models(pl_module)
        if self._context is not None and self._update_bn and not trainer.sanity_checking:
            try:
                self._reestimate(trainer, pl_module)
            except BaseException:
                self._leave()
                raise

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the live weights back."""
        if trainer.state.fn == "fit":
            self._swap_models(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Puts the live weights back where a validation was interrupted."""
        self._leave()
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Follows the optimisers no more."""
        self._leave()
        self._release()

    # By the names of Lightning's methods, which classes derived from its callback follow.

    def _swap_models(self, pl_module: LightningModule) -> None:
        if self._context is not None:
            self._leave()
        elif self._has_average():
            self._enter(pl_module)

    def _copy_average_to_current(self, pl_module: LightningModule) -> None:
        if not self._has_average():
            _log.warning("WeightAveraging: nothing was averaged; the module keeps its weights")
            return
        assert self._average_model is not None
        with torch.inference_mode(False):
            # In the order of the module's own tensors, whatever the average's devices and dtypes.
            with self._average_model.applied(pl_module):
                tensors = (*pl_module.parameters(), *pl_module.buffers())
                values = [tensor.detach().clone() for tensor in tensors]
            put(pl_module, values)

    def _enter(self, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        self._leave()
        context = self._average_model.applied(pl_module)
        # Lightning validates in inference mode, in which a module's tensors could not be replaced.
        with torch.inference_mode(False):
            context.__enter__()
        self._context = context

    def _leave(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            with torch.inference_mode(False):
                context.__exit__(None, None, None)

    def _training_loader(self, trainer: Trainer) -> DataLoader[Any]:
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader):
            raise ValueError(
                f"update_bn: expected one DataLoader for training, found {type(loader).__name__}; "
                "give bn_loader="
            )
        if loader.persistent_workers:
            # A second iterator would end the one that training reads.
            raise ValueError(
                "update_bn: expected a DataLoader without persistent_workers; give bn_loader="
            )
        return loader

    def _reestimate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """BatchNorm statistics of the average, which is applied, into it and into the module."""
        source = self._training_loader(trainer) if self._bn_loader is None else self._bn_loader
        loader: Iterable[Any] = source() if callable(source) else source

        def batches() -> Iterator[Any]:
            for batch in loader:
                yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)

        with isolate_rng(), torch.inference_mode(False), trainer.precision_plugin.forward_context():
            swa_fast.update_bn(
                batches(),
                pl_module,
                max_batches=None if self._update_bn is True else int(self._update_bn),
                call=self._bn_call,
                group=True if trainer.world_size > 1 else None,
            )
            assert self._average_model is not None
            average = dict(self._average_model.module.named_modules())
            with torch.no_grad():
                for name, layer in pl_module.named_modules():
                    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                        for kind, buffer in layer.named_buffers(recurse=False):
                            average[name].get_buffer(kind).copy_(buffer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends training with the average in the module."""
        self._release()
        if self._update_bn and self._has_average():
            self._enter(pl_module)
            try:
                self._reestimate(trainer, pl_module)
            finally:
                self._leave()
        self._copy_average_to_current(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The steps and epochs of the last updates."""
        return {**super().state_dict(), "latest_update_epoch": self._latest_update_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a :meth:`state_dict`, also of Lightning's callback."""
        super().load_state_dict(state_dict)
        self._latest_update_epoch = state_dict.get("latest_update_epoch", -1)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Splits the checkpoint into average, live weights and count."""
        if self._context is not None:
            # What Lightning has just collected is the average.
            self._leave()
            try:
                live = {name: value.clone() for name, value in pl_module.state_dict().items()}
            finally:
                self._enter(pl_module)
            checkpoint["state_dict"] = live
        live = checkpoint["state_dict"]
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        rule = self._kwargs.get("rule")
        copies_first = rule is None or rule.weight(0) == 1.0
        if self._average_model is not None and not self._has_average() and copies_first:
            # The first update will overwrite it, and until then it is what the run started from.
            checkpoint["state_dict"] = dict(live)


class EMAWeightAveraging(WeightAveraging):
    """Lightning's callback of this name: an exponential average, see :class:`WeightAveraging`.

    Args:
        device: as there.
        use_buffers: as there.
        decay: in [0, 1]; :math:`a \\leftarrow d\\,a + (1-d)\\,b`, and the first update copies.
        update_every_n_steps: update after steps, counted from 0, that it divides; 0 does not.
        update_starting_at_step: and that are not before this one.
        update_starting_at_epoch: update also at the ends of epochs, from this one on.
        kwargs: of :class:`WeightAveraging`.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool | None = None,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(device, use_buffers, avg_fn=swa_fast.get_ema_avg_fn(decay), **kwargs)
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update after a step or an epoch, both counted from 0."""
        if step_idx is not None:
            every, first = self.update_every_n_steps, self.update_starting_at_step or 0
            if every > 0 and step_idx >= first and step_idx % every == 0:
                return True
        first_epoch = self.update_starting_at_epoch
        return epoch_idx is not None and first_epoch is not None and epoch_idx >= first_epoch
