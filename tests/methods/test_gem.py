"""GEM: the projection is the solution of the paper's quadratic program, and the margin bounds its multipliers."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from das_lm import ContinualTrainer
from das_lm.methods.agem import gradient, memory_gradient
from das_lm.methods.gem import multipliers
from tests.methods.helpers import World, equal, flat, parameters, random_like, set_gradient

SHAPES = [(2, 3), (4,)]  # of two parameters


def problem(seed, count):
    """g and g_1 … g_K as lists of tensors, and as arrays."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return [torch.randn(shape, generator=generator) for shape in SHAPES]

    constraints = [draw() for _ in range(count)]
    given = [part - sum(parts) for part, *parts in zip(draw(), *constraints, strict=True)]
    return given, constraints, flat(given).double().numpy(), torch.stack(list(map(flat, constraints))).double().numpy()


@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_the_nearest_gradient_that_keeps_all_constraints(count, seed):
    given, constraints, g, rows = problem(seed, count)
    v = np.array(multipliers(given, constraints))
    projected = g + v @ rows
    slack = rows @ projected
    assert (rows @ g < 0).any()
    assert slack.min() > -1e-9 and v.min() >= 0 and np.abs(v * slack).max() < 1e-9  # Karush, Kuhn and Tucker
    solved = minimize(
        lambda x: 0.5 * ((x - g) ** 2).sum(),
        g,
        jac=lambda x: x - g,
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda x: rows @ x, "jac": lambda x: rows},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(projected, solved.x, atol=1e-5)


@pytest.mark.parametrize("margin", [0.1, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_margin_is_the_least_multiplier(seed, margin):
    given, constraints, g, rows = problem(seed, 4)
    v = np.array(multipliers(given, constraints, margin))
    assert v.min() >= margin and (rows @ (g + v @ rows)).min() > -1e-9
    dual = minimize(
        lambda x: 0.5 * ((g + x @ rows) ** 2).sum(),
        np.full(4, margin),
        jac=lambda x: rows @ (g + x @ rows),
        method="L-BFGS-B",
        bounds=[(margin, None)] * 4,
        options={"ftol": 1e-15, "gtol": 1e-10},
    )
    np.testing.assert_allclose(v, dual.x, atol=1e-4)


def test_one_constraint_is_agem():
    given, constraints, g, rows = problem(0, 1)
    np.testing.assert_allclose(multipliers(given, constraints), -(rows @ g) / (rows**2).sum())


def test_nothing_violated_changes_nothing():
    given, constraints, _, _ = problem(0, 1)
    opposite = [-part for part in given]
    assert multipliers(opposite, constraints) == multipliers(opposite, constraints, margin=1.0) == [0.0]


def test_degenerate_constraints():
    """The same one twice, one that is zero, more of them than dimensions, opposite ones; infinite numbers."""
    given, constraints, g, rows = problem(0, 2)
    zero = [torch.zeros(shape) for shape in SHAPES]
    once = g + np.array(multipliers(given, constraints)) @ rows
    more = np.array(multipliers(given, [*constraints, *constraints, zero]))
    np.testing.assert_allclose(g + more @ np.concatenate([rows, rows, 0 * rows[:1]]), once, atol=1e-6)
    given, constraints, g, rows = problem(1, 30)
    projected = g + np.array(multipliers(given, constraints)) @ rows
    assert (rows @ projected).min() > -1e-9
    opposite = [[-part for part in constraints[0]], constraints[0]]
    sums = np.array(multipliers(given, opposite)) @ np.stack([-rows[0], rows[0]])
    assert abs(rows[0] @ (g + sums)) < 1e-6
    assert multipliers([part * torch.inf for part in given], constraints[:2]) == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["module", "language model"])
def test_every_earlier_domain_is_kept_to(kind, tmp_path):
    _, method = World(kind).learn(tmp_path, "gem", domains=2, memory_size=6)
    assert [len(memory) for memory in method.memories] == [6, 6]
    past = [flat(memory_gradient(method.trainer, memory, f"memory {k}")) for k, memory in enumerate(method.memories)]
    given = random_like(past[0]) - 0.5 * past[0] - 0.5 * past[1]
    set_gradient(method, given)
    method.change_gradient()
    projected = flat(gradient(method.trainer))
    for one in past:
        assert given @ one < 0 and projected @ one > -1e-5 * projected.norm() * one.norm()


def test_loss_scaling_scales_the_projection(tmp_path, monkeypatch):
    _, method = World("module").learn(tmp_path, "gem", domains=2, gem_margin=20.0)
    given = flat([torch.randn_like(p) for p in method.trainer.model.parameters()])
    given -= 10 * flat(memory_gradient(method.trainer, method.memories[0], "memory 0"))
    results = []
    for scale in (1.0, 2.0**12):
        monkeypatch.setattr(ContinualTrainer, "gradient_scale", scale)
        set_gradient(method, scale * given)
        method.change_gradient()
        results.append(flat(gradient(method.trainer)) / scale)
    assert not torch.allclose(results[0], given)
    torch.testing.assert_close(*results)


def test_the_first_domain_is_naive(tmp_path):
    ours, _ = World("module").learn(tmp_path / "gem", "gem", domains=1)
    naive, _ = World("module").learn(tmp_path / "naive", "naive", domains=1)
    assert equal(parameters(ours), parameters(naive))
