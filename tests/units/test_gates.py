"""Gates with a row per example: one backward pass gives the gradient of every example."""

import pytest
import torch

from das_lm.model.objective import run_language_model
from das_lm.units import Units, gated
from das_lm.units.gates import ones
from tests.helpers import random_batch, tiny_roberta

LENGTHS = [12, 7, 9, 5]


def losses(model, units, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return run_language_model(model, units, inputs, batch["labels"]).row_means(len(batch["input_ids"]))


def gate_gradients(model, units, batch, autocast=False):
    """Group key -> ∂ loss of each example / ∂ its gates, shape [batch, units]."""
    gates = ones(units.groups, len(batch["input_ids"]), torch.device("cpu"))
    with gated(units, gates), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        gradients = torch.autograd.grad(losses(model, units, batch).sum(), list(gates.values()))
    return dict(zip(gates, gradients, strict=True))


def loop(model, units, batch, autocast=False):
    """The same, one example at a time and without its padding."""
    rows = []
    for row, length in enumerate(LENGTHS):
        alone = {
            name: value[row : row + 1, :length] if value.ndim == 2 else value[row : row + 1]
            for name, value in batch.items()
        }
        rows.append(gate_gradients(model, units, alone, autocast))
    return {key: torch.cat([row[key] for row in rows]) for key in units.groups}


@pytest.fixture(scope="module")
def expected():
    """Gradients of the plain loop, in fp32."""
    model = tiny_roberta()
    return loop(model, Units(model), random_batch(LENGTHS))


def check(gradients, expected, tolerance):
    assert list(gradients) == list(expected)
    for key, value in expected.items():
        assert value.abs().max() > 1e-3, key
        error = (gradients[key] - value).norm(dim=1) / value.norm(dim=1)  # of each example
        assert error.max() < tolerance, (key, error)


def test_gradients_equal_a_loop_over_examples(expected):
    model = tiny_roberta()
    check(gate_gradients(model, Units(model), random_batch(LENGTHS)), expected, 1e-5)


def test_examples_differ(expected):
    """The comparison above says something: no example's gradient is near another's."""
    for value in expected.values():
        assert torch.pdist(value).min() > 0.1 * value.norm(dim=1).min()


def test_gradients_under_checkpointing(expected):
    """The forward pass that runs again during backward finds the same gates."""
    model = tiny_roberta()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forwards = []
    model.roberta.encoder.layer[0].intermediate.register_forward_hook(lambda *_: forwards.append(1))
    check(gate_gradients(model, Units(model), random_batch(LENGTHS)), expected, 1e-5)
    assert len(forwards) == 2


def test_gradients_under_checkpointing_with_frozen_parameters(expected):
    """As the importance pass runs: no parameter records a gradient, the gates alone do."""
    model = tiny_roberta().requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check(gate_gradients(model, Units(model), random_batch(LENGTHS)), expected, 1e-5)


def test_gradients_under_autocast(expected):
    """In bfloat16: equal to a loop in bfloat16 up to rounding, and near those of fp32; the gates stay fp32."""
    model = tiny_roberta()
    units, batch = Units(model), random_batch(LENGTHS)
    gradients = gate_gradients(model, units, batch, autocast=True)
    assert {value.dtype for value in gradients.values()} == {torch.float32}
    check(gradients, expected, 0.1)
    check(loop(model, units, batch, autocast=True), gradients, 0.1)
    assert any(not torch.equal(gradients[key], value) for key, value in expected.items())


def test_each_row_of_a_batch_has_its_own_gates():
    """Gates at random values: every row equals the run of that row alone with its own gates."""
    model = tiny_roberta().eval()
    units, batch = Units(model), random_batch([9, 9, 9])
    generator = torch.Generator().manual_seed(0)
    gates = {key: torch.rand(3, size, generator=generator) for key, size in units.sizes.items()}
    with torch.no_grad():
        with gated(units, gates):
            together = losses(model, units, batch)
        for row in range(3):
            alone = {name: value[row : row + 1] for name, value in batch.items()}
            with gated(units, {key: gate[row : row + 1] for key, gate in gates.items()}):
                torch.testing.assert_close(losses(model, units, alone)[0], together[row])


def test_gates_multiply():
    """Contexts nest: drops inside the gates of an importance pass act as their product."""
    model = tiny_roberta().eval()
    units, batch = Units(model), random_batch([9, 9])
    halves, thirds = (
        {key: torch.full((2, size), factor) for key, size in units.sizes.items()} for factor in (0.5, 0.3)
    )
    product = {key: halves[key] * thirds[key] for key in halves}
    with torch.no_grad():
        with gated(units, product):
            expected = losses(model, units, batch)
        with gated(units, halves), gated(units, thirds):
            torch.testing.assert_close(losses(model, units, batch), expected)
        assert not torch.allclose(losses(model, units, batch), expected)
