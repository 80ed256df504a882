"""Soft masks: what is frozen stays bit for bit, what is free moves bit for bit as without, and Adam's trap."""

import logging

import pytest
import torch
from transformers.training_args import OptimizerNames

from das_lm import DASConfig, DASTrainer, Importance
from das_lm.errors import UserError
from das_lm.training.config import FUSED_WITH_BACKWARD
from das_lm.units import Units
from das_lm.units.soft_mask import REFUSED_OPTIMIZERS, SoftMask, check_optimizer
from tests.helpers import random_blocks, tiny_roberta

KINDS = ("head", "intermediate", "output")


def constant(units, value):
    return {key: torch.full((size,), value) for key, size in units.sizes.items()}


def gradients(model, steps, seed=0):
    """One set of gradients per step, the same for every model of this shape."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()} for _ in range(steps)
    ]


def train(optimizer_class, importance=None, target="update", steps=3, kinds=KINDS, strength=1.0, **options):
    """Take steps along given gradients from the same start; returns the units and the parameters afterwards."""
    model = tiny_roberta()
    units = Units(model)
    optimizer = optimizer_class(model.parameters(), **options)
    mask = None
    if importance is not None:
        values = importance(units) if callable(importance) else constant(units, importance)
        mask = SoftMask(units, values, target, kinds, strength)
    for gradient in gradients(model, steps):
        for name, parameter in model.named_parameters():
            parameter.grad = gradient[name].clone()
        if mask:
            mask.before_step()
        optimizer.step()
        if mask:
            mask.mask_step()
    return units, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def start():
    return {name: parameter.detach().clone() for name, parameter in tiny_roberta().named_parameters()}


SGD = {"optimizer_class": torch.optim.SGD, "lr": 0.1}
ADAMW = {"optimizer_class": torch.optim.AdamW, "lr": 0.01, "weight_decay": 0.1}
ADAM = {"optimizer_class": torch.optim.Adam, "lr": 0.01}


@pytest.mark.parametrize("options", [{**SGD, "target": "gradient"}, {**SGD, "target": "update"}, ADAMW])
def test_importance_one_freezes_a_unit_bit_for_bit(options):
    """Under SGD by its gradient, under AdamW with weight decay by its update; its neighbours move."""

    def importance(units):
        values = constant(units, 0.0)
        for value in values.values():
            value[1] = 1
        return values

    units, after = train(importance=importance, **options)
    before = start()
    for piece in units.slices:
        own = piece.owners[:, 0] == 1
        change = (after[piece.parameter] != before[piece.parameter]).movedim(piece.axis, 0)
        assert not change[own].any() and change[~own].all(), piece.parameter
    free = after.keys() - units.owned_parameters()
    assert free and all((after[name] != before[name]).any() for name in free)


@pytest.mark.parametrize("target", ["gradient", "update"])
@pytest.mark.parametrize("options", [SGD, ADAMW])
def test_importance_zero_is_the_unmasked_step_bit_for_bit(options, target):
    _, masked = train(importance=0.0, target=target, **options)
    _, plain = train(**options)
    assert all(torch.equal(masked[name], plain[name]) for name in plain)


def test_fractional_importance_scales_the_step_of_every_unit():
    """θ = θ_old + (1 − I)(θ_new − θ_old) for every entry, spread along the right axis; also the weight decay."""

    def importance(units):
        generator = torch.Generator().manual_seed(1)
        return {key: torch.rand(size, generator=generator) for key, size in units.sizes.items()}

    units, masked = train(importance=importance, steps=1, **ADAMW)
    _, plain = train(steps=1, **ADAMW)
    before, held_back = start(), {name: torch.zeros_like(value) for name, value in plain.items()}
    for piece in units.slices:
        per_entry = importance(units)[piece.group][piece.owners[:, 0]]
        held_back[piece.parameter] += (
            per_entry[:, None] if piece.axis == 0 and plain[piece.parameter].ndim == 2 else (per_entry)
        )
    for name in plain:
        expected = before[name] + (1 - held_back[name]) * (plain[name] - before[name])
        torch.testing.assert_close(masked[name], expected, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_named_kinds_are_masked(kind):
    units, after = train(importance=1.0, kinds=[kind], steps=1, **SGD)
    before = start()
    for piece in units.slices:
        frozen = torch.equal(after[piece.parameter], before[piece.parameter])
        assert frozen == (units.groups[piece.group].kind == kind), piece.parameter


@pytest.mark.parametrize("target", ["gradient", "update"])
def test_strength_scales_the_importance(target):
    """Importance 0.8 at strength 0.5 holds 0.4 of the step back; strength 0 holds nothing back."""
    units, masked = train(importance=0.8, strength=0.5, target=target, steps=1, **SGD)
    _, plain = train(steps=1, **SGD)
    _, off = train(importance=0.8, strength=0.0, target=target, steps=1, **SGD)
    before = start()
    for name in units.owned_parameters():
        torch.testing.assert_close(masked[name] - before[name], 0.6 * (plain[name] - before[name]), rtol=0, atol=1e-6)
    assert all(torch.equal(off[name], plain[name]) for name in plain)


def displacement(importance, target, options, steps=4):
    units, after = train(importance=importance, target=target, steps=steps, **options)
    before = start()
    return torch.cat([(after[name] - before[name]).flatten() for name in sorted(units.owned_parameters())])


def test_adam_divides_a_constant_gradient_mask_out():
    """METHODS §1, trap 1: a mask of 0.1 on Adam's gradients does nothing; on its updates it holds back 0.9."""
    plain = displacement(0.0, "gradient", ADAM)
    masked_gradient = displacement(0.9, "gradient", ADAM)
    masked_update = displacement(0.9, "update", ADAM)
    torch.testing.assert_close(masked_gradient, plain, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(masked_update, 0.1 * plain, rtol=1e-3, atol=1e-5)


def test_sgd_does_not():
    plain = displacement(0.0, "gradient", SGD)
    for target in ("gradient", "update"):
        torch.testing.assert_close(displacement(0.9, target, SGD), 0.1 * plain, rtol=1e-3, atol=1e-5)


def test_masked_update_is_adam_with_the_masked_gradient_in_its_first_moment_alone():
    """For a mask that is constant over a domain: m from (1 − I) g, v from the raw g."""
    steps, lr, beta1, beta2, eps = 5, 0.01, 0.9, 0.999, 1e-8
    generator = torch.Generator().manual_seed(1)
    values = {}

    def importance(units):
        values.update({key: torch.rand(size, generator=generator) for key, size in units.sizes.items()})
        return values

    units, masked = train(importance=importance, steps=steps, **ADAM)
    held_back = {piece.parameter: (piece, values[piece.group]) for piece in units.slices}
    all_gradients = gradients(tiny_roberta(), steps)
    for name, parameter in start().items():
        keep = torch.ones(())
        if name in held_back:
            piece, value = held_back[name]
            keep = 1 - piece.spread(value, parameter.ndim)
        first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
        for step in range(1, steps + 1):
            gradient = all_gradients[step - 1][name]
            first = beta1 * first + (1 - beta1) * keep * gradient
            second = beta2 * second + (1 - beta2) * gradient**2
            parameter = parameter - lr * first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + eps)
        torch.testing.assert_close(masked[name], parameter, rtol=1e-4, atol=1e-6)


