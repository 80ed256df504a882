"""The trainers beside those that learn a stage: one that only measures, and one of a new LM head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from das_lm.data.blocks import TrainingBlocks
from das_lm.data.masking import labeling
from das_lm.errors import UserError
from das_lm.model import adapters
from das_lm.model.loading import head_parameters, is_causal
from das_lm.training.inputs import data_seed
from das_lm.training.trainer import ContinualTrainer

if TYPE_CHECKING:
    from das_lm.run.recipe import Recipe


def measuring_trainer(model: Any, recipe: Recipe, tokenizer: Any, directory: str) -> ContinualTrainer:
    """A trainer that only measures a model."""
    args = recipe.training_arguments(None, directory)
    args.push_to_hub, args.eval_strategy = False, IntervalStrategy.NO
    # The Trainer takes no quantized model without an adapter; a fresh one adds nothing.
    bare = getattr(model.config, "quantization_config", None) and not isinstance(model, PeftModel)
    return ContinualTrainer(
        model,
        args,
        "naive",
        processing_class=tokenizer,
        architecture=recipe.architecture(),
        peft_config=adapters.lora_config(recipe.peft) if bare else None,
    )


def train_head(model: Any, recipe: Recipe, text: dict[str, Any], tokenizer: Any, directory: str) -> None:
    """
    Train the LM head of a model alone, for `new_lm_head` steps with the recipe's training arguments.

    Args:
        text: blocks by domain, which are mixed.
        directory: a temporary one.

    Raises:
        UserError: the model is sharded.
    """
    args = recipe.training_arguments(None, directory)
    args.max_steps, args.report_to = recipe.new_lm_head, []
    args.eval_strategy, args.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    args.push_to_hub = args.load_best_model_at_end = False
    masking = labeling(tokenizer, is_causal(recipe), args.mlm_probability)
    rows = TrainingBlocks(text, masking, data_seed(args), "interleaved")
    trainer = ContinualTrainer(
        model,
        args,
        "naive",
        rows,
        processing_class=tokenizer,
        domain="new LM head",
        architecture=recipe.architecture(),
    )
    if trainer.is_sharded:
        raise UserError("new_lm_head: with fsdp there is no head to train alone; begin with one process, or DDP")
    model.requires_grad_(False)
    for parameter in head_parameters(model):
        parameter.requires_grad_(True)
    trainer.train()
    model.requires_grad_(True)
