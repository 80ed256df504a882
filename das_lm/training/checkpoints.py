"""What a trainer writes: plain transformers directories, whole or absent, with nothing that has to be unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from das_lm import __version__
from das_lm.files import rotate_checkpoints, seal, share, write_json, write_tensors
from das_lm.methods import files_with_training_text
from das_lm.training.resuming import save_place
from das_lm.training.sharding import ShardedTraining
from das_lm.training.tokens_seen import STATE_NAME
from das_lm.units.sharding import is_sharded, whole_state_dict

if TYPE_CHECKING:
    from das_lm.training.trainer import ContinualTrainer


def continual_state(trainer: ContinualTrainer) -> dict[str, Any]:
    """Return what was learned how: for people, and for the next domain."""
    return {
        "version": 1,
        "das_lm": __version__,
        "domain": trainer.domain,
        "methods": [type(method).__name__ for method in trainer.methods],
        "step": trainer.state.global_step,
        **trainer.tokens_seen.state(),
        **{name: value for method in trainer.methods for name, value in method.state().items()},
    }


def save(trainer: ContinualTrainer, directory: Path, state_dict: dict | None) -> None:
    """Write the model, whole, with its tokenizer and the methods' state beside it. All processes take part."""
    writes, card = trainer.args.should_save, directory / "README.md"
    had_card = card.is_file()
    if state_dict is None and is_sharded(trainer.model):
        state_dict = whole_state_dict(trainer.model)
    if writes:
        directory.mkdir(parents=True, exist_ok=True)
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        if isinstance(model, PreTrainedModel | PeftModel):
            model.save_pretrained(directory, state_dict=state_dict)
        else:
            write_tensors(directory / SAFE_WEIGHTS_NAME, state_dict or model.state_dict(), {"format": "pt"})
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(directory)
        if trainer.has_adapter and not had_card:
            card.unlink()  # PEFT's draft
    for method in trainer.methods:
        method.save(directory)
    state = continual_state(trainer)
    if writes:
        for path in directory.glob("*.safetensors"):
            share(path)
        write_json(directory / STATE_NAME, state)


class SavingTrainer(ShardedTraining):
    """The part of a [`ContinualTrainer`] that writes checkpoints, and pushes models to a hub."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """In place of the Trainer's, which writes `training_args.bin`: a pickle with the token in it."""
        save(self, Path(output_dir or self.args.output_dir), state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint, sealed by a manifest; older ones are removed only after that."""
        self.guard.check_weights()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            run_directory, step = Path(self._get_output_dir(trial)), self.state.global_step
            checkpoint = run_directory / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            save_place(self, checkpoint)
            seal(checkpoint)
            rotate_checkpoints(run_directory, step, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # where one process ends, launchers end the others, sealed or not

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The Trainer's, with the same arguments, but for the files in which methods keep training text: they stay
        here."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{"model_name": self.hub_model_id.split("/")[-1], **kwargs})
        return HfApi(library_name="das-lm", library_version=__version__).upload_folder(
            repo_id=self.hub_model_id,
            folder_path=self.args.output_dir,
            commit_message=commit_message,
            token=token,
            run_as_future=not blocking,
            ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*", *files_with_training_text(self.methods)],
            revision=revision or self.args.hub_revision,
        )

    def create_model_card(self, tags: str | list[str] | None = None, **kwargs: Any) -> None:
        """The Trainer's draft of a card, with the tags that the cards of a walk have."""
        given = [tags] if isinstance(tags, str) else tags or []
        super().create_model_card(tags=[*given, "das-lm", "continual-pretraining"], **kwargs)
