"""The anchor: what it adds to the loss, that the domain is seen as without it, and that less is lost."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn

from das_lm import ContinualTrainer, DASConfig
from das_lm.errors import UserError
from das_lm.methods import Anchor
from das_lm.methods.targets import divergence_from_draws, divergence_from_teacher
from das_lm.methods.writing import Writer
from das_lm.model.objective import Output
from tests.helpers import build_tokenizer, random_blocks, tiny_roberta
from tests.methods.helpers import equal, parameters
from tests.model.helpers import tiny_gpt2

MODELS = {"masked": tiny_roberta, "causal": tiny_gpt2}


def trainer_of(directory, model, method="anchor", domain="bio", **options) -> ContinualTrainer:
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_length": 12,
        "memory_size": 8,
        "self_replay_sweeps": 2,
        "importance_samples": 8,
        "anchor_variants": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
    }
    given = ("remember", "peft_config", "train_dataset", "processing_class", "text_column")
    more = {name: options.pop(name) for name in given if name in options}
    return ContinualTrainer(
        model,
        DASConfig(output_dir=str(directory), **{**defaults, **options}),
        method,
        **{"train_dataset": random_blocks(24, seed=1), "processing_class": build_tokenizer(), **more},
        domain=domain,
    )


def anchor_of(trainer) -> Anchor:
    return next(one for one in trainer.methods if isinstance(one, Anchor))


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def divergence(trainer, base: nn.Module) -> float:
    """KL(base ‖ model) per predicted token of text that the base wrote with another seed."""
    other = trainer_of(trainer.args.output_dir, base, "naive", seed=7, per_device_train_batch_size=32)
    ids = torch.stack([row["input_ids"] for row in Writer(other).rows(32)])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.no_grad():
        ours, theirs = (
            F.log_softmax(one.criterion(one.model.eval(), batch).logits, dim=-1) for one in (trainer, other)
        )
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean().item()


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_is_that_of_the_formula(kind, tmp_path):
    """λ / share × Σ KL / predictions of the domain, row by row with a model and a teacher of its own."""
    model, base = MODELS[kind](), MODELS[kind](seed=3)
    trainer = trainer_of(tmp_path, model, anchor_share=0.5, anchor_weight=3.0, max_steps=1, learning_rate=0.0)
    trainer.train()
    method = anchor_of(trainer)
    method.teacher.model.load_state_dict(base.state_dict())
    method.teacher.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(6)])
    model.train()
    whole = method.add_rows(batch, None)
    count = len(whole["input_ids"]) - 6
    assert 0 < count < 6 and all((whole[name][:6] == batch[name]).all() for name in ("input_ids", "labels"))
    added = method.loss(model, batch, trainer.criterion(model, whole))["anchor"]
    expected = []
    for row in range(6, 6 + count):  # of one teacher, so in the order in which they were drawn
        one = {name: whole[name][row : row + 1] for name in ("input_ids", "attention_mask", "labels")}
        ours, taught = (trainer.criterion.of(m)(m, one).logits.softmax(-1) for m in (model, base.eval()))
        expected.append((taught * (taught / ours).log()).sum(-1))
    torch.testing.assert_close(added, 3.0 / 0.5 * torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("methods", [["anchor"], ["das", "anchor"]])
@pytest.mark.parametrize("kind", MODELS)
def test_without_weight_it_is_as_if_it_were_not_there(kind, methods, tmp_path):
    without = [one for one in methods if one != "anchor"] or ["naive"]
    models = []
    for method, options in ((methods, {"anchor_weight": 0.0}), (without, {})):
        models.append(MODELS[kind]())
        trainer_of(tmp_path, models[-1], method, **options).train()
    assert equal(*map(parameters, models))


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_of_the_domain_is_of_its_own_rows(kind, tmp_path):
    losses = []
    for method in ("naive", "anchor", ["das", "anchor"]):
        trainer = trainer_of(tmp_path, MODELS[kind](), method, learning_rate=0.0, anchor_share=1.0)
        trainer.train()
        losses.append(logged(trainer, f"loss_{trainer.criterion.name}"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_step_is_the_same_in_other_batches(kind, tmp_path):
    models = []
    for rows, batches in ((8, 1), (2, 4)):
        models.append(MODELS[kind]())
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": batches}
        trainer_of(tmp_path, models[-1], optim="sgd", importance_batch_size=4, **options).train()
    ours, theirs = map(parameters, models)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_less_is_lost_of_what_the_base_knew(kind, tmp_path):
    """At the same learning rate, on text that it was not held on."""
    lost = {}
    for method in ("naive", "anchor"):
        trainer = trainer_of(
            tmp_path, MODELS[kind](), method, max_steps=30, memory_size=64, anchor_share=1.0, anchor_weight=4.0
        )
        trainer.train()
        lost[method] = divergence(trainer, MODELS[kind]())
    assert lost["anchor"] < 0.5 * lost["naive"]


def test_the_teacher_stays_the_base_model(tmp_path):
    """In the second domain too, with a method that found its state beside the weights."""
    base = tiny_roberta()
    first = trainer_of(tmp_path / "a", tiny_roberta())
    first.train()
    first.save_model(str(tmp_path / "bio"))
    model = type(base).from_pretrained(tmp_path / "bio")
    second = trainer_of(tmp_path / "b", model, domain="cs")
    second.train()
    assert equal(parameters(anchor_of(second).teacher.model), parameters(base))
    ours, theirs = (one.remembered.sources["self"].rows for one in (first, second))
    assert [row["input_ids"].tolist() for row in ours] == [row["input_ids"].tolist() for row in theirs]


# ---- teachers -------------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Logits that are what they are: [predictions, classes]."""

    def __init__(self, predictions: int, classes: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(predictions, classes, generator=generator, dtype=torch.float64))

    def output(self) -> Output:
        count = len(self.logits)
        return Output(self.logits, torch.zeros(count, dtype=torch.int64), torch.arange(count))


