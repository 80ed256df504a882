"""What users of the Trainer and of TRL hand over: models, arguments, methods, data, functions, collators."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from datasets import IterableDataset as HubStream
from torch.utils.data import IterableDataset, TensorDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    TrainingArguments,
    default_data_collator,
)

from das_lm import ContinualTrainer, DASConfig, DASTrainer, Domain, continual_pretrain, load_recipe
from das_lm.data.built_in import MODELS
from das_lm.data.collating import PaddingCollator
from das_lm.errors import UserError
from das_lm.methods import EWC
from tests.helpers import WORDS, build_tokenizer, random_blocks, tiny_roberta

TOKENIZER = build_tokenizer()
TEXTS = [" ".join(WORDS[i % 50 : i % 50 + 8]) for i in range(40)]
OPTIONS = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
}


def config(directory, **options):
    return DASConfig(str(directory), **{**OPTIONS, "max_length": 12, "importance_samples": 4, **options})


def trainer_of(directory, train=None, held_out=None, method="naive", options=None, **more):
    more = {"processing_class": TOKENIZER, **more}
    if "model_init" not in more:
        more.setdefault("model", tiny_roberta())
    args = config(directory, **(options or {}))
    return ContinualTrainer(args=args, method=method, train_dataset=train, eval_dataset=held_out, domain="bio", **more)


def blocks_of(trainer):
    """The text that is trained on, block by block."""
    return [row["input_ids"].tolist() for row in trainer.train_dataset.domains["bio"]]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def refused(message):
    return pytest.raises(UserError, match=message)


# ---- model, arguments, methods -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "model"
    tiny_roberta(seed=3).save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return str(directory)


def test_model_by_name(saved, tmp_path):
    """It brings its tokenizer, is in fp32, and knows where it was loaded from."""
    named = ContinualTrainer(saved, config(tmp_path), train_dataset=TEXTS, domain="bio")
    given = trainer_of(tmp_path, TEXTS, model=tiny_roberta(seed=3))
    assert len(named.processing_class) == len(TOKENIZER) and named.model.name_or_path == saved
    assert all(parameter.dtype == torch.float32 for parameter in named.model.parameters())
    for trainer in (named, given):
        trainer.train()
    assert losses(named) == losses(given)


def test_model_by_name_is_of_the_kind_that_was_saved():
    trainer = ContinualTrainer(
        "built-in-causal", DASConfig(use_cpu=True), model_init_kwargs={"attn_implementation": "eager"}
    )
    assert trainer.criterion.causal and trainer.model.config._attn_implementation == "eager"
    assert type(trainer.model) is type(AutoModelForCausalLM.from_pretrained(MODELS["built-in-causal"]))


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        (None, {}, "model: give a model or its name, or in its place a model_init"),
        ("m", {"model_init": tiny_roberta}, "model: give a model or its name, or in its place a model_init"),
        ("no/such-model", {}, "'no/such-model' cannot be loaded: "),
        ("built-in", {"model_init_kwargs": {"dytpe": 1}}, "cannot be loaded: .*dytpe"),
        (tiny_roberta(), {"model_init_kwargs": {"dtype": "auto"}}, "model_init_kwargs: are for a model .* by name"),
        ("no/such-model", {}, "^model: 'no/such-model'"),
        (type(tiny_roberta()), {}, "model: type is no model; give a model or its name"),
        (None, {"model_init": lambda: "roberta"}, "model: str is no model; .*model_init: return one"),
        (None, {"model_init": lambda seed, size: None}, "model_init: give a function of nothing, or of a trial alone"),
        (None, {"model_init": "roberta"}, "model_init: give a function of nothing"),
        (tiny_roberta(), {"processing_class": "roberta-base"}, "processing_class: str is no tokenizer; give what"),
        (torch.nn.Linear(1, 1), {"processing_class": TOKENIZER}, "processing_class: Linear is no language model"),
        (tiny_roberta(), {"processing_class": TOKENIZER, "architecture": "roberta"}, "architecture: give an Archit"),
    ],
)
def test_models_that_cannot_be(model, more, message, tmp_path):
    with refused(message):
        ContinualTrainer(model, config(tmp_path), train_dataset=TEXTS, **more)


def test_model_by_its_directory(saved, tmp_path):
    trainer = ContinualTrainer(Path(saved), config(tmp_path), train_dataset=TEXTS)
    assert trainer.model.name_or_path == saved and len(trainer.processing_class) == len(TOKENIZER)


def test_adapter_by_name(saved, tmp_path):
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "base_model_name_or_path": "{saved}"}}')
    with refused("is an adapter; load it with PEFT's PeftModel, and give the model"):
        ContinualTrainer(str(tmp_path), config(tmp_path), train_dataset=TEXTS)


def long_roberta():
    return tiny_roberta(max_position_embeddings=200)


def test_plain_training_arguments(tmp_path):
    """They train as a DASConfig with the same values does."""
    options = {**OPTIONS, "weight_decay": 0.3, "seed": 5}
    plain = TrainingArguments(str(tmp_path), **options, hub_token="secret")
    blocks, trainers = random_blocks(20), []
    for args in (plain, DASConfig(str(tmp_path), **options)):
        trainers.append(ContinualTrainer(long_roberta(), args, "ema", blocks, processing_class=TOKENIZER))
        trainers[-1].train()
    assert trainers[0].args.hub_token == "secret" and trainers[0].args.contrast_weight == 1
    assert losses(trainers[0]) == losses(trainers[1]) and len(losses(trainers[0])) == 2


def test_no_arguments_and_those_of_another_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(ContinualTrainer(long_roberta(), processing_class=TOKENIZER).args, DASConfig)

    class OtherConfig(TrainingArguments):
        pass

    with refused("args: OtherConfig is of another trainer; give a ContinualConfig, or TrainingArguments"):
        ContinualTrainer(long_roberta(), OtherConfig(str(tmp_path)), processing_class=TOKENIZER)


def test_method_by_class(tmp_path):
    trainer = trainer_of(tmp_path, TEXTS, method=[EWC, "ema"])
    assert [type(one).__name__ for one in trainer.methods] == ["EWC", "EMA"]
    with refused("method: PaddingCollator is no method; give a name such as 'das', or a Method"):
        trainer_of(tmp_path, TEXTS, method=PaddingCollator(TOKENIZER))


# ---- a model for every run -----------------------------------------------------------------------------------------


def test_model_init_begins_every_training_anew(tmp_path):
    """With the model, what methods keep of it: two trainings are one, and that of a model that is given."""
    trainer = trainer_of(
        tmp_path, TEXTS, method="replay", model_init=lambda: tiny_roberta(seed=3), options={"replay_ratio": 0.5}
    )
    given = trainer_of(tmp_path, TEXTS, method="replay", model=tiny_roberta(seed=3), options={"replay_ratio": 0.5})
    runs = []
    for one in (trainer, trainer, given):
        one.train()
        runs.append(losses(one)[-2:])
    assert runs[0] == runs[1] == runs[2]
    assert trainer.methods[0].model is trainer.model and trainer.methods[0].memory.seen == len(trainer.train_dataset)


def test_model_init_resumes(tmp_path):
    """What the methods kept is read after the model was made."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "non_unit_lr_scale": 0.0}
    whole, rest = (
        trainer_of(tmp_path / name, TEXTS, method="das", model_init=lambda: tiny_roberta(), options=options)
        for name in "ab"
    )
    whole.train()
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for ours, theirs in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.requires_grad
    assert rest.methods[0].importance.domains == ["general", "bio"]


