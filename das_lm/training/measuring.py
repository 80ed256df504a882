"""Passes over data that leave training as it is: held-out text, importance, the gradient of a batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, denumpify_detensorize

from das_lm.errors import UserError
from das_lm.measure.held_out import HeldOut, Predictions, held_out_losses
from das_lm.randomness import addressed_seed
from das_lm.signals import check_signals
from das_lm.terminal import is_watched
from das_lm.training.checkpoints import SavingTrainer


class MeasuringTrainer(SavingTrainer):
    """The part of a [`ContinualTrainer`] that measures. Not even the random state changes."""

    @contextmanager
    def private_randomness(self, *address: Any) -> Iterator[None]:
        """Make random draws (dropout) a function of (seed, domain, address), and leave training's alone."""
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(addressed_seed(self.args.seed, self.domain, *address))
            yield

    # ---- held-out data: exact sums over documents ------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """
        Measure the held-out loss per predicted token and the top-1 accuracy of every held-out domain, and what
        `compute_metrics` makes of the predictions.

        Args:
            eval_dataset: as for the trainer, or the name of one that it has; `None` for all of those.

        Raises:
            UserError: there is nothing to measure.
        """
        has = self.eval_dataset
        if has is None if eval_dataset is None else isinstance(eval_dataset, str) and eval_dataset not in (has or ()):
            known = f"; it has {', '.join(has)}" if isinstance(has, dict) else ""
            raise UserError(f"evaluate: the trainer has no {eval_dataset or 'eval_dataset'}{known}; give documents")
        if not isinstance(eval_dataset, str):
            eval_dataset = self.inputs.held_out(eval_dataset)
        with self.private_randomness("evaluate"):
            return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """
        Return logits, labels and measures of held-out data. Of a language model they are those of the predicted tokens
        alone, shape [predictions, vocabulary] and [predictions], in the order of the windows, the longest first; they
        are all in memory, unless `preprocess_logits_for_metrics` makes less of them.

        Args:
            test_dataset: as one `eval_dataset`.
        """
        test_dataset = self.inputs.held_out(test_dataset, "test_dataset")
        if test_dataset is None or isinstance(test_dataset, dict):
            raise UserError("test_dataset: give held-out data of one domain, as an eval_dataset of the trainer")
        with self.private_randomness("evaluate"):
            return super().predict(test_dataset, *args, **kwargs)

    def measure(self, held_out: Mapping[str, Any]) -> dict[str, HeldOut]:
        """Measure the same as [`evaluate`] of data sets by domain, document by document."""
        with self.private_randomness("evaluate"):
            return {
                name: self._losses(self.get_eval_dataloader(one), f"held-out text of {name}")
                for name, one in held_out.items()
            }

    def development_loss(self) -> float:
        """Return the mean, over the domains of `development_dataset` and what is remembered, of the loss on them; of
        what is remembered on rows that nothing was trained on."""
        metrics = self.evaluate(self.development_dataset, metric_key_prefix="development")
        losses = [metrics[f"development_{name}_loss"] for name in self.development_dataset]
        if past := self.remembered.rows_apart() if self.remembered is not None else {}:
            measured = self.measure({name: self.inputs.held_out(rows) for name, rows in past.items()})
            losses += [one.loss for one in measured.values()]
        return float(np.mean(losses))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Take all of it: `dataloader_drop_last` is about training."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Replace the mean of batch means by sums over all predicted tokens of the documents."""
        predictions = Predictions(self.accelerator, self.preprocess_logits_for_metrics)
        if self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only:
            predictions = None
        result = self._losses(dataloader, description, predictions)
        metrics = result.measures(self.criterion.causal)
        logits, labels = predictions.arrays() if predictions else (None, None)
        if predictions and self.compute_metrics:
            own = self.compute_metrics(EvalPrediction(logits, labels))
            if not isinstance(own, Mapping):
                raise UserError(f"compute_metrics: returned {type(own).__name__}; return a dictionary of numbers")
            metrics |= denumpify_detensorize(dict(own))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(logits, labels, metrics, num_samples=len(result.tokens))

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The Trainer's, with `model_init`. The objective is, unless another is given, the mean held-out loss of
        `eval_dataset`. What is searched are arguments that leave the text as it is.

        Raises:
            UserError: the trainer has no `model_init` or no `eval_dataset`, or a trial changes the text.
        """
        if self.model_init is None or self.eval_dataset is None:
            raise UserError(
                "hyperparameter_search: every trial trains a fresh model and measures it: give the trainer a "
                "model_init in place of a model, and an eval_dataset"
            )
        return super().hyperparameter_search(hp_space, compute_objective or _mean_loss, *args, **kwargs)

    def _losses(self, batches: Any, description: str, predictions: Predictions | None = None) -> HeldOut:
        progress = None if self.args.disable_tqdm else description
        model = self._ready_to_measure()
        return held_out_losses(model, self.criterion, batches, self.accelerator, progress, predictions)

    # ---- for methods -----------------------------------------------------------------------------------------------

    @contextmanager
    def reading(self, domains: Mapping[str, Any]) -> Iterator[None]:
        """Let [`importance_batches`] and `train_dataset` be of other rows, as if they were the domain, by its name."""
        before = self.train_dataset, self.domain
        self.train_dataset, (self.domain, *_) = self.inputs.rows_to_train_on(domains), domains
        try:
            yield
        finally:
            self.train_dataset, self.domain = before

    def importance_batches(self, epoch: int, count: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Yield this process's share of `count` blocks (by default `importance_samples`), in batches on the device,
        with the order and masks of an `epoch` (negative: never trained on), behind a progress bar."""
        blocks = self.train_dataset.at(epoch)
        count = blocks.available(self.args.importance_samples if count is None else count)
        mine = range(self.args.process_index, count, self.args.world_size)
        size = self.args.importance_batch_size
        hidden = self.args.disable_tqdm or not self.is_world_process_zero() or not is_watched()
        starts = range(0, len(mine), size)
        for start in tqdm(starts, desc=f"importance ({self.domain})", unit="batch", disable=hidden):
            check_signals()
            batch = self.data_collator([blocks[index] for index in mine[start : start + size]])
            yield {name: value.to(self.args.device) for name, value in batch.items()}

    def figures(self) -> dict[str, float]:
        """What the methods log, summed up where several have a figure of one name (`penalty`)."""
        figures: dict[str, float] = defaultdict(float)
        for method in self.methods:
            for name, value in method.logs().items():
                figures[name] += value
        return figures

    def check_finite(self, tensors: Mapping[str, torch.Tensor], what: str) -> None:
        """See [`Guard.check`]."""
        self.guard.check(tensors, what)

    def gradient_of(self, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return the gradient of the loss on a batch, averaged over processes: one tensor per trainable parameter, in
        the order of `model.parameters()`. `.grad` does not change."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with self.private_randomness("gradient", self.state.global_step), self.accelerator.autocast():
            outputs = self.criterion(model, batch, self.args.chunked_cross_entropy)
            loss = outputs.losses().mean() if outputs.loss is None else outputs.loss
        gradients = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
            )
        ]
        for index, gradient in enumerate(gradients):  # one by one, since each leaves the other copy
            gradients[index] = self.accelerator.reduce(gradient, "mean")
        return gradients


def _mean_loss(metrics: Mapping[str, float]) -> float:
    return float(np.mean([value for name, value in metrics.items() if name.endswith("_loss")]))
