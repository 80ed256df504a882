"""Penalties against closed forms: their gradients, their importances, and what they measure on the way."""

import copy

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from das_lm import ContinualTrainer, DASConfig
from das_lm.data.blocks import TrainingRows
from das_lm.errors import UserError
from das_lm.methods import EWC, L2, MAS, METHODS, SCP, SI, RWalk
from das_lm.methods.penalty import Penalty
from tests.helpers import build_tokenizer, random_blocks, tiny_roberta


class Linear(nn.Module):
    """y = W x + b with squared error, or softmax regression on classes."""

    def __init__(self, outputs: int = 1, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(3, outputs)

    def forward(self, inputs, labels=None):
        logits = self.layer(inputs)
        if labels is None:
            return {"logits": logits}
        if labels.is_floating_point():
            return {"loss": (logits.squeeze(-1) - labels).square().mean(), "logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(count: int = 16, classes: int = 0, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=generator)
    values = torch.randn(count, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator) if classes else values
    return [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]


def trainer_of(directory, model, method, data, **options) -> ContinualTrainer:
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "save_strategy": "no",
    }
    arguments = DASConfig(output_dir=str(directory), **{**defaults, **options})
    return ContinualTrainer(model, arguments, method, train_dataset=data)


def stacked(data: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([row["inputs"] for row in data]), torch.stack([row["labels"] for row in data])


def with_ones(inputs: torch.Tensor) -> torch.Tensor:
    return torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Weight and bias side by side, shape [outputs, 4]."""
    return torch.cat([tensors["layer.weight"], tensors["layer.bias"][:, None]], dim=1)


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if issubclass(kind, Penalty)])
def test_the_gradient_of_a_penalty_is_its_closed_form(name, tmp_path):
    """One SGD step of the second domain: θ − lr (g + λ Ω (θ − θ*)), from parameters moved away from the anchor."""
    model, method = Linear(), METHODS[name]()
    trainer_of(tmp_path, model, method, rows(), scp_projections=3, rwalk_interval=2).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    options = {"max_steps": 1, "penalty_weight": 0.7, "scp_projections": 3, "rwalk_interval": 2}
    importance, anchor = copy.deepcopy((method.importance, method.anchor))
    trainer = trainer_of(tmp_path, model, method, rows(4, seed=1), **options)
    method.measure = lambda: importance
    trainer.train()
    reference = Linear()
    reference.load_state_dict(before)
    inputs, labels = stacked(rows(4, seed=1))
    reference(inputs, labels)["loss"].backward()
    for key, parameter in reference.named_parameters():
        pull = 0.7 * importance[key] * (before[key] - anchor[key])
        torch.testing.assert_close(
            dict(model.named_parameters())[key], before[key] - 0.05 * (parameter.grad + pull), rtol=1e-5, atol=1e-6
        )
        assert pull.abs().max() > 1e-5


def measured(method: Penalty, model: nn.Module, data, directory, **options) -> dict[str, torch.Tensor]:
    """The importance that a method measures on all of the data, with the model as it is."""
    trainer = trainer_of(directory, model, method, data, importance_samples=len(data), **options)
    return flat({name: value.detach() for name, value in trainer.methods[0].measure().items()})


def test_empirical_fisher_of_a_softmax_regression(tmp_path):
    """∂ log p(y|x)/∂W = (1_y − p) xᵀ: the mean of the squares, per example."""
    model, data = Linear(4), rows(classes=4)
    inputs, labels = stacked(data)
    errors = nn.functional.one_hot(labels, 4) - model(inputs)["logits"].softmax(-1)
    expected = (errors.square().T @ with_ones(inputs).square()) / len(data)
    ours = measured(EWC(), model, data, tmp_path, fisher="empirical")
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-5, atol=1e-7)
    batch_mean = ((errors.T @ with_ones(inputs)) / len(data)).square()
    assert (ours / batch_mean.detach()).median() > 3  # the trap: the square of the mean shrinks with the batch


def test_true_fisher_of_a_softmax_regression(tmp_path):
    """Its expectation over labels is Σ_y p_y (1_y − p)² = p (1 − p) for each class, times x²."""
    model, data = Linear(4), rows(4000, classes=4)
    inputs, _ = stacked(data)
    p = model(inputs)["logits"].softmax(-1)
    expected = ((p * (1 - p)).T @ with_ones(inputs).square()) / len(data)
    ours = measured(EWC(), model, data, tmp_path, fisher="true", importance_batch_size=500)
    torch.testing.assert_close(ours, expected.detach(), rtol=0.12, atol=0)


def test_true_fisher_of_a_regression(tmp_path):
    """−log p = (y − f)², of variance ½: E[(2 (y − f) x)²] = 2 x²."""
    model, data = Linear(), rows(4000)
    inputs, _ = stacked(data)
    expected = 2 * with_ones(inputs).square().mean(0)
    ours = measured(EWC(), model, data, tmp_path, fisher="true", importance_batch_size=500)
    torch.testing.assert_close(ours[0], expected, rtol=0.12, atol=0)


def test_mas_of_a_linear_model(tmp_path):
    """|∂‖f‖²/∂W| = |2 f xᵀ|, the mean over examples; labels play no part."""
    model, data = Linear(2), rows(classes=2)
    inputs, labels = stacked(data)
    outputs = model(inputs)["logits"].detach()
    expected = (2 * outputs).abs().T @ with_ones(inputs).abs() / len(data)
    torch.testing.assert_close(measured(MAS(), model, data, tmp_path), expected, rtol=1e-5, atol=1e-6)
    swapped = [{**row, "labels": 1 - row["labels"]} for row in data]
    torch.testing.assert_close(measured(MAS(), model, swapped, tmp_path), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_scp_of_a_linear_model(chunk, tmp_path, monkeypatch):
    """∂⟨ξ, f̄⟩/∂W = ξ x̄ᵀ; the mean of ξ_k² over the sphere in two dimensions is ½."""
    monkeypatch.setattr(SCP, "MAX_ELEMENTS", chunk)
    model, data = Linear(2), rows(classes=2)
    mean = with_ones(stacked(data)[0]).mean(0)
    ours = measured(SCP(), model, data, tmp_path, scp_projections=600, importance_batch_size=16)
    torch.testing.assert_close(ours, mean.square().expand(2, -1) / 2, rtol=0.12, atol=1e-6)
    torch.testing.assert_close(ours.sum(0), mean.square(), rtol=1e-4, atol=1e-6)  # ‖ξ‖ = 1


def test_importance_does_not_depend_on_the_batch_size(tmp_path):
    model, data = Linear(4), rows(classes=4)
    for method, options in ((EWC, {"fisher": "empirical"}), (MAS, {}), (SCP, {"scp_projections": 5})):
        ours = [measured(method(), model, data, tmp_path, importance_batch_size=size, **options) for size in (1, 5)]
        torch.testing.assert_close(*ours, rtol=1e-5, atol=1e-8)


def test_separate_penalties_are_one_quadratic(tmp_path):
    """Σ_t F_t (θ − θ_t)² and the one that is kept differ by a constant: equal gradients everywhere."""
    model, method = Linear(), EWC()
    kept = []
    for seed in range(3):
        trainer_of(tmp_path, model, method, rows(seed=seed), importance_samples=16, fisher="empirical").train()
        alone = EWC()
        trainer_of(tmp_path, model, alone, rows(seed=seed), importance_samples=16, fisher="empirical")
        kept.append((alone.measure()["layer.weight"], model.layer.weight.detach().clone()))
    somewhere = torch.randn(1, 3)
    expected = sum(fisher * (somewhere - anchor) for fisher, anchor in kept)
    ours = method.importance["layer.weight"] * (somewhere - method.anchor["layer.weight"])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_online_ewc_decays_the_old_fisher_around_the_latest_parameters(tmp_path):
    model, method = Linear(), EWC()
    fishers = []
    options = {"importance_samples": 16, "fisher": "empirical", "ewc_mode": "online", "ewc_decay": 0.5}
    for seed in range(2):
        trainer_of(tmp_path, model, method, rows(seed=seed), **options).train()
        alone = EWC()
        trainer_of(tmp_path, model, alone, rows(seed=seed), **options)
        fishers.append(alone.measure()["layer.weight"])
    torch.testing.assert_close(method.importance["layer.weight"], 0.5 * fishers[0] + fishers[1])
    assert torch.equal(method.anchor["layer.weight"], model.layer.weight)


def test_l2_holds_everything_alike(tmp_path):
    model, method = Linear(), L2()
    trainer_of(tmp_path, model, method, rows()).train()
    assert all((importance == 1).all() for importance in method.importance.values())
    assert torch.equal(method.anchor["layer.weight"], model.layer.weight)


def path_error(directory, rate: float) -> float:
    """|Σ ω − fall of the loss| of full-batch SGD on a quadratic, over a fixed stretch of time."""
    model, data, method = Linear(), rows(), SI()
    inputs, labels = stacked(data)
    with torch.no_grad():
        start = model(inputs, labels)["loss"]
    options = {"max_steps": round(0.4 / rate), "learning_rate": rate, "per_device_train_batch_size": 16}
    trainer = trainer_of(directory, model, method, data, **options)
    paths = []
    method.measure = lambda: (
        paths.append(sum(path.sum() for path in method.path.values()))
        or {name: torch.zeros_like(parameter) for name, parameter in method.parameters().items()}
    )
    trainer.train()
    with torch.no_grad():
        end = model(inputs, labels)["loss"]
    return abs((paths[0] - (start - end)).item())


def test_the_path_integral_approaches_the_fall_of_the_loss_at_first_order(tmp_path):
    """Of the quadratic, g·Δθ overshoots by ½ Δθᵀ H Δθ a step: half the step size, half the error."""
    errors = [path_error(tmp_path, rate) for rate in (0.02, 0.01, 0.005)]
    assert errors[0] > 1e-3
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("method", [SI, RWalk])
def test_the_path_sees_the_gradient_without_penalty_and_without_clipping(method, tmp_path):
    """A penalty and clipping change the step, not the gradient that the path multiplies it with."""
    model = Linear()
    kept = method()
    trainer_of(tmp_path, model, kept, rows(), rwalk_interval=1).train()
    with torch.no_grad():
        model.layer.weight.add_(1)
    seen = []
    trainer = trainer_of(
        tmp_path, model, kept, rows(4, seed=1), max_steps=1, penalty_weight=100.0, max_grad_norm=0.01, rwalk_interval=5
    )
    inputs, labels = stacked(rows(4, seed=1))
    expected = torch.autograd.grad(model(inputs, labels)["loss"], model.layer.weight)[0]
    after_step = kept.after_step
    kept.after_step = lambda: (seen.append(kept._gradient["layer.weight"].clone()), after_step())
    trainer.train()
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-6)


def test_si_by_hand(tmp_path):
    """Two steps on a fixed gradient: ω = lr g² a step, Ω = ω / (Δθ² + ξ)."""

    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, inputs, labels=None):
            return (self.weight * torch.tensor([1.0, -2.0])).sum() + 0 * inputs.sum()

    method = SI()
    options = {"max_steps": 2, "learning_rate": 0.1, "si_damping": 0.5}
    trainer_of(tmp_path, Slope(), method, rows(8), **options).train()
    gradient = torch.tensor([1.0, -2.0])
    expected = 2 * 0.1 * gradient**2 / ((2 * 0.1 * gradient) ** 2 + 0.5)
    torch.testing.assert_close(method.importance["weight"], expected)


def test_rwalk_by_hand(tmp_path):
    """Fisher and score of two steps of softmax regression, and what a second domain makes of the first's score."""
    model, method, data = Linear(2), RWalk(), rows(8, classes=2)
    options = {"max_steps": 2, "rwalk_interval": 1, "rwalk_decay": 0.75, "fisher": "empirical"}
    trainer = trainer_of(tmp_path, model, method, data, **options)
    order = [trainer.train_dataset[position] for position in range(8)]
    reference = copy.deepcopy(model)
    fisher, score = None, torch.zeros(2, 4)
    for step in range(2):
        inputs, labels = stacked(order[4 * step : 4 * step + 4])
        before = flat({n: p.detach().clone() for n, p in reference.named_parameters()})
        reference.zero_grad()
        reference(inputs, labels)["loss"].backward()
        gradient = flat({n: p.grad.clone() for n, p in reference.named_parameters()})
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.05 * parameter.grad
        moved = flat({n: p.detach() for n, p in reference.named_parameters()}) - before
        errors = nn.functional.one_hot(labels, 2) - reference(inputs)["logits"].softmax(-1)
        new = errors.square().T @ with_ones(inputs).square() / 4
        fisher = new if fisher is None else 0.75 * fisher + 0.25 * new
        score = score + (-gradient * moved).clamp(min=0) / (0.5 * fisher * moved**2 + RWalk.EPSILON)
    trainer.train()
    torch.testing.assert_close(flat(method.fisher), fisher.detach(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(flat(method.old_score), score.detach(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        flat(method.importance), (fisher / fisher.max() + score / score.max()).detach(), rtol=1e-4, atol=1e-6
    )
    trainer_of(tmp_path, model, method, data, **{**options, "learning_rate": 1e-9}).train()
    torch.testing.assert_close(flat(method.old_score), score.detach() / 2, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("others", [[], ["ema", "interpolate"]])
def test_the_last_stretch_of_rwalk_ends_with_the_domain(others, tmp_path):
    """Two steps, with an interval of five: the score is that of the path to where the steps have led, whatever is made
    of the weights then. So it is where a callback ends the training before its time."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    data, reference = rows(8, classes=2), Linear(2)
    for max_steps, callbacks in ((2, []), (9, [Stop()])):
        method = RWalk()
        options = {"max_steps": max_steps, "rwalk_interval": 5, "fisher": "empirical", "importance_batch_size": 8}
        trainer = trainer_of(tmp_path, Linear(2), [method, *others], data, **options)
        for callback in callbacks:
            trainer.add_callback(callback)
        order = [trainer.train_dataset[position] for position in range(8)]
        trainer.train()
        reference.load_state_dict(Linear(2).state_dict())
        start = flat({n: p.detach().clone() for n, p in reference.named_parameters()})
        end, fall = start, torch.zeros(2, 4)
        for step in range(2):
            reference.zero_grad()
            reference(*stacked(order[4 * step : 4 * step + 4]))["loss"].backward()
            gradient = flat({n: p.grad for n, p in reference.named_parameters()})
            with torch.no_grad():
                for parameter in reference.parameters():
                    parameter -= 0.05 * parameter.grad
            before, end = end, flat({n: p.detach().clone() for n, p in reference.named_parameters()})
            fall -= gradient * (end - before)
        inputs, labels = stacked(data)
        errors = nn.functional.one_hot(labels, 2) - reference(inputs)["logits"].detach().softmax(-1)
        fisher = errors.square().T @ with_ones(inputs).square() / 8
        score = fall.clamp(min=0) / (0.5 * fisher * (end - start) ** 2 + RWalk.EPSILON)
        torch.testing.assert_close(flat(method.fisher), fisher, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(flat(method.old_score), score, rtol=1e-4, atol=1e-6)
        assert method.importance["layer.weight"].any()


@pytest.mark.parametrize("statistic", ["fisher", "mas"])
def test_of_a_language_model_a_row_is_a_sequence(statistic, tmp_path):
    """The gradient of the summed log-likelihood of each sequence, squared (or its absolute value), one at a time."""
    model, tokenizer = tiny_roberta(0.1), build_tokenizer()
    arguments = DASConfig(
        output_dir=str(tmp_path), max_length=12, importance_samples=5, importance_batch_size=3, fisher="empirical",
        use_cpu=True, disable_tqdm=True, report_to=[],
    )  # fmt: skip
    method = EWC() if statistic == "fisher" else MAS()
    trainer = ContinualTrainer(model, arguments, method, train_dataset=random_blocks(5), processing_class=tokenizer)
    ours = method.measure()
    model.eval()
    parameters = {name: parameter for name, parameter in model.named_parameters()}
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for position in range(5):
        row = trainer.data_collator([trainer.train_dataset.at(-3)[position]])
        logits = model(row["input_ids"], attention_mask=row["attention_mask"]).logits[row["labels"] != -100]
        targets = row["labels"][row["labels"] != -100]
        value = (
            nn.functional.cross_entropy(logits, targets, reduction="sum")
            if statistic == "fisher"
            else logits.square().sum()
        )
        for total, gradient in zip(
            expected.values(), torch.autograd.grad(value, list(parameters.values()), allow_unused=True), strict=True
        ):
            if gradient is not None:
                total += (gradient.square() if statistic == "fisher" else gradient.abs()) / 5
    for name, total in expected.items():
        torch.testing.assert_close(ours[name], total, rtol=1e-4, atol=1e-5 * float(total.max()), msg=name)


def test_a_module_without_units_refuses_a_learning_rate_for_what_is_no_unit(tmp_path):
    with pytest.raises(UserError, match="non_unit_lr_scale"):
        trainer_of(tmp_path, Linear(), "naive", rows(), non_unit_lr_scale=0.0)


def test_rows_without_a_data_set_of_their_own_are_wrapped(tmp_path):
    trainer = trainer_of(tmp_path, Linear(), "naive", rows())
    assert isinstance(trainer.train_dataset, TrainingRows) and len(trainer.train_dataset) == 16
