"""The trainer: equal to plain training where it should be, resumable bit for bit, and no knob that nothing reads."""

import logging
import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, RobertaForMaskedLM, Trainer, TrainerCallback, TrainingArguments

from das_lm import ContinualTrainer, DASTrainer
from das_lm.data.blocks import TrainingBlocks
from das_lm.data.collating import PaddingCollator
from das_lm.data.masking import MLMMasking
from das_lm.errors import UserError
from tests.helpers import VOCABULARY, random_blocks, tiny_roberta
from tests.training.helpers import (
    TOKENIZER,
    assert_equal,
    config,
    importance_of,
    losses,
    parameters,
    run_of,
    trainer_of,
)


def assert_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=lambda t, n=name: f"{n}: {t}")


# ---- equivalences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optim", "smoothing"), [("adamw_torch", 0.0), ("sgd", 0.0), ("sgd", 0.3)])
def test_without_mask_and_contrast_it_is_the_plain_trainer(optim, smoothing, tmp_path):
    """Strength 0 and λ = 0: the parameters of transformers' own Trainer on the same blocks, over two epochs."""
    options = {
        "max_steps": 8,
        "optim": optim,
        "label_smoothing_factor": smoothing,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "learning_rate": 1e-2 if optim == "adamw_torch" else 0.3,
        "adam_epsilon": 1e-4,  # the key biases have no gradient but rounding errors, which Adam would blow up
    }
    das = trainer_of(
        tmp_path, train=random_blocks(16), soft_mask_strength=0.0, contrast_weight=0.0, mlm_probability=0.3, **options
    )
    das.train()

    collate = PaddingCollator(TOKENIZER)
    model = tiny_roberta()
    plain = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
            save_strategy="no",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            **options,
        ),
        data_collator=lambda rows: {name: value for name, value in collate(rows).items() if name != "example_id"},
        train_dataset=TrainingBlocks({"bio": random_blocks(16)}, MLMMasking(TOKENIZER, 0.3), seed=42),
    )
    plain.train()
    assert_close(parameters(das.model), parameters(model), 2e-5)
    np.testing.assert_allclose(losses(das), losses(plain), rtol=1e-5)
    start = parameters(tiny_roberta())
    assert max((value - start[name]).abs().max() for name, value in parameters(model).items()) > 1e-2


def test_naive_method_is_the_das_trainer_without_mask_and_contrast(tmp_path):
    naive = trainer_of(tmp_path, trainer_class=ContinualTrainer, model=tiny_roberta(0.1))
    naive.train()
    das = trainer_of(tmp_path, model=tiny_roberta(0.1), soft_mask_strength=0.0, contrast_weight=0.0)
    das.train()
    assert_equal(parameters(naive.model), parameters(das.model))


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_accumulation_equals_a_large_batch(optim, tmp_path):
    """16 = 4 × 4, without dropout and contrast, with masks: same steps, same logged losses."""
    options = {"contrast_weight": 0.0, "optim": optim, "importance_batch_size": 8, "adam_epsilon": 1e-4}
    runs = [
        trainer_of(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **options)
        for size, steps in ((16, 1), (4, 4))
    ]
    for run in runs:
        run.train()
    assert_close(*(parameters(run.model) for run in runs), 1e-5)
    for name in ("loss", "loss_mlm", "grad_norm"):
        np.testing.assert_allclose(losses(runs[0], name), losses(runs[1], name), rtol=1e-4)


class OwnModel(RobertaForMaskedLM):
    """Takes no `**kwargs`, as a user's own model may; the Trainer treats the losses of such models otherwise."""

    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


def test_accumulation_with_a_model_that_takes_no_further_arguments(tmp_path):
    runs = []
    for size, steps in ((16, 1), (4, 4)):
        model = OwnModel(tiny_roberta().config)
        model.load_state_dict(tiny_roberta().state_dict())
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "contrast_weight": 0.0}
        runs.append(run_of(tmp_path, model=model, method="naive", optim="sgd", **options))
    assert_close(*(parameters(run.model) for run in runs), 1e-5)
    np.testing.assert_allclose(losses(runs[0]), losses(runs[1]), rtol=1e-4)


def test_accumulated_contrast_is_a_mean_over_the_batches(tmp_path, quiet_importance):
    """The contrast of four batches of 4 counts as much as one of 16 would: it is divided by the steps (trap 9)."""
    quiet_importance(0.5)
    run = trainer_of(tmp_path, gradient_accumulation_steps=4, max_steps=1)
    parts = []
    original = run.methods[0].loss
    run.methods[0].loss = lambda *args: parts.append(original(*args)) or parts[-1]
    run.train()
    assert len(parts) == 4
    (logged,) = losses(run, "loss_contrast")
    assert logged == pytest.approx(sum(part["contrast"].item() for part in parts) / 4, rel=1e-5)


def test_checkpointing_changes_no_loss(tmp_path):
    """With contrast, dropout and importance from the passes."""
    runs = [run_of(tmp_path, model=tiny_roberta(0.1), max_steps=6, gradient_checkpointing=on) for on in (False, True)]
    assert runs[1].model.is_gradient_checkpointing and not runs[0].model.is_gradient_checkpointing
    np.testing.assert_allclose(losses(runs[0]), losses(runs[1]), atol=1e-5)
    assert_close(parameters(runs[0].model), parameters(runs[1].model), 1e-4)


def test_same_seed_same_run_and_other_seed_other_run(tmp_path):
    """Two equal runs are equal bit for bit, which the tests below stand on."""
    runs = [run_of(tmp_path, model=tiny_roberta(0.1), seed=seed) for seed in (42, 42, 43)]
    assert_equal(parameters(runs[0].model), parameters(runs[1].model))
    assert_equal(importance_of(runs[0]).values, importance_of(runs[1]).values)
    assert any(not torch.equal(v, parameters(runs[2].model)[n]) for n, v in parameters(runs[0].model).items())


