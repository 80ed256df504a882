"""Evaluation and importance: what they give, and that training does not see them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from das_lm.units import gated
from tests.helpers import WORDS, random_blocks, tiny_roberta
from tests.training.helpers import assert_equal, importance_of, losses, parameters, trainer_of

# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_changes_nothing_of_training(tmp_path):
    """With dropout: neither before the first step nor in between. (A data loader would advance the random state.)"""
    held_out = {"bio": random_blocks(6, seed=9)}
    runs = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        run = trainer_of(tmp_path, model=tiny_roberta(0.1), held_out=held_out, max_steps=5, **options)
        if options:
            run.evaluate()
        run.train()
        runs.append(run)
    assert len(losses(runs[1], "eval_bio_loss")) == 5
    assert_equal(parameters(runs[0].model), parameters(runs[1].model))
    assert_equal(importance_of(runs[0]).values, importance_of(runs[1]).values)


def test_evaluate_equals_a_loop_over_documents(tmp_path):
    """Exact sums over the predicted tokens of documents of several windows, dropout off, in batches of any size."""
    words = np.random.default_rng(0).choice(WORDS, size=200).tolist()
    lengths = (30, 4, 11, 1, 25, 7)
    starts = np.cumsum((0, *lengths))
    documents = Dataset.from_dict(
        {"text": [" ".join(words[s : s + n]) for s, n in zip(starts, lengths, strict=False)]}
    )
    measured = []
    for size in (1, 4, 64):
        run = trainer_of(
            tmp_path,
            model=tiny_roberta(0.3),
            held_out={"bio": documents},
            per_device_eval_batch_size=size,
            mlm_probability=0.4,
            dataloader_drop_last=True,  # of training
        )
        measured.append(run.evaluate())
        assert run.model.training
    held_out = run.eval_dataset["bio"]
    assert len(held_out) == 3 + 1 + 2 + 1 + 3 + 1

    run.model.eval()
    nats, tokens, correct = np.zeros(6), np.zeros(6), np.zeros(6)
    for index in range(len(held_out)):
        window = held_out[index]
        with torch.no_grad():
            logits = run.model(input_ids=torch.tensor(window["input_ids"])[None]).logits[0]
        for position, label in enumerate(window["labels"]):
            if label != -100:
                nats[window["document"]] += F.cross_entropy(logits[position], torch.tensor(label)).item()
                tokens[window["document"]] += 1
                correct[window["document"]] += logits[position].argmax().item() == label
    assert (tokens > 0).all()
    for metrics in measured:
        assert metrics["eval_bio_loss"] == pytest.approx(nats.sum() / tokens.sum(), rel=1e-5)
        assert metrics["eval_bio_accuracy"] == pytest.approx(correct.sum() / tokens.sum(), abs=1e-9)
        assert metrics["eval_bio_tokens"] == tokens.sum() and metrics["eval_bio_documents"] == 6


def test_two_models_see_the_same_held_out_masks(tmp_path):
    """Trained or not: the masks are of the seed and the text alone."""
    seen = []
    for seed in (0, 1):
        run = trainer_of(tmp_path, model=tiny_roberta(seed=seed), held_out=random_blocks(5, seed=9))
        run.train()
        seen.append([run.eval_dataset[index]["labels"].tolist() for index in range(5)])
    assert seen[0] == seen[1]


# ---- importance from dropout ----------------------------------------------------------------------------------------


def proxy_of(run):
    return run.methods[0]._proxy_importance()


@pytest.mark.parametrize("proxy", ["hidden", "logits"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_proxy_importance_is_not_zero(dropout, proxy, tmp_path):
    """From dropout, or where the model has none, from drops through the gates."""
    run = trainer_of(tmp_path, model=tiny_roberta(dropout), proxy=proxy)
    assert run.methods[0].drops_units == (dropout == 0)
    for key, value in proxy_of(run).items():
        assert value.min() >= 0 and (value > 0).float().mean() > 0.9, key
    assert run.model.training


def test_proxy_of_a_model_without_dropout_under_checkpointing(tmp_path):
    """The drops are still there when the forward pass runs again."""
    expected = proxy_of(trainer_of(tmp_path))
    run = trainer_of(tmp_path)
    run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for key, value in proxy_of(run).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-7)


def test_without_drops_the_proxy_of_a_model_without_dropout_is_zero(tmp_path):
    """METHODS §1, trap 5: why the gates have to drop units."""
    run = trainer_of(tmp_path, gate_dropout=0.0)
    assert all(value.abs().max() < 1e-5 for value in proxy_of(run).values())


def test_proxy_leaves_the_random_state_alone(tmp_path):
    """And does not depend on it."""
    run = trainer_of(tmp_path, model=tiny_roberta(0.1))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = proxy_of(run)
    assert torch.equal(torch.rand(3), expected)
    assert_equal(proxy_of(run), first)


def test_proxy_equals_a_loop_over_examples(tmp_path):
    """Without dropout, one example at a time and with the gates written out: |∂ KL(p₁ ‖ p₂)/∂g| with the gate shared
    by both views, mean over the tokens."""
    run = trainer_of(tmp_path, importance_samples=5)
    units, method = run.units, run.methods[0]
    blocks = run.train_dataset.at(-1)
    total = {key: torch.zeros(size) for key, size in units.sizes.items()}
    for index in range(5):
        row = blocks[index]
        ids = torch.tensor(np.where(row["labels"] == -100, row["input_ids"], row["labels"]))[None]
        drops = method._drops(torch.tensor([row["example_id"]]), views=2)
        gates = {key: torch.ones(1, size, requires_grad=True) for key, size in units.sizes.items()}
        hidden = []
        for view in range(2):
            with gated(units, {key: gates[key] * drops[key][view] for key in gates}):
                hidden.append(run.model.roberta(ids).last_hidden_state)
        p, q = (F.log_softmax(h, dim=-1) for h in hidden)
        kl = (p.exp() * (p - q)).sum(dim=-1).mean()
        for key, gradient in zip(gates, torch.autograd.grad(kl, list(gates.values())), strict=True):
            total[key] += gradient[0].abs() / 5
    for key, value in proxy_of(run).items():
        torch.testing.assert_close(value, total[key], rtol=1e-3, atol=1e-6)


def test_domain_importance_is_of_the_domains_loss_without_dropout(tmp_path):
    """|∂ MLM loss/∂g|, mean over examples, on a model with dropout: dropout is off, whatever the random state."""
    run = trainer_of(tmp_path, model=tiny_roberta(0.3), importance_samples=5)
    units, blocks = run.units, run.train_dataset.at(-2)
    total = {key: torch.zeros(size) for key, size in units.sizes.items()}
    run.model.eval()
    for index in range(5):
        row = blocks[index]
        gates = {key: torch.ones(1, size, requires_grad=True) for key, size in units.sizes.items()}
        with gated(units, gates):
            loss = run.model(torch.tensor(row["input_ids"])[None], labels=torch.tensor(row["labels"])[None]).loss
        for key, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
            total[key] += gradient[0].abs() / 5
    run.model.train()
    for key, value in run.methods[0]._domain_importance().items():
        torch.testing.assert_close(value, total[key], rtol=1e-3, atol=1e-6)
    assert run.model.training


def test_drops_depend_on_seed_step_and_example_alone(tmp_path):
    method = trainer_of(tmp_path).methods[0]
    ids = torch.tensor([11, 22, 33])
    drops = method._drops(ids, views=2)  # [views × examples, units]
    other = method._drops(torch.tensor([33, 7]), views=2)
    method.trainer.state.global_step = 1
    later = method._drops(ids, views=2)
    reseeded = trainer_of(tmp_path, seed=7).methods[0]._drops(ids, views=2)
    for key, value in drops.items():
        assert torch.equal(other[key][0], value[2]) and torch.equal(other[key][2], value[5])
        torch.testing.assert_close(value.unique(), torch.tensor([0.0, 1 / 0.9])[-len(value.unique()) :])
    together = torch.cat(list(drops.values()), dim=1)
    assert (torch.pdist(together) > 1).all()  # no two views or examples alike
    assert (together == 0).float().mean() == pytest.approx(0.1, abs=0.03)
    for changed in (later, reseeded):
        assert (together - torch.cat(list(changed.values()), dim=1)).norm(dim=1).min() > 1


@pytest.fixture
def views_of_one_step(tmp_path, quiet_importance, monkeypatch):
    """Trains one step on known importance and gives the trainer, its batch and the contrast's three views."""
    quiet_importance(0.5)
    views, batches = [], []

    def loss(*representations):
        views.append(representations[:3])
        return sum(view.mean() for view in views[-1])

    def give(dropout, prior_gradient):
        options = {"contrast_prior_gradient": prior_gradient, "max_steps": 1, "learning_rate": 1e-12}
        run = trainer_of(tmp_path, model=tiny_roberta(dropout), **options)
        add_rows = run.methods[0].add_rows
        run.methods[0].add_rows = lambda batch, stack: batches.append(batch) or add_rows(batch, stack)
        run.train()
        return run, batches[0], views[0]

    monkeypatch.setattr("das_lm.methods.das.contrastive_loss", loss)
    return give


