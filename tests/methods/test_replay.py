"""What is replayed, distilled and averaged: memories, self-written text, teachers, weights."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from das_lm import ContinualTrainer, DASConfig
from das_lm.data.blocks import TrainingBlocks, TrainingRows
from das_lm.data.masking import MLMMasking
from das_lm.errors import UserError
from das_lm.methods import EMA, METHODS, Interpolate, LwF, Replay, SelfReplay
from das_lm.methods.agem import memory_gradient
from das_lm.methods.memory import Reservoir
from das_lm.randomness import addressed_seed
from tests.helpers import BOS, EOS, MASK, VOCABULARY, build_tokenizer, random_blocks, tiny_roberta
from tests.methods.helpers import Classifier, equal, parameters, rows


def trainer_of(directory, model, method, data, **options) -> ContinualTrainer:
    """Of a module, or of a language model if the data is blocks."""
    language = not isinstance(data, list)
    given = ("development_dataset", "eval_dataset", "remember")
    more = {name: options.pop(name) for name in given if name in options}
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_length": 12,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return ContinualTrainer(
        model,
        DASConfig(output_dir=str(directory), **{**defaults, **options}),
        method,
        train_dataset=data,
        processing_class=build_tokenizer() if language else None,
        **more,
    )


# ---- memories ------------------------------------------------------------------------------------------------------


def test_the_reservoir_is_uniform():
    """Every row of two domains of unequal size is kept with probability capacity / rows: chi-square of 3,000 draws."""
    counts, capacity, draws = torch.zeros(30), 6, 3000
    for seed in range(draws):
        memory = Reservoir(capacity, seed)
        memory.add([{"row": torch.tensor(index)} for index in range(20)])
        memory.add([{"row": torch.tensor(index)} for index in range(20, 30)])
        assert len(memory) == capacity and memory.seen == 30
        counts[[int(row["row"]) for row in memory.rows]] += 1
    expected = draws * capacity / 30
    chi_square = ((counts - expected).square() / (expected * (1 - capacity / 30))).sum()
    assert chi_square < 60  # 29 degrees of freedom: 1 in 1,000 is above 58
    assert not torch.equal(counts, torch.full_like(counts, expected))


def test_a_reservoir_that_is_not_full_keeps_everything_in_order():
    memory = Reservoir(10, 0)
    memory.add([{"input_ids": [index] * (index + 1), "label": index} for index in range(4)])
    assert [row["input_ids"].tolist() for row in memory.rows] == [[0], [1, 1], [2, 2, 2], [3, 3, 3, 3]]
    other = Reservoir(10, 0)
    other.load_state_dict(memory.state_dict())
    assert other.seen == 4
    for ours, theirs in zip(other.rows, memory.rows, strict=True):
        assert equal(ours, theirs)


def test_the_first_domain_replays_nothing(tmp_path):
    ours, naive = Classifier(), Classifier()
    trainer_of(tmp_path, ours, "replay", rows(0), replay_ratio=0.9).train()
    trainer_of(tmp_path, naive, "naive", rows(0)).train()
    assert equal(parameters(ours), parameters(naive))


def test_the_stated_share_of_rows_is_replayed_and_the_rest_is_the_domain(tmp_path):
    method = Replay()
    trainer_of(tmp_path, Classifier(), method, rows(0, 50), memory_size=20).train()
    trainer = trainer_of(tmp_path, Classifier(), method, rows(1, 2000), replay_ratio=0.1, max_steps=1)
    method.end_domain = lambda: None  # the memory stays that of the first domain
    trainer.train()
    earlier = {tuple(row["inputs"].tolist()) for row in rows(0, 50)}
    dataset = trainer.train_dataset
    seen = [dataset[position] for position in range(2000)]
    replayed = [row for row in seen if row["replayed_from"]]
    assert 160 < len(replayed) < 240
    assert all((tuple(row["inputs"].tolist()) in earlier) == row["replayed_from"] for row in seen)
    assert len({tuple(row["inputs"].tolist()) for row in replayed}) == 20  # of a memory of that size, all come
    again = [dataset[position]["replayed_from"] for position in range(2000)]
    assert again == [row["replayed_from"] for row in seen]
    dataset.set_epoch(1)
    assert [dataset[position]["replayed_from"] for position in range(2000)] != again
    assert all(
        "replayed_from" not in dataset.at(-3)[position] for position in range(5)
    )  # importance is the domain's own


def test_every_draw_of_a_replayed_row_has_masks_of_its_own():
    """Also in the same epoch, and in the next domain: 720 draws of 4 rows of 30 words. Dropout is addressed by
    `example_id`, which is the draw's own too."""
    memory = random_blocks(4, length=32).with_format("numpy")
    seen = set()
    for domain in ("bio", "cs"):
        data = TrainingBlocks({domain: random_blocks(180, length=32)}, MLMMasking(build_tokenizer(), 0.15), seed=0)
        data.replay("Replay", memory, 1.0)
        for epoch in range(2):
            data.set_epoch(epoch)
            drawn = [data[position] for position in range(180)]
            assert len({row["example_id"] for row in drawn}) == 180
            seen |= {(tuple(row["input_ids"].tolist()), tuple(row["labels"].tolist())) for row in drawn}
            assert all(np.array_equal(a["labels"], data[p]["labels"]) for p, a in enumerate(drawn))
    assert len(seen) > 700


