"""NCL: the step is the closed form, inside the trust region; the precision is the prior and the Fisher of the data."""

import pytest
import torch
from torch import nn

from das_lm import ContinualTrainer, DASConfig
from das_lm.errors import UserError
from das_lm.methods import NCL
from das_lm.methods.ncl import Kronecker
from tests.helpers import build_tokenizer, random_blocks, tiny_roberta

ROWS, INPUTS, OUTPUTS = 12, 3, 2


class Regression(nn.Module):
    """Linear regression: the loss is a quadratic function of the parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(INPUTS, OUTPUTS)

    def forward(self, inputs, labels=None):
        logits = self.linear(inputs)
        return {"loss": None if labels is None else nn.functional.mse_loss(logits, labels), "logits": logits}


def data(seed, count=ROWS):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"inputs": torch.randn(INPUTS, generator=generator), "labels": torch.randn(OUTPUTS, generator=generator)}
        for _ in range(count)
    ]


def config(directory, **options):
    plain = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.25}
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "save_strategy": "no", "logging_steps": 1000}
    sizes = {"max_steps": 1, "per_device_train_batch_size": ROWS, "max_length": 12, "fisher": "empirical"}
    return DASConfig(output_dir=str(directory), **{**plain, **quiet, **sizes, **options})


def train(model, method, rows, directory, **options):
    language = hasattr(model, "config")
    trainer = ContinualTrainer(
        model=model,
        args=config(directory, **options),
        method=method,
        train_dataset=rows,
        processing_class=build_tokenizer() if language else None,
    )
    trainer.train()
    return trainer


def joined(tensors):
    """[W b], row by row."""
    weight, bias = tensors
    return torch.cat([weight, bias[:, None]], dim=1).flatten()


def gradients(model, rows):
    """Of −log p of each row, shape [rows, parameters]; the mean over outputs is the row's loss."""
    losses = [model(row["inputs"][None], row["labels"][None])["loss"] for row in rows]
    return torch.stack([joined(torch.autograd.grad(loss, list(model.parameters()))) for loss in losses])


@pytest.mark.parametrize("curvature", ["diagonal", "kronecker"])
def test_every_step_is_the_closed_form(curvature, tmp_path):
    """Two domains of three steps over all rows, against dense matrices."""
    model, method = Regression(), NCL()
    options = {"ncl_curvature": curvature, "ncl_prior": 3.0, "ncl_radius": 1e6, "learning_rate": 0.25}
    mean = joined(model.parameters()).detach()
    precision = 3.0 * torch.eye(len(mean), dtype=torch.float64)
    factors = Kronecker(*(3**0.5 * torch.eye(size, dtype=torch.float64) for size in (INPUTS + 1, OUTPUTS)))
    for domain in range(2):
        rows, expected = data(domain), Regression()
        expected.load_state_dict(model.state_dict())
        for _ in range(3):
            summed = gradients(expected, rows).sum(0)
            theta = joined(expected.parameters()).detach()
            step = -torch.linalg.solve(precision, summed.double()).float() - (theta - mean)
            theta = (theta + 0.25 * step).view(OUTPUTS, INPUTS + 1)
            with torch.no_grad():
                expected.linear.weight.copy_(theta[:, :-1])
                expected.linear.bias.copy_(theta[:, -1])
        train(model, method, rows, tmp_path, max_steps=3, **options)
        torch.testing.assert_close(dict(model.named_parameters()), dict(expected.named_parameters()))
        mean = joined(model.parameters()).detach()
        torch.testing.assert_close(joined([method.mean["linear.weight"], method.mean["linear.bias"]]), mean)
        each = gradients(model, rows).double()
        if curvature == "diagonal":
            precision += torch.diag(each.square().sum(0))
            ours = torch.diag(joined([method.precision["linear.weight"], method.precision["linear.bias"]])).double()
        else:
            inputs = torch.stack([torch.cat([row["inputs"], torch.ones(1)]) for row in rows]).double()
            deltas = each.view(ROWS, OUTPUTS, INPUTS + 1)[:, :, -1]  # of the bias
            factors = factors + Kronecker(inputs.mT @ inputs / ROWS, deltas.mT @ deltas)
            precision = torch.kron(factors.outputs, factors.inputs)
            ours = torch.kron(method.factors["linear"].outputs, method.factors["linear"].inputs)
        torch.testing.assert_close(ours, precision, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("curvature", ["diagonal", "kronecker"])
def test_a_step_that_leaves_the_trust_region_ends_on_its_border(curvature, tmp_path):
    def moved(radius):
        model, method = Regression(), NCL()
        train(model, method, data(0), tmp_path, ncl_curvature=curvature, ncl_prior=2.0)
        start = joined(model.parameters()).detach()
        if curvature == "diagonal":
            precision = torch.diag(joined([method.precision["linear.weight"], method.precision["linear.bias"]]))
        else:
            precision = torch.kron(method.factors["linear"].outputs, method.factors["linear"].inputs).float()
        train(model, method, data(1), tmp_path, ncl_curvature=curvature, ncl_radius=radius)
        step = (joined(model.parameters()).detach() - start) / 0.25
        return step, (step @ precision @ step / 2).sqrt()

    free, length = moved(1e6)
    inside, same = moved(float(length) * 1.01)
    bounded, radius = moved(float(length) / 7)
    torch.testing.assert_close(inside, free)
    torch.testing.assert_close(radius, length / 7, rtol=1e-3, atol=0)
    torch.testing.assert_close(bounded, free / 7, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("curvature", ["diagonal", "kronecker"])
@pytest.mark.parametrize("kind", ["module", "language model"])
def test_the_precision_does_not_depend_on_the_batch_size(kind, curvature, tmp_path):
    states = []
    for size in (1, 8):
        model, rows = (tiny_roberta(), random_blocks(8)) if kind == "language model" else (Regression(), data(0, 8))
        method = NCL()
        options = {"ncl_curvature": curvature, "importance_batch_size": size, "per_device_train_batch_size": 4}
        train(model, method, rows, tmp_path, **options)
        states.append(method.state_dict())
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)


def test_of_one_example_the_kronecker_product_is_the_fisher(tmp_path):
    model, method, rows = Regression(), NCL(), data(0, 1)
    train(model, method, rows, tmp_path, ncl_curvature="kronecker", per_device_train_batch_size=1)
    fisher = method._kronecker_fisher()["linear"]
    each = gradients(model, rows).double()
    torch.testing.assert_close(torch.kron(fisher.outputs, fisher.inputs), each.mT @ each, rtol=1e-5, atol=1e-8)


def random_factors(seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, size, generator=generator, dtype=torch.float64) for size in (5, 4)]
    return [part @ part.mT for part in parts]