def test_the_divergence_is_that_of_two_softmaxes():
    ours, theirs = Fixed(5, 7, seed=0), Fixed(5, 7, seed=1)
    divergence = divergence_from_teacher(ours.output(), theirs.output())
    p, q = theirs.logits.softmax(-1), ours.logits.softmax(-1)
    torch.testing.assert_close(divergence.double(), (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6)
    divergence.sum().backward()
    torch.testing.assert_close(ours.logits.grad, (q - p).detach(), rtol=1e-5, atol=1e-6)  # ∂KL/∂z = q − p


@pytest.mark.parametrize("draws", [4, 64])
def test_cached_targets_are_unbiased(draws):
    """The mean gradient over many sets of draws is the teacher's, up to an error of 1 / √(sets · draws)."""
    ours, theirs, sets = Fixed(3, 7, seed=0), Fixed(3, 7, seed=1), 2000
    exact = divergence_from_teacher(ours.output(), theirs.output())
    (gradient,) = torch.autograd.grad(exact.sum(), ours.logits)
    torch.manual_seed(0)
    p = theirs.logits.detach().softmax(-1)
    tokens = torch.multinomial(p, sets * draws, replacement=True).view(3, sets, draws)
    values, gradients = [], []
    for one in range(sets):
        log_p = p.log().gather(1, tokens[:, one]).mean(1)
        estimate = divergence_from_draws(ours.output(), tokens[:, one], log_p.float())
        values.append(estimate.detach())
        gradients.append(torch.autograd.grad(estimate.sum(), ours.logits)[0])
    error = (torch.stack(gradients).mean(0) - gradient).abs().max().item()
    assert error < 4 * 0.5 / (sets * draws) ** 0.5  # a drawn indicator has a deviation of at most 1/2
    deviation = torch.stack(gradients).std(0)
    torch.testing.assert_close(deviation, (p * (1 - p) / draws).sqrt(), rtol=0.1, atol=0)
    spread = torch.stack(values).std(0) / sets**0.5
    assert ((torch.stack(values).mean(0) - exact).abs() < 5 * spread).all()


@pytest.mark.parametrize("bias", [False, True])
def test_in_chunks_it_is_the_same(bias):
    torch.manual_seed(0)
    head, teacher = nn.Linear(6, 11, bias=bias), nn.Linear(6, 11, bias=bias)
    features, tokens = torch.randn(9, 6, requires_grad=True), torch.randint(11, (9, 5))
    rows, labels, log_p = torch.arange(9), torch.zeros(9, dtype=torch.int64), torch.randn(9)

    def losses(in_chunks: bool) -> list[torch.Tensor]:
        outputs = [
            Output(None, labels, rows, head=one, features=features)
            if in_chunks
            else Output(one(features), labels, rows)
            for one in (head, teacher)
        ]
        found = [divergence_from_draws(outputs[0], tokens, log_p), divergence_from_teacher(*outputs)]
        gradients = [torch.autograd.grad(one.sum(), (features, head.weight), retain_graph=True) for one in found]
        return [*found, *itertools.chain(*gradients)]

    for whole, parts in zip(losses(False), losses(True), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("teacher", ["copy", "cached"])
def test_the_base_model_is_at_no_distance_from_itself(kind, teacher, tmp_path):
    trainer = trainer_of(tmp_path, MODELS[kind](), learning_rate=0.0, anchor_teacher=teacher, anchor_share=1.0)
    trainer.train()
    assert max(map(abs, logged(trainer, "loss_anchor"))) < 1e-6


def test_the_adapter_off_is_a_copy_of_the_base_model(tmp_path):
    models = []
    for teacher in ("copy", "adapter"):
        trainer = trainer_of(
            tmp_path,
            tiny_gpt2(),
            peft_config=LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=True),
            anchor_teacher=teacher,
            anchor_share=1.0,
        )
        trainer.train()
        models.append(parameters(trainer.model))
    assert equal(*models) and any("lora_B" in name and value.any() for name, value in models[0].items())


# ---- finished domains -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["copy", "cached"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_finished_domain_is_held_by_what_was_known_at_its_end(kind, teacher, tmp_path):
    """Its targets are those of the model at its end, the base model's stay those of the base."""
    base, model, method = MODELS[kind](), MODELS[kind](), Anchor()
    first = trainer_of(tmp_path, model, method, anchor_teacher=teacher, max_steps=10)
    first.train()
    at_end = MODELS[kind]()
    at_end.load_state_dict(model.state_dict())
    second = trainer_of(tmp_path, model, method, domain="cs", anchor_teacher=teacher, train_dataset=random_blocks(24))
    second.train()
    assert second.remembered is first.remembered and list(method.pasts) == ["self", "bio"]
    ours = {row["input_ids"].tolist().__repr__() for row in method.finished["bio"]}
    assert ours <= {repr(ids) for ids in random_blocks(24, seed=1)["input_ids"]} and len(ours) == 8
    for name, knows in {"self": base, "bio": at_end}.items():
        if name not in method.targets:
            assert teacher == "copy" and equal(parameters(method.teacher.model), parameters(base))
            continue
        masked, targets = method._masked[name], method.targets[name]
        for number in [(0, 0), (3, targets.variants - 1)]:
            with torch.no_grad():
                logits = first.criterion.of(knows.eval())(knows, masked.batch([number])).logits
            tokens, log_p = targets.at([number], logits.device)
            torch.testing.assert_close(log_p, logits.log_softmax(-1).gather(1, tokens).mean(1), rtol=1e-4, atol=1e-5)


def test_without_keep_text_no_text_of_the_domain_is_kept(tmp_path):
    trainer = trainer_of(tmp_path / "a", tiny_gpt2(), keep_text=False, anchor_teacher="cached")
    trainer.train()
    trainer.save_model(str(tmp_path / "bio"))
    texts = {tuple(ids) for ids in random_blocks(24, seed=1)["input_ids"]}
    assert not texts & {tuple(row["input_ids"].tolist()) for row in anchor_of(trainer).finished["bio"]}
    whole = b"".join(path.read_bytes() for path in (tmp_path / "bio").iterdir())
    for ids in texts:  # whatever integers they are written as
        assert all(np.array(ids[1:-1], dtype=kind).tobytes() not in whole for kind in ("<i2", "<i4", "<i8"))


# ---- what it is given -----------------------------------------------------------------------------------------------


def test_the_rows_of_the_domain_are_the_same_with_and_without(tmp_path):
    seen = []
    for method, remember in (("naive", None), ("anchor", "self"), ("anchor", random_blocks(9, seed=5))):
        trainer = trainer_of(tmp_path, tiny_gpt2(), method, remember=remember)
        rows, compute = [], trainer.compute_loss

        def noted(model, inputs, *args, rows=rows, compute=compute, **kwargs):
            rows.append(inputs["input_ids"].tolist())
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = noted
        trainer.train()
        seen.append(rows)
    assert seen[0] == seen[1] == seen[2]


def test_of_given_text_so_many_rows_are_cached_and_other_text_is_refused(tmp_path):
    model, method, text = tiny_gpt2(), Anchor(), random_blocks(40, seed=5)
    trainer_of(tmp_path, model, method, anchor_teacher="cached", remember={"wiki": text}, memory_size=8).train()
    assert len(method.targets["wiki"]) == len(method.pasts["wiki"][0]) == 8
    ids = [row["input_ids"].tolist() for row in method.pasts["wiki"][0]]
    assert len(set(map(tuple, ids))) == 8 and set(map(tuple, ids)) <= {tuple(row) for row in text["input_ids"]}
    for seed, fits in ((5, True), (6, False)):
        more = {"domain": f"cs {seed}", "anchor_teacher": "cached", "memory_size": 8}
        trainer = trainer_of(tmp_path, model, method, remember={"wiki": random_blocks(40, seed=seed)}, **more)
        if fits:
            trainer.train()
        else:
            with pytest.raises(UserError, match="'wiki' is not the text of which the base model's targets are kept"):
                trainer.train()


def test_what_it_cannot_do_is_refused(tmp_path):
    with pytest.raises(UserError, match="anchor_teacher: 'adapter' needs a LoRA adapter"):
        trainer_of(tmp_path, tiny_gpt2(), anchor_teacher="adapter")

    class Module(nn.Linear):
        def forward(self, x):
            return super().forward(x).mean()

    with pytest.raises(UserError, match="'anchor' needs a language model"):
        ContinualTrainer(Module(2, 2), DASConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[]), Anchor())