def test_the_masks_of_a_remembered_row_are_those_of_its_domain_and_step(tmp_path):
    """What A-GEM and GEM take the gradient on, of one memory at the same step of two domains: the same rows, masked
    anew."""
    batches = []
    for domain in ("bio", "cs"):
        trainer = trainer_of(tmp_path, tiny_roberta(), "naive", random_blocks(8, length=32), max_length=32)
        trainer.train_dataset.domains = {domain: trainer.train_dataset.domains["domain"]}
        trainer.gradient_of = batches.append
        memory_gradient(trainer, random_blocks(4, length=32).with_format("numpy"), "memory")
    first, second = ({n: b[n] for n in ("input_ids", "labels")} for b in batches)
    texts = [torch.where(b["labels"] >= 0, b["labels"], b["input_ids"]) for b in (first, second)]
    assert torch.equal(*texts) and not equal(first, second)


def test_two_memories_have_a_share_each_whatever_their_order():
    """Of 4,000 rows, 10 % come from one and 30 % from the other; every row says from which; the rows of one memory
    alone stand where they did before there were two."""
    parts = {"d": rows(0, 4000), "a": rows(1, 5), "b": rows(2, 7)}
    origin = {tuple(row["inputs"].tolist()): (n, i) for n, part in parts.items() for i, row in enumerate(part)}

    def seen(*names: str) -> list[tuple[str, int, int]]:
        data = TrainingRows({"d": parts["d"]}, seed=3)
        for name in names:
            data.replay(name, parts[name], {"a": 0.1, "b": 0.3}[name])
        drawn = [data[position] for position in range(4000)]
        return [(*origin[tuple(row["inputs"].tolist())], row["replayed_from"]) for row in drawn]

    both = seen("a", "b")
    assert {(name, number) for name, _, number in both} == {("d", 0), ("a", 1), ("b", 2)}
    assert both == seen("b", "a")
    counts = [sum(number == one for *_, number in both) for one in (1, 2)]
    assert abs(counts[0] - 400) < 60 and abs(counts[1] - 1200) < 90  # three standard deviations
    draws = np.random.Generator(np.random.Philox(addressed_seed(3, "replay", "d", 0)))
    chosen, rows_of_a = draws.random(4000) < 0.1, draws.integers(5, size=4000)
    for drawn in (seen("a"), both):
        assert [row if number == 1 else None for _, row, number in drawn] == [
            row if one else None for one, row in zip(chosen, rows_of_a, strict=True)
        ]