def test_hyperparameter_search(tmp_path):
    """Two trials: each is what a trainer with its arguments gives, and the better one is the one with less loss."""
    pytest.importorskip("optuna")
    rates = [1e-4, 3e-2]
    trainer = trainer_of(
        tmp_path, TEXTS, {"bio": TEXTS[:9], "law": TEXTS[9:12]}, method="das", model_init=lambda: tiny_roberta()
    )

    def space(trial):
        return {"learning_rate": rates[trial.number], "seed": 7 + trial.suggest_int("number", 0, 0)}

    best = trainer.hyperparameter_search(space, n_trials=2, direction="minimize", backend="optuna")
    alone = []
    for rate in rates:
        one = trainer_of(
            tmp_path, TEXTS, method="das", model=tiny_roberta(), options={"learning_rate": rate, "seed": 7}
        )
        one.train()
        held_out = trainer.inputs.held_out({"bio": TEXTS[:9], "law": TEXTS[9:12]})  # masks of the first seed
        alone.append(np.mean([one.evaluate(each)["eval_loss"] for each in held_out.values()]))
    assert alone[0] < alone[1] - 0.1
    assert best.run_id == "0" and best.objective == pytest.approx(alone[0], rel=1e-5)


def test_searches_that_cannot_be(tmp_path):
    pytest.importorskip("optuna")
    with refused("hyperparameter_search: .* give the trainer a model_init in place of a model"):
        trainer_of(tmp_path, TEXTS, TEXTS[:3]).hyperparameter_search(n_trials=1, backend="optuna")
    trainer = trainer_of(tmp_path, TEXTS, TEXTS[:3], model_init=lambda: tiny_roberta())
    with refused("hyperparameter_search: mlm_probability changes the text itself; make a trainer for each"):
        trainer.hyperparameter_search(
            lambda trial: {"mlm_probability": trial.suggest_float("mlm_probability", 0.3, 0.4)},
            n_trials=1,
            backend="optuna",
        )
    with refused("method: with model_init every run begins anew; give a method's name or class, no object"):
        trainer_of(tmp_path, TEXTS, method=EWC(), model_init=lambda: tiny_roberta())
    optimizer = torch.optim.SGD(tiny_roberta().parameters(), 0.1)
    with refused("optimizers: belong to one model"):
        trainer_of(tmp_path, TEXTS, model_init=lambda: tiny_roberta(), optimizers=(optimizer, None))