@pytest.mark.parametrize("kind", MODELS)
def test_the_base_model_writes_its_text_anew(kind, tmp_path):
    """Every so many steps, by the base model and not by what has become of it; and the same after an interruption."""

    def trained(directory, steps, resume=None):
        options = {"anchor_refresh": 2, "learning_rate": 1e-1, "save_strategy": "steps", "save_steps": 3}
        trainer = trainer_of(directory, MODELS[kind](), max_steps=6, anchor_share=1.0, **options)
        seen, add_rows = [], anchor_of(trainer).add_rows

        def noted(batch, until):
            batch = add_rows(batch, until)
            seen.append(batch["input_ids"][4:].clone())
            return batch

        anchor_of(trainer).add_rows = noted
        trainer.train(resume_from_checkpoint=resume)
        return trainer, seen

    trainer, seen = trained(tmp_path / "whole", 6)
    rows = trainer.remembered.sources["self"].rows
    base = trainer_of(tmp_path / "base", MODELS[kind](), "naive")
    again = Writer(base).rows(8, "self", "bio", 6)
    assert [row["input_ids"].tolist() for row in rows] == [row["input_ids"].tolist() for row in again]
    assert [row["input_ids"].tolist() for row in Writer(base).rows(8, "self", "bio", 4)] != [
        row["input_ids"].tolist() for row in rows
    ]
    resumed, seen_again = trained(tmp_path / "whole", 6, str(tmp_path / "whole" / "checkpoint-3"))
    assert len(seen_again) == 3 and all(map(torch.equal, seen_again, seen[3:]))
    assert trainer.tokens_seen.state() == resumed.tokens_seen.state()
    assert trainer.tokens_seen.state()["tokens_seen"] == {"bio": 6 * 4 * 12, "self, remembered": 6 * 4 * 12}
    for name, one in parameters(trainer.model).items():
        assert torch.equal(one, parameters(resumed.model)[name]), name


def test_who_is_not_there_cannot_write_anew(tmp_path):
    with pytest.raises(UserError, match="anchor_refresh: the teacher 'cached' cannot write"):
        trainer_of(tmp_path, tiny_gpt2(), anchor_refresh=2, anchor_teacher="cached")
