"""The anchor: what it adds to the loss, that the domain is seen as without it, and that less is lost."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from das_lm import ContinualTrainer, DASConfig
from das_lm.errors import UserError
from das_lm.methods import Anchor
from das_lm.methods.writing import Writer
from tests.helpers import build_tokenizer, random_blocks, tiny_roberta
from tests.methods.helpers import equal, parameters
from tests.model.helpers import tiny_gpt2

MODELS = {"masked": tiny_roberta, "causal": tiny_gpt2}


def trainer_of(directory, model, method="anchor", **options) -> ContinualTrainer:
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_length": 12,
        "memory_size": 8,
        "self_replay_sweeps": 2,
        "importance_samples": 8,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
    }
    return ContinualTrainer(
        model,
        DASConfig(output_dir=str(directory), **{**defaults, **options}),
        method,
        train_dataset=random_blocks(24, seed=1),
        processing_class=build_tokenizer(),
        domain="bio",
    )


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def divergence(trainer, base: nn.Module) -> float:
    """KL(base ‖ model) per predicted token of text that the base wrote with another seed."""
    other = trainer_of(trainer.args.output_dir, base, "naive", memory_size=32, seed=7, per_device_train_batch_size=32)
    ids = torch.stack(Writer(other).blocks())
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.no_grad():
        ours, theirs = (
            F.log_softmax(one.criterion(one.model.eval(), batch).logits, dim=-1) for one in (trainer, other)
        )
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean().item()


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_is_that_of_the_formula(kind, tmp_path):
    """λ / share × Σ KL / predictions of the domain, row by row with a model and a teacher of its own."""
    model, base = MODELS[kind](), MODELS[kind](seed=3)
    trainer = trainer_of(tmp_path, model, anchor_share=0.5, anchor_weight=3.0, max_steps=1, learning_rate=0.0)
    trainer.train()
    (method,) = trainer.methods
    method.teacher.model.load_state_dict(base.state_dict())
    method.teacher.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(6)])
    model.train()
    whole = method.add_rows(batch, None)
    count = len(whole["input_ids"]) - 6
    assert 0 < count < 6 and all((whole[name][:6] == batch[name]).all() for name in ("input_ids", "labels"))
    added = method.loss(model, batch, trainer.criterion(model, whole))["anchor"]
    expected = []
    for row in range(6, 6 + count):
        one = {name: whole[name][row : row + 1] for name in ("input_ids", "attention_mask", "labels")}
        ours, taught = (trainer.criterion.of(m)(m, one).logits.softmax(-1) for m in (model, base.eval()))
        expected.append((taught * (taught / ours).log()).sum(-1))
    torch.testing.assert_close(added, 3.0 / 0.5 * torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("methods", [["anchor"], ["das", "anchor"]])
@pytest.mark.parametrize("kind", MODELS)
def test_without_weight_it_is_as_if_it_were_not_there(kind, methods, tmp_path):
    without = [one for one in methods if one != "anchor"] or ["naive"]
    models = []
    for method, options in ((methods, {"anchor_weight": 0.0}), (without, {})):
        models.append(MODELS[kind]())
        trainer_of(tmp_path, models[-1], method, **options).train()
    assert equal(*map(parameters, models))


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_of_the_domain_is_of_its_own_rows(kind, tmp_path):
    losses = []
    for method in ("naive", "anchor", ["das", "anchor"]):
        trainer = trainer_of(tmp_path, MODELS[kind](), method, learning_rate=0.0, anchor_share=1.0)
        trainer.train()
        losses.append(logged(trainer, f"loss_{trainer.criterion.name}"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_step_is_the_same_in_other_batches(kind, tmp_path):
    models = []
    for rows, batches in ((8, 1), (2, 4)):
        models.append(MODELS[kind]())
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": batches}
        trainer_of(tmp_path, models[-1], optim="sgd", importance_batch_size=4, **options).train()
    ours, theirs = map(parameters, models)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_less_is_lost_of_what_the_base_knew(kind, tmp_path):
    """At the same learning rate, on text that it was not held on."""
    lost = {}
    for method in ("naive", "anchor"):
        trainer = trainer_of(
            tmp_path, MODELS[kind](), method, max_steps=30, memory_size=64, anchor_share=1.0, anchor_weight=4.0
        )
        trainer.train()
        lost[method] = divergence(trainer, MODELS[kind]())
    assert lost["anchor"] < 0.5 * lost["naive"]


def test_the_teacher_stays_the_base_model(tmp_path):
    """In the second domain too, with a method that found its state beside the weights."""
    base = tiny_roberta()
    first = trainer_of(tmp_path / "a", tiny_roberta())
    first.train()
    first.save_model(str(tmp_path / "bio"))
    model = type(base).from_pretrained(tmp_path / "bio")
    second = trainer_of(tmp_path / "b", model)
    second.train()
    assert equal(parameters(second.methods[0].teacher.model), parameters(base))
    assert [row["input_ids"].tolist() for row in second.methods[0].memory.rows] == [
        row["input_ids"].tolist() for row in first.methods[0].memory.rows
    ]


def test_what_it_cannot_do_is_refused(tmp_path):
    with pytest.raises(UserError, match="chunked_cross_entropy: a method that teaches"):
        trainer_of(tmp_path, tiny_gpt2(), chunked_cross_entropy=True)

    class Module(nn.Linear):
        def forward(self, x):
            return super().forward(x).mean()

    with pytest.raises(UserError, match="'anchor' needs a language model"):
        ContinualTrainer(Module(2, 2), DASConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[]), Anchor())
