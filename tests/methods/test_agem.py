"""A-GEM: the projection by hand, and nothing where nothing is violated."""

import pytest
import torch

from das_lm.methods.agem import gradient, memory_gradient
from tests.methods.helpers import World, equal, flat, parameters, random_like, set_gradient


@pytest.fixture(params=["module", "language model"])
def learned(request, tmp_path):
    """A method that remembers a domain, with its trainer."""
    _, method = World(request.param).learn(tmp_path, "agem", domains=1)
    return method


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_a_violated_constraint_is_projected_away(learned, scale):
    past = flat(memory_gradient(learned.trainer, learned.memory, "memory"))
    given = scale * (random_like(past) - 0.7 * past)
    assert given @ past < 0
    set_gradient(learned, given)
    learned.change_gradient()
    projected = flat(gradient(learned.trainer))
    expected = given - (given @ past) / (past @ past) * past
    torch.testing.assert_close(projected, expected, rtol=1e-5, atol=1e-6 * scale)
    assert abs(projected @ past) < 1e-5 * projected.norm() * past.norm()
    assert not torch.equal(projected, given)


def test_a_kept_constraint_leaves_the_gradient_as_it_was(learned):
    past = flat(memory_gradient(learned.trainer, learned.memory, "memory"))
    given = random_like(past) + 0.7 * past
    assert given @ past > 0
    set_gradient(learned, given)
    learned.change_gradient()
    assert torch.equal(flat(gradient(learned.trainer)), given)


def test_a_parameter_without_gradient(learned):
    """It counts as zero, stays without where nothing is violated, and otherwise gets what the projection gives it."""
    past = flat(memory_gradient(learned.trainer, learned.memory, "memory"))
    first = next(learned.trainer.model.parameters())
    for sign in (1, -1):
        set_gradient(learned, sign * past)
        first.grad = None
        learned.change_gradient()
        assert (first.grad is None) == (sign == 1)
    share = past[first.numel() :].square().sum() / past.square().sum()
    torch.testing.assert_close(first.grad.flatten(), share * past[: first.numel()])


def test_the_memory_batch_is_addressed_by_the_step(learned):
    trainer = learned.trainer
    now = memory_gradient(trainer, learned.memory, "memory")
    assert all(map(torch.equal, now, memory_gradient(trainer, learned.memory, "memory")))
    trainer.state.global_step += 1
    assert not all(map(torch.equal, now, memory_gradient(trainer, learned.memory, "memory")))


def test_a_small_memory_is_read_whole(tmp_path):
    _, method = World("module").learn(tmp_path, "agem", domains=1, memory_size=3)
    assert len(method.memory) == 3
    model = method.trainer.model
    columns = {name: torch.stack([row[name] for row in method.memory.rows]) for name in ("inputs", "labels")}
    expected = torch.autograd.grad(model(**columns)["loss"], list(model.parameters()))
    torch.testing.assert_close(memory_gradient(method.trainer, method.memory, "memory"), list(expected))


def test_accumulated_batches_are_one_batch(tmp_path):
    whole, _ = World("module").learn(tmp_path / "whole", "agem", memory_size=2)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    parts, _ = World("module").learn(tmp_path / "parts", "agem", memory_size=2, **options)
    naive, _ = World("module").learn(tmp_path / "naive", "naive")
    torch.testing.assert_close(parameters(whole), parameters(parts), rtol=1e-4, atol=1e-5)
    assert not equal(parameters(whole), parameters(naive))


def test_the_first_domain_is_naive(tmp_path):
    ours, method = World("module").learn(tmp_path / "agem", "agem", domains=1)
    naive, _ = World("module").learn(tmp_path / "naive", "naive", domains=1)
    assert equal(parameters(ours), parameters(naive))
    assert len(method.memory) == 8 and method.memory.seen == 24