# ---- text ----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """As a user writes one."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        yield from self.rows


class MapStyle(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def rows_named(column):
    return [{column: text, "label": 0} for text in TEXTS]


@pytest.mark.parametrize(
    ("data", "column"),
    [
        (TEXTS, "text"),
        (tuple(TEXTS), "text"),
        (np.array(TEXTS), "text"),
        (rows_named("text"), "text"),
        (rows_named("body"), "body"),
        (MapStyle(rows_named("body")), "body"),
        (Dataset.from_list(rows_named("body")), "body"),
        (DatasetDict(train=Dataset.from_list(rows_named("text")), test=Dataset.from_dict({"text": ["w1"]})), "text"),
        (["", *TEXTS[:20], "  \n", *TEXTS[20:], None], "text"),
        (Dataset.from_dict({"text": ["", *TEXTS[:20], "  ", *TEXTS[20:], None]}), "text"),
    ],
)
def test_forms_of_text(data, column, tmp_path):
    """All give the blocks and the windows that a data set with a column `text` gives, empty rows or none."""
    plain = Dataset.from_dict({"text": TEXTS})
    expected = trainer_of(tmp_path, plain, plain)
    trainer = trainer_of(tmp_path, data, data["train"] if isinstance(data, DatasetDict) else data, text_column=column)
    assert blocks_of(trainer) == blocks_of(expected)
    assert trainer.eval_dataset.fingerprint == expected.eval_dataset.fingerprint
    assert trainer.evaluate()["eval_documents"] == len(TEXTS)


@pytest.mark.parametrize("data", [Stream(TEXTS), Stream(rows_named("text")), Domain("bio", "t.txt", streaming=True)])
def test_streams(data, tmp_path, monkeypatch):
    """The same blocks in the same order, whatever the stream is of; read again when it ends."""
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("\n".join(TEXTS) + "\n")
    if isinstance(data, Domain):
        data = data.load().train
        texts = [row["text"] for row in data]
    else:
        texts = TEXTS
    options = {"max_steps": 12}
    plain = trainer_of(tmp_path, HubStream.from_generator(lambda: ({"text": text} for text in texts)), options=options)
    trainer = trainer_of(tmp_path, data, options=options)
    assert len(trainer.train_dataset) == 12 * 4 > trainer.train_dataset.available(10**6)
    for position in range(48):
        assert (
            trainer.train_dataset[position]["input_ids"].tolist()
            == plain.train_dataset[position]["input_ids"].tolist()
        )
    trainer.train()
    assert len(losses(trainer)) == 12


def test_splits(tmp_path):
    """To be measured: all but `train`, or `train` where it is alone; by domain they are named after both."""
    documents = Dataset.from_dict({"text": TEXTS[:4]})
    both = DatasetDict(train=documents, validation=documents, test=documents)
    assert set(trainer_of(tmp_path, both, both).eval_dataset) == {"validation", "test"}
    trainer = trainer_of(tmp_path, both, {"wiki": DatasetDict(train=documents), "law": both})
    assert set(trainer.eval_dataset) == {"wiki", "law_validation", "law_test"}
    assert {"eval_wiki_loss", "eval_law_test_loss"} < set(trainer.evaluate())
    with refused("train_dataset: has no split 'train'; give one of its splits, test"):
        trainer_of(tmp_path, DatasetDict(test=documents))


def test_evaluate_what_is_given(tmp_path):
    """Documents, documents by domain, or a name: as if the trainer had been made with them."""
    trainer = trainer_of(tmp_path, TEXTS, {"bio": TEXTS[:5], "law": TEXTS[5:12]})
    known = trainer.evaluate()
    assert trainer.evaluate(TEXTS[:5])["eval_loss"] == known["eval_bio_loss"]
    other = trainer.evaluate({"new": TEXTS[5:12], "old": Dataset.from_dict({"text": TEXTS[:5]})})
    assert (other["eval_new_loss"], other["eval_old_loss"]) == (known["eval_law_loss"], known["eval_bio_loss"])
    assert trainer.evaluate("law")["eval_loss"] == known["eval_law_loss"]
    with refused("evaluate: the trainer has no lwa; it has bio, law; give documents"):
        trainer.evaluate("lwa")
    with refused("evaluate: the trainer has no eval_dataset; give documents"):
        trainer_of(tmp_path, TEXTS).evaluate()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("bio.txt", r"train_dataset: 'bio.txt' is a name; .* Domain\('name', data='bio.txt'\).load\(\)"),
        ({"bio": TEXTS}, r"train_dataset: a dictionary; one domain is learned at a time: .* \['bio'\]"),
        (Dataset.from_dict({"txet": TEXTS}), "train_dataset: no column 'text'; there is txet. Set `text_column`"),
        ([{"body": "a"}], "train_dataset: no column 'text'; there is body. Set `text_column`"),
        (["", " "], "train_dataset: the text is empty: no document holds more than white space"),
        ([], "train_dataset: the text is empty"),
        (["w1 w2", 3], "train_dataset: row 1 is int, not text; give a list of texts"),
        (
            Dataset.from_dict({"text": [1, 2]}),
            "train_dataset, row 0: column 'text' holds 1, not text; .*`text_column`",
        ),
        ((text for text in TEXTS), "train_dataset: generator holds no documents; give a data set .* or a list of"),
        (TensorDataset(torch.zeros(3, 2)), "train_dataset: row 0 is tuple, not text; give a list of texts"),
        ([{"input_ids": "w1"}], "train_dataset: input_ids hold string, not token ids; give a list of ids a row"),
        ([{"input_ids": [5]}, {"input_ids": 5}], "train_dataset: input_ids are not lists of token ids: "),
        ([{"input_ids": [5, 999]}], "input_ids have 2 to 2 tokens with ids from 5 to 999; the model reads 1 to 38 "),
        ([{"input_ids": [5, -1]}], "with ids from -1 to 5; the model reads"),
        ([{"input_ids": [5]}, {"input_ids": [5] * 50}], "input_ids have 1 to 50 tokens with ids from 5 to 5; the"),
        ([{"input_ids": [5]}, {"input_ids": []}], "input_ids have 0 to 1 tokens"),
    ],
)
def test_what_is_no_text(data, message, tmp_path):
    with refused(message):
        trainer_of(tmp_path, data)