def test_skipped_step_stays_skipped():
    """The gradient scaler may leave a step out: then the mask changes nothing, whatever the importance."""
    model = tiny_roberta()
    units = Units(model)
    mask = SoftMask(units, constant(units, 0.3))
    for _ in range(2):
        mask.before_step()
        mask.mask_step()
    assert all(torch.equal(parameter, start()[name]) for name, parameter in model.named_parameters())


def test_frozen_and_unused_parameters_are_left_alone():
    """A parameter that the user froze, or that got no gradient, is no error under either target."""
    for target in ("gradient", "update"):
        model = tiny_roberta()
        layer = model.roberta.encoder.layer[0]
        layer.intermediate.dense.weight.requires_grad_(False)
        units = Units(model)
        mask = SoftMask(units, constant(units, 0.5), target)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        layer.output.dense.weight.grad = torch.ones_like(layer.output.dense.weight)
        mask.before_step()
        optimizer.step()
        mask.mask_step()
        for name, parameter in model.named_parameters():
            moved = 0.5 if parameter is layer.output.dense.weight else 0.0
            torch.testing.assert_close(parameter, start()[name] - moved)


# ---- optimizers of TrainingArguments -------------------------------------------------------------------------------


def trainer_with(optim, tmp_path, tokenizer, **options):
    defaults = {
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
    }
    args = DASConfig(
        output_dir=str(tmp_path),
        optim=optim,
        per_device_train_batch_size=2,
        max_length=12,
        importance_samples=4,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        **{**defaults, **options},
    )
    return DASTrainer(
        model=tiny_roberta(0.1), args=args, train_dataset=random_blocks(16), processing_class=tokenizer, domain="bio"
    )