def dense(kronecker):
    return torch.kron(kronecker.inputs, kronecker.outputs)


def test_the_sum_is_exact_where_factors_are_proportional():
    a, g = random_factors(0)
    b, h = random_factors(1)
    for one, other in (((a, g), (0.3 * a, h)), ((a, g), (b, 7 * g)), ((a, g), (b, 0 * h)), ((a, g), (0 * b, h))):
        first, second = Kronecker(*one), Kronecker(*other)
        torch.testing.assert_close(dense(first + second), dense(first) + dense(second))


@pytest.mark.parametrize("seed", range(5))
def test_the_sum_is_the_nearest_product(seed):
    first, second = Kronecker(*random_factors(2 * seed)), Kronecker(*random_factors(2 * seed + 1))
    exact, nearest = dense(first) + dense(second), first + second
    error = (dense(nearest) - exact).norm()
    naive = Kronecker(first.inputs + second.inputs, first.outputs + second.outputs)
    assert error < (dense(naive) - exact).norm()
    # All singular values of the rearranged sum but the largest are what is lost.
    rearranged = exact.view(5, 4, 5, 4).permute(0, 2, 1, 3).reshape(25, 16)
    torch.testing.assert_close(error, torch.linalg.svdvals(rearranged)[1:].norm())
    for factor in (nearest.inputs, nearest.outputs):
        assert torch.equal(factor, factor.mT) and torch.linalg.eigvalsh(factor).min() > 0
    matrix = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(
        nearest.times(matrix).flatten(), torch.kron(nearest.outputs, nearest.inputs) @ matrix.flatten()
    )
    torch.testing.assert_close(nearest.solve(nearest.times(matrix)), matrix, rtol=1e-6, atol=1e-6)


def test_the_signs_of_singular_vectors_do_not_matter(monkeypatch):
    first, second = Kronecker(*random_factors(0)), Kronecker(*random_factors(1))
    expected, svd = first + second, torch.linalg.svd

    def flipped(matrix):
        left, values, right = svd(matrix)
        return -left, values, -right

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    assert torch.equal((first + second).inputs, expected.inputs)
    assert torch.equal((first + second).outputs, expected.outputs)


def test_in_a_language_model(tmp_path):
    """Predictions are the masked tokens; a decoder that shares its weight with the embedding stays diagonal."""
    model, method = tiny_roberta(), NCL()
    trainer = train(model, method, random_blocks(16), tmp_path, ncl_curvature="kronecker")
    blocks = trainer.train_dataset.at(-3)
    assert method._predictions == sum((blocks[i]["labels"] != -100).sum() for i in range(16)) > 16
    assert "lm_head.dense" in method.factors and "lm_head.decoder" not in method.factors
    assert "roberta.embeddings.word_embeddings.weight" in method.precision
    inside = {f"{layer}.{name}" for layer in method.factors for name in ("weight", "bias")}
    assert method.precision.keys() | inside == dict(model.named_parameters()).keys()
    assert not method.precision.keys() & inside
    assert all((value >= 1).all() for value in method.precision.values())
    other = NCL()
    other.attach(trainer)
    trainer.args.ncl_curvature = "diagonal"
    with pytest.raises(UserError, match="ncl_curvature"):
        other.load_state_dict(method.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "adamw_torch"}, "adamw_torch"),
        ({"optim_args": "momentum=0.9"}, "momentum"),
        ({"weight_decay": 0.1}, "weight_decay is 0.1"),
        ({"max_grad_norm": 1.0}, "max_grad_norm is 1.0"),
    ],
)
def test_anything_but_plain_sgd_is_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(Regression(), "ncl", data(0), tmp_path, **options)


@pytest.mark.parametrize("other", ["ewc", "agem", "spg"])
def test_what_changes_the_step_is_refused(other, tmp_path):
    with pytest.raises(UserError, match="makes the step itself"):
        train(Regression(), ["ncl", other], data(0), tmp_path)


def test_what_leaves_the_step_alone_is_not(tmp_path):
    model = Regression()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, ["ncl", "replay", "ema"], data(0), tmp_path)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