def test_a_streams_column_is_named_as_the_trainers_argument(tmp_path):
    with refused("no column 'text'; there is body. Set `text_column`"):
        trainer_of(tmp_path, Stream([{"body": "a"}])).train()
    with refused("column 'text' holds 1, not text; name another as `text_column`"):
        trainer_of(tmp_path, Stream([1])).train()


def test_streams_that_cannot_be(tmp_path):
    with refused("eval_dataset: a stream has no end; give its first documents"):
        trainer_of(tmp_path, TEXTS, Stream(TEXTS))
    with refused("max_steps: how long domain 'bio' is, is not known"):
        trainer_of(tmp_path, Stream(TEXTS), options={"max_steps": -1})


# ---- one reader ----------------------------------------------------------------------------------------------------


def test_python_reads_what_the_command_line_reads(tmp_path, monkeypatch):
    """The example of the README, with a tiny model: its blocks and windows are those of the walk."""
    monkeypatch.chdir(tmp_path)
    for name, words in (("bio", WORDS[:30]), ("wiki", WORDS[30:])):
        documents = [" ".join(np.random.default_rng(i).choice(words, 14)) for i in range(30)]
        Path(f"{name}.txt").write_text("\n\n".join(d.replace(" ", "\n", 1) for d in documents) + "\n")
    base = "HuggingFaceTB/SmolLM2-135M"
    AutoModelForCausalLM.from_pretrained(MODELS["built-in-causal"]).save_pretrained(base)
    AutoTokenizer.from_pretrained(MODELS["built-in-causal"]).save_pretrained(base)
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    example = re.search(r"## From Python\n\n```python\n(.*?)```", readme, re.S)[1]
    options = "max_length=12, max_steps=2, importance_samples=4, report_to='none'"
    example = example.replace("max_length=512", options).replace('"self": 1024', '"self": 8')
    names = {}
    exec(example, names)
    python = names["trainer"]

    walked = []
    monkeypatch.setattr(ContinualTrainer, "train", lambda self, *args, **kwargs: walked.append(self))
    Path("recipe.yaml").write_text(
        f"model_name_or_path: {base}\noutput_dir: run\nmethod: [das, anchor]\nremember: [{{self: 8}}]\n"
        "domains: [{name: bio, data: bio.txt}]\nmeasure: [{name: wiki, data: wiki.txt}]\n"
        "training: {max_length: 12, max_steps: 2, importance_samples: 4, use_cpu: true, report_to: none}\n"
    )
    continual_pretrain(load_recipe("recipe.yaml"))
    (walk,) = walked
    assert blocks_of(python) == blocks_of(walk) and len(blocks_of(walk)) > 20
    assert set(python.eval_dataset) == set(walk.eval_dataset) == {"bio", "wiki"}
    for name, windows in walk.eval_dataset.items():
        assert python.eval_dataset[name].fingerprint == windows.fingerprint
    assert Path("bio", "importance.safetensors").is_file()