@pytest.mark.parametrize("optim", REFUSED_OPTIMIZERS)
def test_refused_optimizers(optim, tmp_path, tiny_tokenizer):
    """Before anything is computed, with the reason and a way out."""
    with pytest.raises(UserError, match=f"'{optim}'.*further iterates.*use 'adamw_torch'"):
        trainer_with(optim, tmp_path, tiny_tokenizer)


OTHERS = {one.value for one in OptimizerNames if not any(part in one.value for part in FUSED_WITH_BACKWARD)}


def test_the_refused_are_names_of_transformers():
    assert set(REFUSED_OPTIMIZERS) <= OTHERS < {one.value for one in OptimizerNames}


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "soft_mask" in r.getMessage()]


def test_gradient_with_adam_warns_once(caplog, tmp_path, tiny_tokenizer):
    with caplog.at_level(logging.WARNING, logger="das_lm"):
        trainer_with("adamw_torch", tmp_path, tiny_tokenizer, soft_mask_target="gradient").train()
    (warning,) = warnings_of(caplog)
    assert "'adamw_torch'" in warning and "soft_mask_target 'update'" in warning


@pytest.mark.parametrize(("optim", "target"), [("sgd", "gradient"), ("adamw_torch", "update"), ("sgd", "update")])
def test_no_warning_where_the_mask_acts(optim, target, caplog):
    with caplog.at_level(logging.WARNING, logger="das_lm"):
        check_optimizer(optim, target)
    assert not warnings_of(caplog)


@pytest.mark.parametrize("optim", sorted(OTHERS - set(REFUSED_OPTIMIZERS)))
def test_every_other_optimizer_respects_the_mask(optim, tmp_path, tiny_tokenizer):
    """Importance 1 everywhere: over steps with accumulation and weight decay no owned parameter moves by a bit, and
    what is not owned moves. Optimizers whose package is not installed are skipped, with the reason."""
    low_rank = "galore" in optim or "apollo" in optim
    options = {"optim_target_modules": "all-linear", "optim_args": "rank=4"} if low_rank else {}
    trainer = trainer_with(optim, tmp_path, tiny_tokenizer, weight_decay=0.1, **options)
    trainer.methods[0].importance = Importance("paper", values=constant(trainer.units, 1.0))
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    try:
        trainer.create_optimizer()
    except (ImportError, ValueError) as error:
        words = ("install", "import", "requires", "available", "support")
        if not any(word in str(error) for word in words):
            raise
        pytest.skip(f"{optim}: {error}")
    if ("paged" in optim or optim == "galore_adamw_8bit") and not torch.cuda.is_available():
        pytest.skip(f"{optim}: needs a GPU")
    trainer.train()
    owned = trainer.units.owned_parameters()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.isfinite().all()
        if name in owned:
            assert torch.equal(parameter, before[name]), name
    free = [name for name in before if name not in owned]
    after = dict(trainer.model.named_parameters())
    assert sum(not torch.equal(after[name], before[name]) for name in free) > len(free) / 2


def test_the_optimizers_that_torch_brings_are_not_skipped(tmp_path, tiny_tokenizer):
    """The test above must not skip them all."""
    for optim in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"):
        assert trainer_with(optim, tmp_path, tiny_tokenizer).create_optimizer() is not None
