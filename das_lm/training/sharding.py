"""Training under FSDP2, where every process has a slice of each parameter: what the Trainer and accelerate leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer

from das_lm.errors import UserError
from das_lm.units.sharding import is_sharded, tied_beyond


class ShardedTraining(Trainer):
    """The part of a [`ContinualTrainer`] that shards its model, and saves it whole; without FSDP it does nothing."""

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are slices, or will be as soon as the model is prepared."""
        return self.is_fsdp_enabled or is_sharded(self.model)

    def _check_sharding(self) -> None:
        """Raises `UserError` for what slices do not go with; names the layers that accelerate is to shard."""
        if self.has_adapter:
            raise UserError("fsdp: not tested with an adapter, whose few parameters plain DDP trains as well; use DDP")
        if self.args.chunked_cross_entropy:
            raise UserError("chunked_cross_entropy: under fsdp the head's weights are gone by then; leave it off")
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
                raise UserError("fsdp: cpu_offload is not supported, the masks' memory would have to move too")
            if self.units is not None and plugin.transformer_cls_names_to_wrap is None:
                # transformers' own list has RoBERTa's embeddings in it, which it ties to the LM head.
                plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in self.units.layers})

    @contextmanager
    def _ties_in_one_group(self) -> Iterator[None]:
        """accelerate shards embeddings and LM head as a group of their own, which FSDP2 refuses where other modules
        have a part in them, as in the LM heads of BERT and RoBERTa. Where it does not see them, they stay with the
        rest of the model."""
        hidden = []
        if self.is_fsdp_enabled and self.units is not None and not is_sharded(self.model):
            model = self.units.model
            if tied_beyond(model, (model.get_input_embeddings(), model.get_output_embeddings())):
                hidden = ["get_input_embeddings", "get_output_embeddings"]
        for name in hidden:
            setattr(model, name, lambda: None)
        try:
            yield
        finally:
            for name in hidden:
                delattr(model, name)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer shards here, and hands the slices to the optimizer."""
        was_sharded = self.is_fsdp_enabled and is_sharded(self.model)
        with self._ties_in_one_group():
            prepared = super()._prepare_for_training(*args, **kwargs)
        if was_sharded:
            # accelerate finds the optimizer's parameters anew by their memory, which empty slices have none of.
            for group, parameters in zip(self.optimizer.param_groups, self._parameter_groups, strict=True):
                group["params"] = parameters
        return prepared

    def _ready_to_measure(self) -> nn.Module:
        """The model, sharded if that is how it will be trained: it may not fit into one process."""
        if self.is_fsdp_enabled and not is_sharded(self.model):
            with self._ties_in_one_group():
                fsdp2_prepare_model(self.accelerator, self.model)
        return self.model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A plain transformers directory with whole weights; under FSDP2 too, whatever the `state_dict_type`, with
        one of which the Trainer would write no weights at all."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir or self.args.output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
