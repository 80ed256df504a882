"""What holds for every method: two domains, in one go, resumed, through files; and no knob that nothing reads."""

import pytest
import torch

from das_lm import ContinualTrainer
from das_lm.errors import UserError
from das_lm.methods import METHODS
from das_lm.methods.penalty import Penalty
from tests.methods.helpers import METHOD_KNOBS, World, equal, parameters


def works(kind: str, method: str) -> bool:
    return kind == "language model" or not METHODS[method].language_models_only


@pytest.fixture(params=["language model", "module"])
def world(request) -> World:
    return World(request.param)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "das"])
def test_resumed_equals_uninterrupted(method, world, tmp_path):
    """The second domain is interrupted after its checkpoint of step 3, and goes on with new objects."""
    if not works(world.kind, method):
        with pytest.raises(UserError, match=method):
            world.train(tmp_path, world.model(), method, 0)
        return
    model, kept = world.model(), METHODS[method]()
    world.train(tmp_path / "0", model, kept, 0)
    middle, state = parameters(model), {name: tensor.clone() for name, tensor in kept.state_dict().items()}
    whole = world.train(tmp_path / "whole", model, kept, 1)
    expected, expected_state = parameters(model), kept.state_dict()

    class Stop(Exception):
        pass

    fresh = METHODS[method]()
    model = world.model()
    model.load_state_dict(middle, strict=False)

    def start(method_object):
        attach = method_object.attach
        method_object.attach = lambda trainer: (
            attach(trainer),
            method_object.load_state_dict(state) if state else None,
        )
        return method_object

    original = ContinualTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise Stop
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(ContinualTrainer, "training_step", stop)
        world.train(tmp_path / "stopped", model, start(fresh), 1, remember=kept.trainer.remembered)
    again = METHODS[method]()
    model = world.model()
    resumed = world.train(tmp_path / "stopped", model, start(again), 1, resume=True, remember=kept.trainer.remembered)
    assert resumed.state.global_step == whole.state.global_step == 6
    assert equal(parameters(model), expected)
    assert equal(again.state_dict(), expected_state)


@pytest.mark.parametrize("method", METHODS)
def test_state_round_trips_through_a_file(method, world, tmp_path):
    if not works(world.kind, method):
        pytest.skip(f"{method} acts on language models")
    model, kept = world.learn(tmp_path, method)
    kept.save(tmp_path)
    other = METHODS[method]()
    other.attach(kept.trainer)
    other.load(tmp_path)
    assert equal(other.state_dict(), kept.state_dict())


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if issubclass(kind, Penalty)])
def test_a_penalty_of_weight_0_is_naive_bit_for_bit(method, world, tmp_path):
    ours, _ = world.learn(tmp_path / method, method, penalty_weight=0.0)
    naive, _ = world.learn(tmp_path / "naive", "naive")
    assert equal(parameters(ours), parameters(naive))
    other, _ = world.learn(tmp_path / "other", method, penalty_weight=10.0)
    assert not equal(parameters(other), parameters(naive))


@pytest.mark.parametrize("method", ["ewc", "das"])
def test_a_file_in_the_working_directory_is_not_beside_a_model_that_was_not_loaded(method, tmp_path, monkeypatch):
    world = World("language model")
    _, kept = world.learn(tmp_path, method, domains=1)
    monkeypatch.chdir(tmp_path)
    kept.save(tmp_path)
    assert (tmp_path / ("importance.safetensors" if method == "das" else "ewc.safetensors")).is_file()
    fresh = METHODS[method]()
    world.train(tmp_path / "fresh", world.model(), fresh, 0, max_steps=1, save_strategy="no")
    again = METHODS[method]()
    monkeypatch.chdir("/")
    world.train(tmp_path / "again", world.model(), again, 0, max_steps=1, save_strategy="no")
    if method == "das":
        assert fresh.importance.domains == again.importance.domains == ["general", "domain 0"]
    else:
        assert equal(fresh.state_dict(), again.state_dict())


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if issubclass(kind, Penalty)])
def test_state_of_another_model_is_refused(method, tmp_path):
    world = World("module")
    _, kept = world.learn(tmp_path, method)
    state = kept.state_dict()
    name = next(iter(state))
    with pytest.raises(UserError, match=r"does not fit the model"):
        kept.load_state_dict({**state, name: torch.zeros(3, 3, 3)})


@pytest.mark.parametrize("field", METHOD_KNOBS)
def test_every_field_changes_something(field, tmp_path):
    method, value, shared = METHOD_KNOBS[field]
    language = METHODS[method].language_models_only or field == "interpolation_slope"
    world = World("language model" if language else "module")
    before, _ = world.learn(tmp_path / "before", method, domains=3, **shared)
    after, _ = world.learn(tmp_path / "after", method, domains=3, **{**shared, field: value})
    assert not equal(parameters(before), parameters(after))