# ---- other modules -------------------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, inputs, labels):
        logits = self.layer(inputs)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def module_trainer(directory, train=None, held_out=None, **more):
    return ContinualTrainer(Linear(), config(directory), train_dataset=train, eval_dataset=held_out, **more)


INPUTS, LABELS = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 2


def test_tensor_data_sets(tmp_path):
    """Columns go to the arguments of forward in their order."""
    tensors = TensorDataset(INPUTS, LABELS)
    rows = [{"inputs": x, "labels": y} for x, y in tensors]
    both = [module_trainer(tmp_path, data, {"all": data}) for data in (tensors, rows)]
    for trainer in both:
        trainer.train()
    assert losses(both[0]) == losses(both[1]) and len(losses(both[0])) == 2
    assert both[0].evaluate()["eval_all_accuracy"] == both[1].evaluate()["eval_all_accuracy"]
    assert both[0].evaluate(tensors)["eval_loss"] == both[1].evaluate()["eval_all_loss"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            TensorDataset(INPUTS, LABELS, LABELS),
            "rows hold 3 columns without names, and Linear.forward takes inputs, ",
        ),
        (TEXTS, "rows hold str, and Linear.forward takes inputs, labels; .* give its tokenizer as processing_class"),
        (Dataset.from_dict({"text": TEXTS}), "rows hold text, and Linear.forward takes inputs, labels; "),
        (Stream(TEXTS), "Stream has no length; a module needs a map-style data set"),
        ({"bio": TensorDataset(INPUTS, LABELS)}, "a dictionary; one domain is learned at a time"),
    ],
)
def test_data_that_no_module_takes(data, message, tmp_path):
    with refused(f"train_dataset: {message}"):
        module_trainer(tmp_path, data)