def test_data_seed_is_of_order_and_masks(tmp_path):
    """It replaces `seed` there, and only there."""
    rows = []
    for options in ({}, {"data_seed": 42}, {"data_seed": 7}):
        run = trainer_of(tmp_path, held_out=random_blocks(4, seed=9), **options)
        blocks = (run.train_dataset, run.eval_dataset)
        rows.append([[some[index]["labels"].tolist() for index in range(len(some))] for some in blocks])
    assert rows[0] == rows[1] and rows[0][0] != rows[2][0] and rows[0][1] != rows[2][1]


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_half_precision_parameters_are_warned_of(dtype, count, tmp_path, caplog):
    """METHODS §1, trap 10."""
    with caplog.at_level(logging.WARNING, logger="das_lm"):
        trainer_of(tmp_path, model=tiny_roberta().to(dtype))
    assert sum("half-precision parameters" in record.getMessage() for record in caplog.records) == count


# ---- loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logging_steps", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_parts_of_the_loss_are_logged(accumulation, logging_steps, tmp_path):
    """They sum to the loss, per step."""
    run = trainer_of(
        tmp_path,
        model=tiny_roberta(0.1),
        max_steps=4,
        gradient_accumulation_steps=accumulation,
        logging_steps=logging_steps,
    )
    run.train()
    assert len(losses(run)) == 4 // logging_steps
    for whole, mlm, contrast in zip(losses(run), losses(run, "loss_mlm"), losses(run, "loss_contrast"), strict=True):
        assert whole == pytest.approx(mlm + contrast, rel=1e-5)
        assert mlm > 1 and contrast > 0.01


def test_loss_is_not_a_number(tmp_path):
    """The message names domain and step, and no checkpoint is written."""

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.roberta.encoder.layer[1].output.dense.weight.data[0, 0] = math.nan

    run = trainer_of(tmp_path, max_steps=5, callbacks=[Spoil()], save_strategy="steps", save_steps=3)
    with pytest.raises(UserError, match="loss of domain 'bio' is nan at step 3; try a smaller learning_rate"):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_model_that_is_not_a_number_from_the_start(tmp_path):
    model = tiny_roberta()
    model.lm_head.dense.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="loss of domain 'cs' is nan at step 1"):
        trainer_of(tmp_path, model=model, domain="cs").train()


def test_bf16_runs_under_autocast(tmp_path):
    """Parameters and importance stay fp32; the forward pass does not."""
    run = trainer_of(tmp_path, bf16=True, held_out=random_blocks(4, seed=9))
    seen = set()
    hook = run.model.roberta.encoder.layer[0].intermediate.dense.register_forward_hook(
        lambda module, args, output: seen.add(output.dtype)
    )
    run.train()
    metrics = run.evaluate()
    hook.remove()
    assert seen == {torch.bfloat16}
    assert math.isfinite(metrics["eval_loss"])
    assert {p.dtype for p in run.model.parameters()} == {v.dtype for v in importance_of(run).values.values()}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    plain = trainer_of(tmp_path)
    plain.train()
    np.testing.assert_allclose(losses(run, "loss_mlm"), losses(plain, "loss_mlm"), rtol=0.05)


# ---- refused --------------------------------------------------------------------------------------------------------


def test_max_length_beyond_the_model(tmp_path):
    """RoBERTa has 40 position embeddings, of which the first two are for padding."""
    trainer_of(tmp_path, max_length=38)
    with pytest.raises(UserError, match="max_length: 39 is beyond what the model reads, 38 tokens"):
        trainer_of(tmp_path, max_length=39)
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=40,
        )
    )
    trainer_of(tmp_path, model=bert, max_length=40)
    with pytest.raises(UserError, match="max_length: 41 is beyond what the model reads, 40 tokens"):
        trainer_of(tmp_path, model=bert, max_length=41)


def test_max_length_beyond_the_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(TOKENIZER, "model_max_length", 20)
    with pytest.raises(UserError, match="max_length: 21 is beyond what the model reads, 20 tokens"):
        trainer_of(tmp_path, max_length=21)


def test_the_tokenizer_of_another_model(tmp_path):
    with pytest.raises(UserError, match="processing_class: the tokenizer has 64 tokens, the model 63; give its own"):
        trainer_of(tmp_path, model=tiny_roberta(vocab_size=VOCABULARY - 1))


def test_unknown_method(tmp_path):
    with pytest.raises(UserError, match="method: 'dass' is unknown. Did you mean 'das'"):
        trainer_of(tmp_path, method="dass")


def test_nothing_to_train_on(tmp_path):
    run = trainer_of(tmp_path, held_out=random_blocks(3))
    run.train_dataset = None
    with pytest.raises(UserError, match="domain 'bio' has no text to train on"):
        run.train()


def test_several_gpus_in_one_process(tmp_path):
    args = config(tmp_path)
    args._n_gpu = 2
    with pytest.raises(UserError, match="one process sees 2 GPUs.*accelerate launch"):
        DASTrainer(model=tiny_roberta(), args=args, train_dataset=random_blocks(4), processing_class=TOKENIZER)


def test_what_is_no_unit_is_frozen_only_while_its_trainer_trains(tmp_path):
    """The same model in a second trainer, with the default learning rate everywhere, learns with all of it."""
    model = tiny_roberta()
    trainer_of(tmp_path / "first", model=model, non_unit_lr_scale=0.0).train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = model.lm_head.dense.weight.detach().clone()
    trainer_of(tmp_path / "second", model=model).train()
    assert not torch.equal(before, model.lm_head.dense.weight)
