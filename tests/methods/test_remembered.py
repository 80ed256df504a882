"""What stands for the past: drawn by weight, written once, and of use to every method from the first domain on."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from das_lm.data.chats import chat_opening
from das_lm.errors import UserError
from das_lm.files import newest_checkpoint
from das_lm.methods import EWC, METHODS, Replay
from das_lm.methods.remembered import APART, Drawing, Remembered, Source
from das_lm.methods.writing import Writer, load_written, save_written
from tests.helpers import build_tokenizer, random_blocks, tiny_roberta
from tests.methods.helpers import NEEDS, SMALL, Classifier, World, equal, parameters, rows
from tests.methods.test_anchor import MODELS, trainer_of

#: Methods that hold on to the base model only where something stands for its past.
CONSOLIDATING = [name for name, kind in METHODS.items() if kind.consolidates_base]


def test_sources_are_drawn_by_weight():
    """Within four deviations; none of the rows that are kept apart."""
    sources = {"a": (range(80), 1.0), "b": (range(5), 3.0), "c": (range(16), 0.0)}
    draw = Drawing(sources, seed=1)
    found = [draw(0.5, "row", number) for number in range(8000)]
    drawn = [one for one in found if one]
    assert abs(len(drawn) - 4000) < 4 * (8000 / 4) ** 0.5
    count = Counter(name for name, *_ in drawn)
    assert abs(count["a"] - len(drawn) / 4) < 4 * (len(drawn) * 3 / 16) ** 0.5 and count["c"] == 0
    assert {row for name, row, _ in drawn if name == "a"} == set(range(80 - 80 // APART))
    assert {row for name, row, _ in drawn if name == "b"} == set(range(5))
    assert found[:100] == [draw(0.5, "row", number) for number in range(100)]


def test_replay_takes_sources_by_weight_from_the_first_step(tmp_path):
    texts = {"a": random_blocks(16, seed=5), "b": random_blocks(16, seed=6)}
    given = {"a": (texts["a"], 1.0), "b": (texts["b"], 2.0)}
    options = {"train_dataset": random_blocks(4000, seed=1), "remember": given, "replay_ratio": 0.6}
    trainer = trainer_of(tmp_path, MODELS["causal"](), Replay(), max_steps=1, learning_rate=0.0, **options)
    trainer.train()
    data = trainer.train_dataset
    whose = {name: {tuple(ids) for ids in text["input_ids"]} for name, text in texts.items()}
    seen = Counter()
    for place in range(len(data)):
        ids = tuple(data[place]["input_ids"].tolist())
        seen[next((name for name, known in whose.items() if ids in known), "domain")] += 1
    for name, share in {"domain": 0.4, "a": 0.2, "b": 0.4}.items():
        assert abs(seen[name] - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5


def test_replay_halves_what_it_takes_between_the_past_and_its_memory(tmp_path):
    model, method = MODELS["causal"](), Replay()
    remember = random_blocks(16, seed=5)
    trainer_of(tmp_path, model, method, remember=remember, replay_ratio=0.4, max_steps=2).train()
    more = {"domain": "cs", "train_dataset": random_blocks(24), "replay_ratio": 0.4, "max_steps": 2}
    trainer = trainer_of(tmp_path, model, method, remember=remember, **more)
    trainer.train()
    shares = {name: share for name, (_, share) in trainer.train_dataset.memories.items()}
    assert shares == {"Replay": pytest.approx(0.2), "Replay remembered": pytest.approx(0.2)}


@pytest.mark.parametrize("kind", ["language model", "module"])
@pytest.mark.parametrize("name", CONSOLIDATING)
def test_methods_protect_the_base_model_in_the_first_domain(kind, name, tmp_path):
    """With text of the past another model comes out of the first domain, and the method has something to hold."""
    language, models = kind == "language model", []
    options = {**SMALL, **NEEDS.get(name, {}), "penalty_weight": 10.0, "max_steps": 6}
    for remember in (None, random_blocks(16, seed=5) if language else rows(7)):
        models.append(MODELS["causal"]() if language else Classifier())
        world = World(kind)
        trainer = world.train(tmp_path, models[-1], method := METHODS[name](), 0, remember=remember, **options)
        assert (trainer.remembered is None) == (remember is None)
    assert method.state_dict()
    if (kind, name) != ("language model", "agem"):  # whose gradients never disagree here
        assert not equal(*map(parameters, models))


def test_what_a_method_holds_is_what_it_would_hold_after_a_domain(tmp_path):
    """EWC, before the first step: the Fisher of the base model on what is remembered, as after a domain of no step."""
    text, options = random_blocks(16, seed=5), {"importance_samples": 16, "memory_size": 16, "fisher": "empirical"}
    held = []
    for given in ({"remember": text}, {"train_dataset": text, "domain": "remembered"}):
        method, before = EWC(), []
        trainer = trainer_of(tmp_path, MODELS["causal"](), method, max_steps=1, learning_rate=0.0, **given, **options)
        compute = trainer.compute_loss

        def noted(*args, compute=compute, method=method, before=before, **kwargs):
            before.append({name: value.clone() for name, value in method.importance.items()})
            return compute(*args, **kwargs)

        trainer.compute_loss = noted
        trainer.train()
        held.append(before[0] if "remember" in given else method.importance)
        assert ("remember" in given) == bool(before[0])
    assert held[0].keys() == held[1].keys() and any(value.any() for value in held[0].values())
    for name, value in held[0].items():
        torch.testing.assert_close(value, held[1][name], rtol=1e-4, atol=1e-9, msg=name)


def test_text_is_written_once_and_the_same_after_any_interruption(tmp_path):
    trainer = trainer_of(tmp_path, tiny_roberta(), memory_size=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "batch_size", 4)
        whole = Writer(trainer).rows(10, "x")
        part = list(Writer(trainer).batches(10, "x"))[0]
        resumed = Writer(trainer).rows(10, "x", written=part)
    assert [row["input_ids"].tolist() for row in whole] == [row["input_ids"].tolist() for row in resumed]
    assert len(whole) == 10 and len({tuple(row["input_ids"].tolist()) for row in whole}) == 10
    other = Writer(trainer).rows(10, "y")
    assert [row["input_ids"].tolist() for row in whole] != [row["input_ids"].tolist() for row in other]


@pytest.mark.parametrize("method", ["anchor", "ewc", "replay", "agem", ["das", "anchor"]])
def test_resumed_equals_uninterrupted(method, tmp_path):
    """With a checkpoint of the first domain, and with the words that the base model wrote in it."""
    models = []
    for directory, stops in (("whole", False), ("part", True), ("part", False)):
        models.append(tiny_roberta(0.1))
        options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "remember": {"self": 8}}
        trainer = trainer_of(tmp_path / directory, models[-1], method, replay_ratio=0.5, **options)
        if stops:
            original = trainer.training_step

            def stopped(*args, trainer=trainer, original=original, **kwargs):
                if trainer.state.global_step == 4:
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            trainer.training_step = stopped
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            continue
        trainer.train(resume_from_checkpoint=newest_checkpoint(tmp_path / directory) if len(models) == 3 else None)
    assert equal(parameters(models[0]), parameters(models[2]))


def test_importance_of_the_base_from_what_is_remembered(tmp_path):
    masks = []
    for importance in ("proxy", "remembered"):
        trainer = trainer_of(tmp_path, tiny_roberta(0.1), "das", importance=importance, remember=random_blocks(16))
        trainer.train()
        masks.append(next(one for one in trainer.methods if one.name == "das").importance)
    assert masks[0].domains == masks[1].domains == ["general", "bio"]
    assert any((masks[0].values[key] != masks[1].values[key]).any() for key in masks[0].values)
    with pytest.raises(UserError, match="importance: 'remembered' needs text that stands for the past"):
        trainer_of(tmp_path, tiny_roberta(0.1), "das", importance="remembered")


def test_given_text_is_written_to_no_file(tmp_path):
    trainer = trainer_of(tmp_path, MODELS["causal"](), "ewc", remember=random_blocks(16, seed=5))
    trainer.train()
    trainer.save_model(str(tmp_path / "bio"))
    ids = random_blocks(16, seed=5)["input_ids"]
    whole = b"".join(path.read_bytes() for path in (tmp_path / "bio").iterdir())
    for row in ids:
        assert all(torch.tensor(row, dtype=kind).numpy().tobytes() not in whole for kind in (torch.int32, torch.int64))


# ---- files of written text ------------------------------------------------------------------------------------------


def test_a_file_of_written_text(tmp_path):
    path, tokenizer = tmp_path / "self.safetensors", build_tokenizer()
    written = [{"input_ids": torch.tensor(ids)} for ids in random_blocks(9)["input_ids"]]
    save_written(path, written, tokenizer, {"seed": "42"})
    read, facts = load_written(path, tokenizer)
    assert [row["input_ids"].tolist() for row in read] == [row["input_ids"].tolist() for row in written]
    assert facts["seed"] == "42"
    trainer = trainer_of(tmp_path, MODELS["causal"](), remember={"self": path})
    assert len(trainer.remembered.sources["self"].rows) == 9
    tokenizer.add_tokens("another")
    with pytest.raises(UserError, match="written with another tokenizer"):
        load_written(path, tokenizer)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="cannot be read"):
        load_written(path, tokenizer)


def test_where_a_chat_begins():
    tokenizer = build_tokenizer()
    assert chat_opening(tokenizer) == ([], set())
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    opening, special = chat_opening(tokenizer)
    assert opening == [tokenizer.convert_tokens_to_ids("<s>")]
    assert special == {tokenizer.convert_tokens_to_ids(word) for word in ("<s>", "</s>")}
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="the chat template of the tokenizer fails"):
        chat_opening(tokenizer)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remember", "phrase"),
    [
        ({"wiki": []}, "wiki"),
        ({"self": 0}, "no number of rows"),
        ({"self": True}, "no number of rows"),
        ("wiki.txt", "neither 'self'"),
        ({"wiki": Path("nothing.safetensors")}, "cannot be read"),
        ({"wiki": (["some text of the past"], 0.0)}, "no source has a weight above 0"),
    ],
)
def test_what_is_nothing_to_remember(remember, phrase, tmp_path):
    with pytest.raises(UserError, match=phrase):
        trainer_of(tmp_path, MODELS["causal"](), remember=remember)


def test_a_module_writes_no_text(tmp_path):
    with pytest.raises(UserError, match="a module cannot write text"):
        World("module").train(tmp_path, Classifier(), "ewc", 0, remember="self")


def test_a_source_with_the_name_of_the_domain(tmp_path):
    trainer = trainer_of(tmp_path, MODELS["causal"](), remember={"bio": random_blocks(8)})
    with pytest.raises(UserError, match="'bio' is the name of the domain"):
        trainer.train()


def test_it_is_no_method_of_its_own():
    assert "remember" not in METHODS and "drift_budget" not in METHODS
    assert Remembered({"a": Source([1], 1.0)}).state_dict() == {}


def test_nothing_is_written_for_methods_that_have_no_use_for_it(tmp_path):
    written = {}
    for method, options in (("naive", {}), ("das", {"contrast_weight": 0.0}), ("replay", {})):
        trainer = trainer_of(tmp_path / method, MODELS["causal"](), method, remember="self", **options)
        trainer.train()
        written[method] = trainer.remembered.sources["self"].rows is not None
    assert written == {"naive": False, "das": False, "replay": True}