def test_replay_and_self_replay_train_on_both_memories_and_distributions_teach_their_own_rows(tmp_path):
    """In either order of the methods, and the tokens of real text stay what is taught of it."""
    weights = []
    for names in (["replay", "self_replay"], ["self_replay", "replay"]):
        model, methods = tiny_roberta(), [METHODS[name]() for name in names]
        options = {"memory_size": 8, "replay_ratio": 0.4, "self_replay_target": "distributions"}
        trainer_of(tmp_path, model, methods, random_blocks(24), **options).train()
        trainer = trainer_of(tmp_path, model, methods, random_blocks(24, seed=1), **options)
        method, seen = methods[names.index("self_replay")], []
        change = method.change_losses
        method.change_losses = lambda batch, outputs, losses, seen=seen, change=change: (
            seen.append((batch, outputs, losses, change(batch, outputs, losses))) or seen[-1][-1]
        )
        trainer.train()
        weights.append(parameters(model))
        came = torch.cat([batch["replayed_from"] for batch, *_ in seen])
        assert set(came.tolist()) == {0, 1, 2}
        for batch, outputs, before, after in seen:
            written = batch["replayed_from"][outputs.rows] == trainer.train_dataset.number_of("SelfReplay")
            assert torch.equal(before[~written], after[~written])
            assert (before[written] != after[written]).all()
    assert equal(*weights)


def test_memories_that_take_more_than_all_rows_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"replay_ratio: 0\.6 .* each of 2 memories .* at most 0\.5"):
        trainer_of(tmp_path, tiny_roberta(), ["replay", "self_replay"], random_blocks(24), replay_ratio=0.6)
    trainer_of(tmp_path, tiny_roberta(), ["replay", "agem"], random_blocks(24), replay_ratio=0.6)


# ---- self-written text ---------------------------------------------------------------------------------------------


def written(directory, model, **options) -> SelfReplay:
    method, defaults = SelfReplay(), {"memory_size": 40, "learning_rate": 1e-3, "max_steps": 1}
    trainer_of(directory, model, method, random_blocks(24), **{**defaults, **options}).train()
    return method


def test_written_blocks_are_text_of_the_models_length(tmp_path):
    blocks = torch.stack([row["input_ids"] for row in written(tmp_path, tiny_roberta()).memory.rows])
    assert blocks.shape == (40, 12)
    assert (blocks[:, 0] == BOS).all() and (blocks[:, -1] == EOS).all()
    inner = blocks[:, 1:-1]
    assert inner.min() > MASK and inner.max() < VOCABULARY  # no special token within
    assert len({tuple(block.tolist()) for block in blocks}) == 40


def test_the_model_writes_what_it_believes(tmp_path):
    """A model whose head says one word with certainty writes that word; the base model writes, not a later one."""
    model = tiny_roberta()
    with torch.no_grad():
        model.lm_head.bias[17] = 100.0
    blocks = torch.stack([row["input_ids"] for row in written(tmp_path, model).memory.rows])
    assert (blocks[:, 1:-1] == 17).all()