# ---- functions and collators ---------------------------------------------------------------------------------------


def share_of_hits(prediction):
    assert prediction.predictions.shape == prediction.label_ids.shape
    return {"hits": (prediction.predictions == prediction.label_ids).mean()}


def test_metrics_of_a_language_model(tmp_path):
    """Logits and labels of the predicted tokens, and of nothing else, in documents of several windows."""
    held_out = [" ".join(TEXTS[i : i + 3]) for i in range(9)]
    seen = []

    def compute(prediction):
        seen.append(prediction)
        return {"nats": F.cross_entropy(*map(torch.tensor, (prediction.predictions, prediction.label_ids)))}

    trainer = trainer_of(tmp_path, TEXTS, {"bio": held_out}, compute_metrics=compute)
    metrics = trainer.evaluate()
    (prediction,) = seen
    assert prediction.predictions.shape == (metrics["eval_bio_tokens"], len(TOKENIZER))
    assert metrics["eval_bio_nats"] == pytest.approx(metrics["eval_bio_loss"], rel=1e-5)
    output = trainer.predict(held_out)
    assert np.array_equal(output.predictions, prediction.predictions)
    assert output.metrics["test_loss"] == metrics["eval_bio_loss"]

    small = trainer_of(
        tmp_path,
        TEXTS,
        {"bio": held_out},
        compute_metrics=share_of_hits,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    metrics = small.evaluate()
    assert metrics["eval_bio_hits"] == pytest.approx(metrics["eval_bio_accuracy"], abs=1e-9)
    assert small.predict(held_out).predictions.shape == output.label_ids.shape
    for several in (None, {"bio": held_out, "law": held_out}):
        with refused("test_dataset: give held-out data of one domain"):
            small.predict(several)
    with refused("preprocess_logits_for_metrics: return a tensor with one row for each of the"):
        trainer_of(tmp_path, TEXTS, preprocess_logits_for_metrics=lambda logits, _: logits.mean()).predict(held_out)


def test_metrics_of_a_module(tmp_path):
    data = TensorDataset(INPUTS, LABELS)
    trainer = module_trainer(
        tmp_path, held_out=data, compute_metrics=lambda p: {"hits": (p.predictions.argmax(-1) == p.label_ids).sum()}
    )
    output = trainer.predict(data)
    torch.testing.assert_close(torch.tensor(output.predictions), trainer.model.layer(INPUTS).detach())
    assert output.label_ids.tolist() == LABELS.tolist()
    metrics = trainer.evaluate()
    assert metrics["eval_hits"] == metrics["eval_accuracy"] * 10 == output.metrics["test_hits"]

    class LossAlone(Linear):
        def forward(self, inputs, labels):
            return super().forward(inputs, labels)["loss"]

    with refused("compute_metrics and predict need logits and labels: let the module's forward"):
        ContinualTrainer(LossAlone(), config(tmp_path)).predict(data)


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        ({"compute_loss_func": lambda *_, **__: 0}, {}, "compute_loss_func: .* leave it out, or train a module"),
        ({"compute_metrics": len}, {"batch_eval_metrics": True}, "batch_eval_metrics: compute_metrics gets"),
        ({"compute_metrics": len}, {"include_for_metrics": ["loss"]}, "include_for_metrics: compute_metrics gets"),
        ({"compute_metrics": len}, {"eval_do_concat_batches": False}, "eval_do_concat_batches: compute_metrics gets"),
        ({"compute_metrics": len}, {"prediction_loss_only": True}, "prediction_loss_only: compute_metrics needs the"),
        ({"data_collator": "x"}, {}, "data_collator: str is none; give a function of a list of rows"),
        ({"data_collator": DataCollatorForLanguageModeling(TOKENIZER)}, {}, "data_collator: DataCollatorForLanguage"),
        ({"data_collator": DataCollatorWithPadding(TOKENIZER)}, {}, "data_collator: DataCollatorWithPadding would"),
        ({"data_collator": default_data_collator}, {}, "data_collator: default_data_collator would"),
    ],
)
def test_what_would_be_ignored_or_done_twice(more, options, message, tmp_path):
    with refused(message):
        trainer_of(tmp_path, TEXTS, options=options, **more)


