"""The drift budget: λ finds the bound, the weights land on it, and the verdict says so."""

import math

import pytest
import torch

from das_lm.errors import UserError
from das_lm.files import newest_checkpoint
from das_lm.methods import Anchor
from das_lm.methods.budget import SLACK, Budget, Controller
from tests.helpers import random_blocks
from tests.methods.helpers import equal, parameters
from tests.methods.test_anchor import MODELS, logged, trainer_of


def budget_of(trainer) -> Budget:
    return next(one for one in trainer.methods if isinstance(one, Budget))


@pytest.mark.parametrize("bound", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("first", [0.1, 1.0, 30.0])
def test_on_a_quadratic_the_divergence_goes_to_the_bound(bound, first):
    """Of (x − 1)² with K(x) = x² / 2: at the end K is the bound, and λ the multiplier 2 (1 − x) / x."""
    controller, x, steps = Controller(bound, first), 0.0, 4000
    for step in range(steps):
        x -= 0.05 * (2 * (x - 1) + controller.weight * x)
        controller.step(x * x / 2, rows=4, done=(step + 1) / steps)
    assert x * x / 2 == pytest.approx(bound, rel=0.1)
    assert controller.weight == pytest.approx(2 * (1 - x) / x, rel=0.2)


def test_a_bound_that_nothing_comes_near_lets_the_weight_fall():
    controller = Controller(0.5, 1.0)
    for step in range(100):
        controller.step(0.01, rows=4, done=(step + 1) / 100)
    assert controller.weight < 0.1
    assert Controller(0.5, 1.0).step(0.5 * (1 + SLACK), rows=1, done=0.0) is None  # on the bound of the first step


def test_its_state_is_all_that_it_knows():
    ours, theirs = Controller(0.1, 1.0), Controller(0.1, 1.0)
    for step in range(9):
        ours.step(0.3, rows=2, done=step / 20)
    theirs.load_state_dict(ours.state_dict())
    for one in (ours, theirs):
        one.step(0.2, rows=3, done=0.5)
    assert (ours.weight, ours.mean) == (theirs.weight, theirs.mean)


@pytest.mark.parametrize("teacher", ["copy", "cached"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_weights_land_within_the_bound_on_rows_kept_apart(kind, teacher, tmp_path):
    options = {
        "max_steps": 20,
        "memory_size": 64,
        "anchor_teacher": teacher,
        "drift_budget": 0.01,
        "anchor_draws": 256,
    }
    model, base = MODELS[kind](), MODELS[kind]()
    trainer = trainer_of(tmp_path, model, **options)
    begin = parameters(model)
    trainer.train()
    verdict = budget_of(trainer).verdict
    mean, low, high = verdict["divergence"]["self"]
    assert mean <= 0.01 < verdict["divergence_before_landing"]["self"] and low <= mean <= high
    assert verdict["budget_holds"] and 0 < verdict["landed_at"] < 1
    anchor = next(one for one in trainer.methods if isinstance(one, Anchor))
    apart = anchor.rows_apart("self")
    assert list(apart) == list(range(56, 64))
    trained = {anchor._draw(1.0, "anchor", "bio", epoch, 0)[1] for epoch in range(3000)}
    assert trained == set(range(56))  # all others, and none of these
    with torch.no_grad():  # by hand, with the base model itself
        batch = anchor._masked["self"].batch([(row, 0) for row in apart])
        ours, theirs = (trainer.criterion.of(m.eval())(m, batch).logits.log_softmax(-1) for m in (model, base))
    by_hand = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert by_hand == pytest.approx(mean, rel=0.05 if teacher == "copy" else 0.5)
    moved = [(value - begin[name]).abs().max().item() for name, value in parameters(model).items()]
    assert max(moved) > 0  # it is no way back to the base model


def test_a_bound_that_is_far_away_changes_no_weight_at_the_end(tmp_path):
    trainer = trainer_of(tmp_path, MODELS["causal"](), drift_budget=50.0, memory_size=16)
    trainer.train()
    verdict = budget_of(trainer).verdict
    assert verdict["landed_at"] == 1.0 and verdict["budget_holds"]
    assert verdict["divergence"]["self"][0] == pytest.approx(verdict["divergence_before_landing"]["self"])
    assert logged(trainer, "budget_self_weight")[-1] < logged(trainer, "budget_self_weight")[0]


def test_a_bound_that_is_broken_already_is_told(tmp_path):
    """The second domain is to hold what the first has lost."""
    method, model = Anchor(), MODELS["causal"]()
    trainer_of(tmp_path, model, method, memory_size=64, max_steps=10, anchor_weight=0.1).train()
    before = parameters(model)
    more = {"domain": "cs", "train_dataset": random_blocks(24), "drift_budget": 0.001}
    trainer = trainer_of(tmp_path, model, method, memory_size=64, max_steps=10, **more)
    trainer.train()
    verdict = budget_of(trainer).verdict
    assert not verdict["budget_holds"] and verdict["landed_at"] == 0.0 and equal(parameters(model), before)


def test_a_domain_without_a_budget_after_one_with(tmp_path):
    method, model = Anchor(), MODELS["causal"]()
    trainer_of(tmp_path, model, method, memory_size=16, drift_budget=0.05).train()
    more = {"domain": "cs", "train_dataset": random_blocks(24)}
    trainer = trainer_of(tmp_path, model, method, memory_size=16, **more)
    trainer.train()
    assert not any(isinstance(one, Budget) for one in trainer.methods) and list(method.pasts) == ["self", "bio"]


def test_a_bound_for_each_past(tmp_path):
    method, model = Anchor(), MODELS["causal"]()
    remember = {"self": (16, 1.0, 0.05), "more": (random_blocks(16, seed=9), 0.5)}
    options = {"memory_size": 16, "max_steps": 10, "remember": remember}
    trainer_of(tmp_path, model, method, drift_budget=0.01, **options).train()
    assert budget_of(method.trainer).verdict["drift_budget"] == {"self": 0.05, "more": 0.01}
    more = {"domain": "cs", "train_dataset": random_blocks(24), "drift_budget": 0.02}
    trainer = trainer_of(tmp_path, model, method, **{**options, **more})
    trainer.train()
    verdict = budget_of(trainer).verdict
    assert verdict["drift_budget"] == {"self": 0.05, "more": 0.02, "bio": 0.02} and verdict["budget_holds"]
    assert all(verdict["divergence"][name][0] <= bound for name, bound in verdict["drift_budget"].items())


@pytest.mark.parametrize("kind", MODELS)
def test_resumed_equals_uninterrupted(kind, tmp_path):
    models = []
    for directory, steps in (("whole", 8), ("part", 4), ("part", 8)):
        models.append(MODELS[kind]())
        options = {"max_steps": 8, "memory_size": 16, "drift_budget": 0.01, "save_strategy": "steps", "save_steps": 4}
        trainer = trainer_of(tmp_path / directory, models[-1], **options)
        if steps == 4:
            trainer.add_callback(_Stop(4))
        trainer.train(resume_from_checkpoint=newest_checkpoint(tmp_path / directory) if len(models) == 3 else None)
    assert equal(parameters(models[0]), parameters(models[2]))
    assert not equal(parameters(models[0]), parameters(models[1]))


class _Stop:
    """Ends a run as if it had been killed after a step: nothing that follows training happens."""

    def __new__(cls, step: int):
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == step

        return Stop()


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"drift_budget": 0.0}, "drift_budget"),
        ({"drift_budget": math.nan}, "drift_budget"),
        ({"remember": {"self": (8, 1.0, True)}}, "'self': its budget is True"),
        ({"remember": {"self": (8, -1.0)}}, "'self': its weight is -1.0"),
        ({"drift_budget": 0.1, "method": ["anchor", "interpolate"]}, "leave the method interpolate out"),
        ({"drift_budget": 0.1, "anchor_weight": 0.0}, "begins at anchor_weight"),
    ],
)
def test_what_cannot_be_held_is_refused(options, phrase, tmp_path):
    with pytest.raises((UserError, ValueError), match=phrase):
        trainer_of(tmp_path, MODELS["causal"](), **options)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"drift_budget": 0.1, "memory_size": 7}, "too few rows of 'self'"),
    ],
)
def test_what_cannot_be_held_is_refused_before_a_step(options, phrase, tmp_path):
    trainer = trainer_of(tmp_path, MODELS["causal"](), **options)
    with pytest.raises(UserError, match=phrase):
        trainer.train()
    assert trainer.state.global_step == 0


def test_in_a_short_training_the_weight_follows_faster():
    """By e⁴ over 16 rows, where the rate of a long one would take it by e to the quarter."""
    for rows, reach in ((16, 4.0), (320, 5.0)):
        one = Controller(0.1, 1.0, rows)
        for _ in range(rows):
            one.step(1.0, 1, 1.0)
        assert math.log(one.weight) == pytest.approx(reach, rel=1e-6)