def pooled(run, batch, gates):
    """Mean last hidden state of the text without masks, one example and one set of gates at a time."""
    rows = []
    ids = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    for row in range(len(ids)):
        with torch.no_grad(), gated(run.units, {key: gate[row : row + 1] for key, gate in gates.items()}):
            rows.append(run.model.roberta(ids[row : row + 1]).last_hidden_state[0].mean(dim=0))
    return torch.stack(rows)


@pytest.mark.parametrize("prior_gradient", [True, False])
def test_views_of_a_model_without_dropout(prior_gradient, views_of_one_step):
    """Anchor and positive are the text without masks under two draws of the gates, the prior is seen through the
    importance, all of the same examples."""
    run, batch, views = views_of_one_step(0.0, prior_gradient)
    run.state.global_step = 0
    drops = run.methods[0]._drops(batch["example_id"], views=2)
    halves = {key: torch.full((4, size), 0.5) for key, size in run.units.sizes.items()}
    draws = ({key: drop[:4] for key, drop in drops.items()}, {key: drop[4:] for key, drop in drops.items()}, halves)
    for view, gates in zip(views, draws, strict=True):
        torch.testing.assert_close(view, pooled(run, batch, gates), rtol=1e-4, atol=1e-4)
    assert (views[0] - views[1]).norm(dim=1).min() > 0.1
    assert [view.requires_grad for view in views] == [True, True, prior_gradient]