def test_own_collator(tmp_path):
    """It gets rows that are masked, and makes the batch."""
    seen = []

    def collator(rows):
        seen.extend(rows)
        return PaddingCollator(TOKENIZER)(rows)

    own, plain = trainer_of(tmp_path, TEXTS, data_collator=collator), trainer_of(tmp_path, TEXTS)
    for trainer in (own, plain):
        trainer.train()
    assert losses(own) == losses(plain) and all((row["labels"] != -100).any() for row in seen)


def without(name):
    def collator(rows):
        batch = PaddingCollator(TOKENIZER)(rows)
        del batch[name]
        return batch

    return collator


def masked_again(rows):
    return DataCollatorForLanguageModeling(TOKENIZER)(rows)


def test_own_collator_need_not_know_what_the_trainer_knows_of_rows(tmp_path):
    own, plain = (
        trainer_of(tmp_path, TEXTS, TEXTS, ["das", "self_replay"], {"memory_size": 4, "replay_ratio": 0.5}, **more)
        for more in ({"data_collator": lambda rows: drop_own(PaddingCollator(TOKENIZER)(rows))}, {})
    )
    for trainer in (own, plain):
        trainer.train()
    assert losses(own) == losses(plain) and own.evaluate()["eval_documents"] == plain.evaluate()["eval_documents"]


def drop_own(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


@pytest.mark.parametrize(
    ("collator", "message"),
    [
        (masked_again, "data_collator: the rows are masked and labelled already, and it made other labels"),
        (DataCollatorForLanguageModeling(TOKENIZER).torch_call, "it made other labels"),
        (without("labels"), "data_collator: makes no labels; return a mapping"),
        (without("attention_mask"), "data_collator: makes no attention_mask"),
        (lambda rows: rows, "data_collator: makes no input_ids, attention_mask, labels"),
    ],
)
def test_own_collators_that_cannot_be(collator, message, tmp_path):
    with refused(message):
        trainer_of(tmp_path, TEXTS, data_collator=collator).train()


def test_metrics_are_a_dictionary(tmp_path):
    with refused("compute_metrics: returned float; return a dictionary of numbers"):
        trainer_of(tmp_path, TEXTS, TEXTS, compute_metrics=lambda _: 0.5).evaluate()


def test_development_data_without_a_name_is_of_the_domain(tmp_path):
    options = {"interpolation_alpha": "auto"}
    trainer = trainer_of(tmp_path, TEXTS, None, "interpolate", options, development_dataset=TEXTS[:6])
    trainer.train()
    assert trainer.methods[0].chosen_on == ["bio"]


def test_das_trainer_takes_them_too(saved, tmp_path):
    trainer = DASTrainer(saved, config(tmp_path), train_dataset=TEXTS)
    trainer.train()
    assert trainer.methods[0].importance.domains == ["general", "domain"]
