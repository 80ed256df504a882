"""What acts on weights after steps and domains, and on the losses of tokens: pull-back, LiNeS, gates."""

import math

import pytest
import torch

from das_lm.errors import UserError
from das_lm.methods import Gate, Interpolate, PullBack
from das_lm.methods.interpolate import layers_of
from das_lm.model.objective import Output
from tests.helpers import tiny_roberta
from tests.methods.helpers import equal, parameters
from tests.methods.test_anchor import MODELS, trainer_of
from tests.model.helpers import tiny_gpt2, tiny_llama


def test_pull_back_after_every_p_steps(tmp_path):
    """With plain SGD, by hand: θ ← (1 − β)(θ − η g) + β θ_base after the second step and the fourth."""
    options = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    options |= {"max_steps": 4, "pull_back": 0.25, "pull_back_every": 2}
    ours, theirs = tiny_gpt2(), tiny_gpt2()
    trainer_of(tmp_path, ours, "pull_back", **options).train()
    base = parameters(theirs)
    trainer = trainer_of(tmp_path, theirs, "naive", **options)
    step = trainer.training_step

    def training_step(*args, **kwargs):
        if trainer.state.global_step == 2:  # before the gradient of the third step is taken
            with torch.no_grad():
                for name, parameter in theirs.named_parameters():
                    parameter.copy_(torch.lerp(parameter, base[name], 0.25))
        return step(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    for name, parameter in theirs.named_parameters():
        expected = torch.lerp(parameter.detach(), base[name], 0.25)  # after the fourth
        torch.testing.assert_close(dict(ours.named_parameters())[name].detach(), expected, rtol=1e-4, atol=1e-6)


def test_the_base_stays_that_of_the_first_domain(tmp_path):
    model, method = tiny_gpt2(), PullBack()
    base = parameters(model)
    for domain in ("bio", "cs"):
        trainer_of(tmp_path, model, method, domain=domain, pull_back=1.0, pull_back_every=6, max_steps=6).train()
        assert equal(parameters(model), base)  # all the way, after the last step


@pytest.mark.parametrize("build", [tiny_roberta, tiny_gpt2, tiny_llama])
def test_layers_by_name(build):
    layers = layers_of(dict(build().named_parameters()))
    assert set(layers.values()) == {0, 1}
    for name, layer in layers.items():
        if "embed" in name or ".wte." in name or ".wpe." in name:
            assert layer == 0, name
        if name.startswith("lm_head") or ".1." in name:
            assert layer == 1, name


def test_lines_keeps_more_of_the_last_layer(tmp_path):
    """ΔW_l (α + b l / (L − 1)): of two layers the first by α, the last by α + b."""
    learned, model, options = tiny_roberta(), tiny_roberta(), {"max_steps": 4}
    base = parameters(model)
    trainer_of(tmp_path, learned, "naive", **options).train()
    trainer_of(tmp_path, model, Interpolate(), interpolation_alpha="0.5", interpolation_slope=0.3, **options).train()
    shares = {0: 0.5, 1: 0.8}
    ours, theirs = parameters(model), parameters(learned)
    for name, layer in layers_of(base).items():
        torch.testing.assert_close(ours[name], torch.lerp(base[name], theirs[name], shares[layer]), msg=name)


# ---- gates ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch_and_gate(tmp_path):
    """A batch of a model that has learned, its output, and the base model's losses by hand."""

    def make(**options):
        model, base = tiny_gpt2(), tiny_gpt2().eval()
        trainer = trainer_of(tmp_path, model, method := Gate(), max_steps=8, **options)
        trainer.train()
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
        with torch.no_grad():
            outputs = trainer.criterion(model, batch)
            known = trainer.criterion.of(base)(base, batch).losses()
        return method, batch, outputs, known

    return make


def test_flow_weights_by_what_the_base_model_knew(batch_and_gate):
    method, batch, outputs, known = batch_and_gate(token_weighting="flow")
    torch.testing.assert_close(method.weights(batch, outputs), torch.exp(-known / known.median()))
    losses = torch.ones_like(known)
    torch.testing.assert_close(method.change_losses(batch, outputs, losses), torch.exp(-known / known.median()))


def test_stm_leaves_out_what_the_base_model_finds_unlikely(batch_and_gate):
    method, batch, outputs, known = batch_and_gate(token_weighting="stm", stm_perplexity=60.0)
    weights = method.weights(batch, outputs)
    assert torch.equal(weights, (known.exp() <= 60.0).float()) and 0 < weights.mean() < 1


def test_entropy_is_that_of_the_most_likely_tokens(batch_and_gate):
    method, batch, outputs, _ = batch_and_gate(token_weighting="entropy")
    assert method.teacher is None and method.state_dict() == {}
    weights = method.weights(batch, outputs)
    p = outputs.logits.softmax(-1).topk(20).values
    p = p / p.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, -(p * p.log()).sum(-1) / math.log(20), rtol=1e-4, atol=1e-5)
    sure = Output(torch.eye(30)[:2] * 1000, torch.zeros(2, dtype=torch.int64), torch.arange(2))
    torch.testing.assert_close(method.weights(batch, sure), torch.zeros(2))
    even = Output(torch.zeros(2, 30), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    torch.testing.assert_close(method.weights(batch, even), torch.ones(2))


def test_no_weighting_is_plain_training(tmp_path):
    models = [tiny_gpt2(), tiny_gpt2()]
    trainer_of(tmp_path, models[0], "gate", token_weighting="none").train()
    trainer_of(tmp_path, models[1], "naive").train()
    assert equal(*map(parameters, models))


def test_where_a_gate_cannot_be(tmp_path):
    with pytest.raises(UserError, match="'gate' looks at distributions"):
        trainer_of(tmp_path, MODELS["causal"](), "gate", chunked_cross_entropy=True)
