"""SPG: importance equals a loop by hand, and masks what one step does, of SGD and of AdamW."""

import pytest
import torch

from das_lm import ContinualTrainer, DASConfig
from das_lm.classic.models import MLP
from das_lm.methods import SPG
from das_lm.methods.das import GRADIENT_EPOCH
from tests.helpers import tiny_roberta
from tests.methods.helpers import World, equal, parameters

TARGETS = [("sgd", "gradient"), ("adamw_torch", "update")]


def task_rows(task, count=16):
    generator = torch.Generator().manual_seed(task)
    inputs = torch.randn(count, 5, generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    return [{"inputs": x, "labels": y, "task": torch.tensor(task)} for x, y in zip(inputs, labels, strict=True)]


def train(model, method, rows, directory, **options):
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "save_strategy": "no", "logging_steps": 1000}
    sizes = {"max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 0.05}
    arguments = DASConfig(output_dir=str(directory), **{**quiet, **sizes, "importance_batch_size": 5, **options})
    trainer = ContinualTrainer(model=model, args=arguments, method=method, train_dataset=rows, domain="d")
    trainer.train()
    return trainer


def heads(seed=0):
    return MLP([5, 6, 4], [3, 3, 3], seed=seed)


def by_hand(gradient):
    return torch.tanh((gradient - gradient.mean()) / gradient.std()).abs()


def summed_gradients(model, losses):
    """Of every parameter of the body, one backward pass per row."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters() if not name.startswith("heads.")}
    for loss in losses:
        found = torch.autograd.grad(loss, [dict(model.named_parameters())[name] for name in total])
        for name, gradient in zip(total, found, strict=True):
            total[name] += gradient
    return total


@pytest.mark.parametrize("kind", ["module", "language model"])
@pytest.mark.parametrize(("optim", "target"), TARGETS)
def test_the_first_domain_is_naive(kind, optim, target, tmp_path):
    options = {"optim": optim, "soft_mask_target": target, "max_steps": 3, "save_steps": 10}
    ours, _ = World(kind).learn(tmp_path / "spg", "spg", domains=1, **options)
    naive, _ = World(kind).learn(tmp_path / "naive", "naive", domains=1, **options)
    assert equal(parameters(ours), parameters(naive))


def test_strength_0_is_naive(tmp_path):
    naive, _ = World("module").learn(tmp_path / "naive", "naive")
    for strength in (0.0, 1.0):
        ours, _ = World("module").learn(tmp_path / "spg", "spg", soft_mask_strength=strength)
        assert equal(parameters(ours), parameters(naive)) == (strength == 0)


def test_importance_of_several_heads(tmp_path):
    """Of the loss, and of every earlier head's logits on the present data; the largest, over all domains."""
    model, method = heads(), SPG()
    expected = {}
    for task in range(3):
        rows = task_rows(task)
        train(model, method, rows, tmp_path)
        losses = [
            [model(**{name: value[None] for name, value in row.items()})["loss"] for row in rows],
            *([model.head_logits(row["inputs"][None], earlier).sum() for row in rows] for earlier in range(task)),
        ]
        for one in losses:
            for name, gradient in summed_gradients(model, one).items():
                new = by_hand(gradient)
                expected[name] = torch.maximum(expected[name], new) if name in expected else new
        torch.testing.assert_close(method.importance, expected, rtol=1e-3, atol=1e-4)
        assert method.tasks == set(range(task + 1))
    assert not any(name.startswith("heads.") for name in method.importance)


def test_importance_in_a_language_model(tmp_path):
    """A single head: of every parameter, with dropout off, the gradient of the loss over all masked tokens."""
    world, model, method = World("language model"), tiny_roberta(0.1), SPG()
    trainer = world.train(tmp_path, model, method, 0, importance_samples=100, importance_batch_size=5, save_steps=10)
    assert method.importance.keys() == dict(model.named_parameters()).keys()
    blocks = trainer.train_dataset.at(GRADIENT_EPOCH)
    batch = trainer.data_collator([blocks[index] for index in range(len(blocks))])
    model.eval()
    loss = torch.nn.functional.cross_entropy(
        model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.mT, batch["labels"], reduction="sum"
    )
    found = torch.autograd.grad(loss, list(model.parameters()))
    for (name, value), gradient in zip(method.importance.items(), found, strict=True):
        if not name.endswith("key.bias"):  # whose gradient is 0 but for rounding
            torch.testing.assert_close(value, by_hand(gradient), rtol=1e-2, atol=1e-3, msg=name)


def one_step(directory, method_name, optim, target, importance=None, strength=1.0):
    """What one step of the second task does: parameters before and after it."""
    model, method = heads(), SPG()
    if method_name == "spg":
        method.importance = {name: value.clone() for name, value in importance.items()}
    before = parameters(model)
    options = {"optim": optim, "soft_mask_target": target, "soft_mask_strength": strength}
    options["weight_decay"] = 0.1 if target == "update" else 0.0  # SGD adds it to the gradient after the mask
    train(model, method if method_name == "spg" else "naive", task_rows(1), directory, **options)
    return before, parameters(model)


@pytest.mark.parametrize(("optim", "target"), TARGETS)
def test_a_step_is_scaled(optim, target, tmp_path):
    """In proportion to 1 − strength γ; bit for bit where γ is 0 or 1; heads by the mean γ of the others."""
    torch.manual_seed(0)
    body = {name: p for name, p in heads().named_parameters() if not name.startswith("heads.")}
    importance = {name: torch.rand_like(parameter).round(decimals=1) for name, parameter in body.items()}
    mean = torch.cat([value.flatten() for value in importance.values()]).mean()
    before, naive = one_step(tmp_path, "naive", optim, target)
    for strength in (1.0, 0.5):
        _, after = one_step(tmp_path, "spg", optim, target, importance, strength)
        for name, old in before.items():
            kept = 1 - strength * importance.get(name, mean)
            torch.testing.assert_close(after[name], old + kept * (naive[name] - old), rtol=1e-5, atol=1e-7)
            if name in importance:
                free = importance[name] == 0
                assert free.any() or name.endswith("bias")
                assert torch.equal(after[name][free], naive[name][free])


@pytest.mark.parametrize(("optim", "target"), TARGETS)
def test_a_fully_important_parameter_stays(optim, target, tmp_path):
    model, method = heads(), SPG()
    method.importance = {n: torch.ones_like(p) for n, p in model.named_parameters() if not n.startswith("heads.")}
    name = "body.0.weight"
    method.importance[name][2:] = 0.5
    before = parameters(model)
    options = {"optim": optim, "soft_mask_target": target, "weight_decay": 0.0, "max_steps": 5}
    train(model, method, task_rows(1), tmp_path, **options)
    after = parameters(model)
    assert torch.equal(after[name][:2], before[name][:2]) and not torch.equal(after[name][2:], before[name][2:])
    assert torch.equal(after["body.2.weight"], before["body.2.weight"])


def test_one_head_is_masked_by_parameter(tmp_path):
    model, method = MLP([5, 6], 3), SPG()
    train(model, method, [{k: v for k, v in row.items() if k != "task"} for row in task_rows(0)], tmp_path)
    assert method.importance.keys() == dict(model.named_parameters()).keys()
    assert 0 < method.state()["spg_mean_importance"] < 1