@pytest.mark.parametrize("prior_gradient", [True, False])
def test_views_of_a_model_with_dropout(prior_gradient, views_of_one_step):
    """Two dropout draws of the text without masks: near what the model says without, but not equal."""
    run, batch, views = views_of_one_step(0.01, prior_gradient)
    run.model.eval()
    open_gates = {key: torch.ones(4, size) for key, size in run.units.sizes.items()}
    halves = {key: gate / 2 for key, gate in open_gates.items()}
    for view, gates in zip(views, (open_gates, open_gates, halves), strict=True):
        distances = torch.cdist(view, pooled(run, batch, gates))
        assert distances.argmin(dim=1).tolist() == [0, 1, 2, 3] and distances.diagonal().min() > 1e-3
    assert (views[0] - views[1]).norm(dim=1).min() > 1e-3
    assert [view.requires_grad for view in views] == [True, True, prior_gradient]


def test_rows_of_the_domain_are_not_gated(tmp_path, quiet_importance):
    """The views change nothing of the domain's own loss: without dropout, the loss with and without contrast agree."""
    quiet_importance(0.5)
    runs = [trainer_of(tmp_path, max_steps=1, contrast_weight=weight) for weight in (0.0, 1.0)]
    for run in runs:
        run.train()
    assert losses(runs[0], "loss_mlm")[0] == pytest.approx(losses(runs[1], "loss_mlm")[0], rel=1e-6)
