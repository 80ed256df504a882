"""Trainers of the tiny world."""

import math

import torch

from das_lm import DASConfig, DASTrainer
from das_lm.methods import Method
from tests.helpers import build_tokenizer, random_blocks, tiny_roberta

TOKENIZER = build_tokenizer()


def config(output_dir, **options):
    """Few steps, on the CPU, silent; everything that a test is about is in `options`."""
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "max_length": 12,
        "importance_samples": 8,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "save_strategy": "no",
    }
    return DASConfig(output_dir=str(output_dir), **{**defaults, **options})


def trainer_of(output_dir, model=None, trainer_class=DASTrainer, domain="bio", train=None, held_out=None, **options):
    more = {name: options.pop(name) for name in ("method", "callbacks", "architecture") if name in options}
    return trainer_class(
        model=tiny_roberta() if model is None else model,
        args=config(output_dir, **options),
        train_dataset=random_blocks(40) if train is None else train,
        eval_dataset=held_out,
        processing_class=TOKENIZER,
        domain=domain,
        **more,
    )


def run_of(*args, **options):
    """A trainer that has trained. Training starts from the random state that the trainer set when it was made."""
    run = trainer_of(*args, **options)
    run.train()
    return run


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(ours, theirs):
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def importance_of(trainer):
    return trainer.methods[0].importance


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Extra(Method):
    """Adds a part to the loss, which is `value` in a batch of the step `at`, and 0 in all others."""

    def __init__(self, at: int, value: float = math.nan, batch: int = 0):
        self.at, self.value, self.batch, self.seen = at, value, batch, 0

    def loss(self, model, batch, outputs):
        here = self.trainer.state.global_step + 1 == self.at
        self.seen += here
        spoilt = here and self.seen == self.batch + 1
        return {"extra": outputs.logits.sum() * 0 + (self.value if spoilt else 0.0)}
