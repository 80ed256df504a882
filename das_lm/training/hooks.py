"""The Trainer's callback that calls the methods' hooks at the ends of a domain, and stops a run that got a signal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from das_lm.signals import Interrupted, Signals, check_signals

if TYPE_CHECKING:
    from das_lm.training.trainer import ContinualTrainer


class Hooks(TrainerCallback):
    """
    Comes before all other callbacks of a trainer, which so see the masked step.

    Args:
        trainer: whose methods are called.
    """

    def __init__(self, trainer: ContinualTrainer):
        self.trainer, self.signals = trainer, Signals()

    def begin(self) -> Signals:
        """A run begins: the signals to listen to while it trains."""
        self.signals = Signals()
        return self.signals

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.guard.since = state.global_step
        self.is_stopping = False
        self.trainer.call_hook("take_slices")
        self.trainer.call_hook("begin_domain")
        self.signals.postponed = args.save_strategy != SaveStrategy.NO

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.before_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.after_step()

    def on_step_end(self, args, state, control, **kwargs):
        if self._stops():
            self.is_stopping = control.should_save = True
        check_signals()

    on_evaluate = on_step_end  # it may have taken long

    def on_save(self, args, state, control, **kwargs):
        if self.is_stopping:
            saved = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            raise Interrupted(self.signals.received, f"'{self.trainer.domain}' is saved as {saved}")

    def on_train_end(self, args, state, control, **kwargs):
        self.signals.stop()  # what follows is done again
        self.trainer.guard.check_weights()
        self.trainer.call_hook("finish_weights")
        self.trainer.call_hook("end_domain")

    def _stops(self) -> bool:
        """Whether a signal has come, to whichever process, while it is postponed."""
        signals, trainer = self.signals, self.trainer
        if signals.postponed and trainer.args.world_size > 1:
            received = torch.tensor([signals.received or 0], device=trainer.args.device)
            signals.received = int(trainer.accelerator.gather(received).max()) or None
        return signals.postponed and signals.received is not None