def test_writing_is_a_function_of_the_seed(tmp_path):
    ours, again, other = (
        [row["input_ids"] for row in written(tmp_path, tiny_roberta(), seed=seed).memory.rows] for seed in (0, 0, 1)
    )
    assert all(torch.equal(*pair) for pair in zip(ours, again, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(ours, other, strict=True))


def test_distributions_teach_in_place_of_the_tokens(tmp_path):
    """The loss of a replayed prediction is the cross-entropy with the base model's distribution, of another that of
    its token."""
    method = SelfReplay()
    options = {"memory_size": 8, "replay_ratio": 0.5, "self_replay_target": "distributions", "max_steps": 2}
    trainer = trainer_of(tmp_path, tiny_roberta(), method, random_blocks(24), **options)
    base = copy.deepcopy(trainer.model).eval()
    seen = []
    change = method.change_losses
    method.change_losses = lambda batch, outputs, losses: (
        seen.append((batch, outputs, losses, change(batch, outputs, losses))) or seen[-1][-1]
    )
    trainer.train()
    batch, outputs, before, after = seen[-1]
    replayed = batch["replayed_from"][outputs.rows] == 1
    assert 0 < replayed.sum() < len(replayed)
    assert torch.equal(before[~replayed], after[~replayed])
    logits = base(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[batch["labels"] != -100]
    expected = -(logits.softmax(-1) * outputs.logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(after[replayed], expected[replayed], rtol=1e-4, atol=1e-5)
    assert (before - after)[replayed].abs().max() > 1e-3


# ---- teachers ------------------------------------------------------------------------------------------------------


def test_lwf_adds_the_distillation_from_the_model_before_the_domain(tmp_path):
    model, method = Classifier(), LwF()
    trainer_of(tmp_path, model, method, rows(0)).train()
    assert method.teacher is None
    old = copy.deepcopy(model)
    trainer = trainer_of(tmp_path, model, method, rows(1), max_steps=2, lwf_weight=0.7, lwf_temperature=3.0)
    parts, loss = [], method.loss
    method.loss = lambda _, batch, outputs: (
        parts.append((batch, outputs.logits.detach(), loss(_, batch, outputs))) or parts[-1][-1]
    )
    trainer.train()
    batch, logits, extra = parts[-1]
    ours, taught = logits / 3, old(batch["inputs"])["logits"].detach() / 3
    kl = (taught.softmax(-1) * (taught.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(extra["lwf"].detach(), 0.7 * 9 * kl)
    assert kl > 1e-4


def test_lwf_of_a_module_says_that_nothing_teaches_in_the_first_domain(tmp_path, caplog):
    method = LwF()
    for domain, said in enumerate((1, 1)):  # and in the second nothing more
        trainer_of(tmp_path, Classifier(), method, rows(domain)).train()
        assert caplog.text.count("lwf: no effect") == said


def test_lwf_of_weight_0_is_naive(tmp_path):
    ours, naive = tiny_roberta(0.1), tiny_roberta(0.1)
    trainer_of(tmp_path, ours, "lwf", random_blocks(24), lwf_weight=0.0).train()
    trainer_of(tmp_path, naive, "naive", random_blocks(24)).train()
    assert equal(parameters(ours), parameters(naive))


def test_a_pretrained_language_model_teaches_from_the_first_domain_on(tmp_path):
    trainer = trainer_of(tmp_path, tiny_roberta(0.0), "lwf", random_blocks(24), learning_rate=1e-2)
    trainer.train()
    logged = [entry["loss_lwf"] for entry in trainer.state.log_history if "loss_lwf" in entry]
    assert len(logged) == 6 and abs(logged[0]) < 1e-6 < logged[-1]  # at first both are one model


def test_lwf_counts_every_prediction_of_a_step_alike(tmp_path):
    """Four batches of one row, of different numbers of masked tokens, are one batch of four rows."""
    runs = []
    for rows_at_once in (4, 1):
        model = tiny_roberta(0.0)
        sizes = {"per_device_train_batch_size": rows_at_once, "gradient_accumulation_steps": 4 // rows_at_once}
        options = {"optim": "sgd", "max_grad_norm": 0.0, "lwf_weight": 3.0, **sizes}
        trainer = trainer_of(tmp_path, model, "lwf", random_blocks(24), **options)
        trainer.train()
        runs.append((parameters(model), [entry["loss_lwf"] for entry in trainer.state.log_history[:-1]]))
    (ours, ours_logged), (theirs, theirs_logged) = runs
    assert ours_logged == pytest.approx(theirs_logged, rel=1e-3, abs=1e-6) and max(ours_logged) > 0.01
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_every_earlier_head_is_taught(tmp_path):
    from das_lm.classic import MLP

    def task(number: int) -> list[dict]:
        data = rows(number)
        return [{**row, "labels": row["labels"] % 2, "task": torch.tensor(number)} for row in data]

    model, method = MLP([6, 8], [2, 2, 2]), LwF()
    for number in range(2):
        trainer_of(tmp_path, model, method, task(number)).train()
    old = copy.deepcopy(model)
    trainer = trainer_of(tmp_path, model, method, task(2), max_steps=2, lwf_temperature=1.0, lwf_weight=1.0)
    parts, loss = [], method.loss

    def keep(inner, batch, outputs):
        parts.append((batch, copy.deepcopy(inner), loss(inner, batch, outputs)))
        return parts[-1][-1]

    method.loss = keep
    trainer.train()
    batch, new, extra = parts[-1]
    kls = []
    for head in range(2):
        ours, taught = (m.head_logits(batch["inputs"], head).detach() for m in (new, old))
        kls.append((taught.softmax(-1) * (taught.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean())
    torch.testing.assert_close(extra["lwf"].detach(), sum(kls) / 2)


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ["0", "1", "0.25"])
def test_interpolation(alpha, tmp_path):
    """α = 1 is naive bit for bit, α = 0 the model before, in between the line."""
    ours, naive, old = Classifier(), Classifier(), Classifier()
    trainer_of(tmp_path, naive, "naive", rows(0)).train()
    trainer_of(tmp_path, ours, "interpolate", rows(0), interpolation_alpha=alpha).train()
    for name, parameter in ours.named_parameters():
        before, after = (dict(model.named_parameters())[name] for model in (old, naive))
        if alpha in "01":
            assert torch.equal(parameter, after if alpha == "1" else before)
        else:
            torch.testing.assert_close(parameter, 0.25 * after + 0.75 * before)


def test_alpha_is_chosen_by_the_development_data(tmp_path):
    """Development data of the old model's own opinion keeps it, of the training's labels leaves it."""
    model = Classifier()
    data = [{**row, "labels": torch.tensor(0)} for row in rows(0)]
    old_opinion = [{**row, "labels": model(row["inputs"][None])["logits"].argmax()} for row in rows(3, 60)]
    methods = {}
    for name, development in (("old", old_opinion), ("new", data)):
        methods[name] = Interpolate()
        options = {"interpolation_alpha": "auto", "development_dataset": {"d": development}, "max_steps": 40}
        trainer_of(tmp_path, copy.deepcopy(model), methods[name], data, **options).train()
    assert methods["old"].alpha < methods["new"].alpha == 1.0
    assert methods["new"].state() == {"interpolation_alpha": 1.0, "interpolation_chosen_on": ["d"]}


def test_alpha_is_chosen_on_what_is_remembered_too(tmp_path):
    """Its rows that are never trained on speak for the base model, which the domain's do not."""
    model = Classifier()
    data = [{**row, "labels": torch.tensor(0)} for row in rows(0)]
    past = [{**row, "labels": model(row["inputs"][None])["logits"][0].argmax()} for row in rows(3, 200)]
    alphas = []
    for remember in (None, {"past": past}):
        method = Interpolate()
        options = {"interpolation_alpha": "auto", "development_dataset": {"d": data}, "max_steps": 40}
        trainer = trainer_of(tmp_path, copy.deepcopy(model), method, data, remember=remember, **options)
        trainer.train()
        alphas.append(method.alpha)
    assert alphas[0] == 1.0 > alphas[1]
    assert method.state()["interpolation_chosen_on"] == ["d", "past, remembered"]
    apart = trainer.remembered.rows_apart()["past"]
    assert [apart[0]["inputs"].tolist(), len(apart)] == [past[175]["inputs"].tolist(), 25]


def test_a_chosen_alpha_needs_development_data(tmp_path):
    with pytest.raises(UserError, match="development_dataset"):
        trainer_of(tmp_path, Classifier(), "interpolate", rows(0), interpolation_alpha="auto")


def test_ema_is_the_moving_average_of_the_steps(tmp_path):
    model, steps = Classifier(), []
    method = EMA()
    trainer = trainer_of(tmp_path, model, method, rows(0), ema_decay=0.6)
    start = model.head.weight.detach().clone()
    after_step = method.after_step
    method.after_step = lambda: (after_step(), steps.append(model.head.weight.detach().clone()))
    trainer.train()
    expected = start
    for step in steps:
        expected = 0.6 * expected + 0.4 * step
    torch.testing.assert_close(model.head.weight, nn.Parameter(expected))
    assert len(steps) == 6


def test_weights_are_final_before_any_method_consolidates(tmp_path):
    """[ewc, interpolate]: the Fisher and the anchor are those of the interpolated weights, in any order of naming."""
    for methods in (["ewc", "interpolate"], ["interpolate", "ewc"]):
        model = Classifier()
        trainer = trainer_of(tmp_path, model, methods, rows(0), importance_samples=8)
        trainer.train()
        ewc, _ = trainer.methods  # an interpolation comes after the others
        assert torch.equal(ewc.anchor["head.weight"], model.head.weight)
