"""End-tasks: labelled text from every source, what is left out and counted, and fine-tuning that learns."""

import csv
import dataclasses
import hashlib
import json
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from das_lm.errors import UserError
from das_lm.measure import end_task
from das_lm.measure.end_task import EndTaskConfig, TaskData, classification_scores, fine_tune, load_task
from tests.helpers import BOS, EOS, VOCABULARY, build_tokenizer, tiny_roberta

CONFIG = EndTaskConfig(seeds=(0,), learning_rate=3e-3, epochs=3, batch_size=8, max_length=16)


def synthetic_task(noise=0.0):
    """Three classes, each with ten words of its own; a share of the labels is wrong."""
    draw = random.Random(0)

    def examples(count):
        rows = []
        for number in range(count):
            label = number % 3
            text = " ".join(f"w{10 * label + draw.randrange(10)}" for _ in range(draw.randint(3, 20)))
            rows.append((text, draw.randrange(3) if draw.random() < noise else label))
        return rows

    return TaskData("synthetic", ["a", "b", "c"], examples(96), examples(30), examples(30), {})


def save(directory):
    """A checkpoint in half precision, as the built-in one."""
    tiny_roberta(dropout=0.1).half().save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("checkpoint"))


def contents(directory):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(directory).rglob("*")}


# Fine-tuning


def test_scores_are_those_of_the_confusion_matrix():
    """Rows are the truth, columns what was predicted:  a 3 1 0,  b 1 1 0,  c 2 0 0."""
    targets = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predictions = np.array([0, 0, 0, 1, 0, 1, 0, 0])
    assert classification_scores(targets, predictions) == {
        "accuracy": 4 / 8,
        "micro_f1": 4 / 8,
        "macro_f1": pytest.approx((2 * 3 / (6 + 4) + 2 * 1 / (2 + 2) + 0) / 3),  # 2 TP / (predicted + true)
    }


def test_a_separable_task_is_learned_and_nothing_is_left_behind(checkpoint, tmp_path, monkeypatch, capfd):
    (tmp_path / "temporary").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")
    before, task = contents(checkpoint), synthetic_task()
    result = fine_tune(checkpoint, task, dataclasses.replace(CONFIG, seeds=(0, 1)))
    assert contents(checkpoint) == before
    assert {path.name for path in tmp_path.rglob("*")} == {"temporary", "here"}
    assert capfd.readouterr() == ("", "")  # no reports or bars of transformers

    measures = result.measures()
    assert json.loads(json.dumps(measures)) == measures
    assert min(measures["accuracy"]) > 0.9
    assert result.predictions.shape == (2, 30)
    targets = [label for _, label in task.test]
    assert measures["accuracy"] == [np.mean(row == targets) for row in result.predictions]
    assert (measures["train"], measures["dev"], measures["test"]) == (96, 30, 30)
    assert (measures["seeds"], measures["classes"], measures["skipped"]) == ([0, 1], ["a", "b", "c"], {})


@pytest.mark.parametrize("pad", ["<pad>", None])
def test_a_causal_model_learns_it_too(pad, tmp_path):
    """From its last token, whatever pads the batch: GPT-2's tokenizer has no padding."""
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "vocab_size": VOCABULARY}
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**shape, initializer_range=0.2, bos_token_id=BOS, eos_token_id=EOS)
    ).save_pretrained(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path)
    found = fine_tune(tmp_path, synthetic_task(), CONFIG)
    assert found.measures()["accuracy"][0] > 0.8  # a third by chance


def test_a_seed_says_it_all(checkpoint):
    task = synthetic_task(noise=0.5)

    def predictions(*seeds):
        config = dataclasses.replace(CONFIG, seeds=seeds, epochs=1, learning_rate=1e-3)
        return fine_tune(checkpoint, task, config).predictions

    both = predictions(3, 4)
    torch.rand(7)  # whatever was drawn before
    np.testing.assert_array_equal(predictions(4)[0], both[1])
    assert (both[0] != both[1]).any()


def test_the_best_epoch_on_dev_counts(checkpoint):
    """With wrong labels in dev, the more is learned, the worse it looks there."""
    task = synthetic_task()
    misled = dataclasses.replace(task, dev=[(text, (label + 1) % 3) for text, label in task.dev])
    right, wrong = fine_tune(checkpoint, task, CONFIG), fine_tune(checkpoint, misled, CONFIG)
    assert right.epochs[0] > 1
    assert wrong.epochs == [1]
    assert wrong.measures()["accuracy"][0] < right.measures()["accuracy"][0]


def test_training_rows_can_be_limited(checkpoint, monkeypatch):
    seen = []

    class Spy(transformers.Trainer):
        def __init__(self, *args, train_dataset, **kwargs):
            seen.append([tuple(row["input_ids"]) for row in train_dataset])
            super().__init__(*args, train_dataset=train_dataset, **kwargs)

    monkeypatch.setattr(transformers, "Trainer", Spy)
    task, tokenizer = synthetic_task(), build_tokenizer()
    config = dataclasses.replace(CONFIG, seeds=(0, 1), epochs=1, max_train=10)
    assert fine_tune(checkpoint, task, config).measures()["train"] == 10
    first, second = seen
    assert len(first) == 10
    assert first == second
    whole = {tuple(tokenizer(text, truncation=True, max_length=16)["input_ids"]) for text, _ in task.train}
    assert set(first) < whole


def test_a_half_precision_checkpoint_is_trained_in_fp32(checkpoint):
    assert {
        p.dtype for p in end_task._load_classifier(checkpoint, synthetic_task(), build_tokenizer()).parameters()
    } == {torch.float32}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seeds": ()}, "seeds: \\[\\]; give one or more"),
        ({"seeds": (1, 1)}, "seeds: \\[1, 1\\]; give one or more, each once"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0 must be above 0"),
        ({"max_train": 0}, "max_train: 0 must be above 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(UserError, match=message):
        EndTaskConfig(**options)


def without_tokenizer(directory):
    for path in directory.glob("tokenizer*"):
        path.unlink()
    return "no tokenizer"


def without_a_layer(directory):
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layer.1.output" not in name}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    return "lacks weights, which would be random: roberta.encoder.layer.1.output"


def with_broken_weights(directory):
    (directory / "model.safetensors").write_bytes(b"broken")
    return "cannot be loaded as a classifier"


@pytest.mark.parametrize("spoil", [without_tokenizer, without_a_layer, with_broken_weights])
def test_bad_checkpoints(tmp_path, spoil):
    message = spoil(save(tmp_path))
    with pytest.raises(UserError, match=message):
        fine_tune(tmp_path, synthetic_task(), CONFIG)


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no tokenizer can be loaded from '.*nowhere'"):
        fine_tune(tmp_path / "nowhere", synthetic_task(), CONFIG)


# Labelled text

TRAIN = [(f"text {number}", "b" if number % 3 else "a") for number in range(30)]
DEV, TEST = [("dev", "b")], [("test one", "a"), ("test two", "b")]


def write_jsonl(path, rows, columns=("text", "label")):
    path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))


def write_csv(path, rows, columns=("text", "label")):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([columns, *rows])


def write_task(directory, **splits):
    for split, rows in splits.items():
        write_jsonl(directory / f"{split}.jsonl", rows)
    return str(directory)


def test_jsonl_csv_and_hub_give_the_same(tmp_path, monkeypatch):
    for folder, write, dev in (("one", write_jsonl, "dev"), ("two", write_csv, "validation")):
        (tmp_path / folder).mkdir()
        for split, rows in (("train", TRAIN), (dev, DEV), ("test", TEST)):
            write(tmp_path / folder / f"{split}.{write.__name__[6:]}", rows)
    hub = {
        split: datasets.Dataset.from_list([{"text": text, "label": label} for text, label in rows])
        for split, rows in (("train", TRAIN), ("validation", DEV), ("test", TEST))
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub if name == "org/three" else None)
    one, two, three = (load_task(s) for s in (str(tmp_path / "one"), str(tmp_path / "two"), "hub:org/three"))
    number = {"a": 0, "b": 1}
    assert one.train == [(text, number[label]) for text, label in TRAIN]
    assert (one.name, one.classes, one.dev, one.skipped) == ("one", ["a", "b"], [("dev", 1)], {})
    assert one.test == [("test one", 0), ("test two", 1)]
    assert dataclasses.replace(two, name="one") == dataclasses.replace(three, name="one") == one
    assert (two.name, three.name) == ("two", "three")


def test_without_dev_a_tenth_of_train_is_split_off(tmp_path):
    task = load_task(write_task(tmp_path, train=TRAIN, test=TEST))
    assert (len(task.train), len(task.dev)) == (27, 3)
    assert {text for text, _ in task.train + task.dev} == {text for text, _ in TRAIN}
    assert task == load_task(str(tmp_path))
    assert [text for text, _ in task.dev] != [text for text, _ in TRAIN[:3]]


def test_what_is_left_out_is_counted(tmp_path):
    task = load_task(
        write_task(
            tmp_path,
            train=[*TRAIN, (" ", "a"), (None, "a"), ("text", None), ("text", " ")],
            dev=[*DEV, ("new", "c")],
            test=[*TEST, ("new", "c"), ("newer", "c"), ("newest", "d"), ("", "d")],
        )
    )
    assert task.skipped == {
        "train: no text": 2,
        "train: no label": 2,
        "dev: label 'c' is not in train": 1,
        "test: label 'c' is not in train": 2,
        "test: label 'd' is not in train": 1,
        "test: no text": 1,
    }
    assert (task.classes, len(task.train), len(task.dev), len(task.test)) == (["a", "b"], 30, 1, 2)


def test_whole_numbers_are_labels_and_columns_have_names(tmp_path):
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [(f"text {n}", n % 2) for n in range(20)], ("body", "kind"))
    task = load_task(str(tmp_path), text_column="body", label_column="kind")
    assert task.classes == ["0", "1"]
    assert task.test[:2] == [("text 0", 0), ("text 1", 1)]


@pytest.mark.parametrize(
    "splits, message",
    [
        ({"train": [("x", "a"), ("y", "a")], "test": TEST}, "train has one class, 'a'; a classifier needs two"),
        ({"train": TRAIN}, "no test .*; found: train"),
        ({"valid": TRAIN}, "no train and no test .*; found: valid"),
        ({}, "no train and no test .*; found: nothing"),
        ({"train": [], "test": TEST}, "train has no row to use"),
        ({"train": TRAIN, "test": [("x", "c")]}, "test has no row to use. test: label 'c' is not in train .1."),
        ({"train": TRAIN, "test": [(3, "a")]}, "test.jsonl:1: column 'text' holds 3, not text"),
        ({"train": TRAIN, "test": [("x", 0.5)]}, "test.jsonl:1: column 'label' holds 0.5, no text or whole number"),
        ({"train": TRAIN, "test": [("x", ["a"])]}, "test.jsonl:1: column 'label' holds a list, no text or whole"),
    ],
)
def test_tasks_that_are_refused(tmp_path, splits, message):
    with pytest.raises(UserError, match=message):
        load_task(write_task(tmp_path, **splits))


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("train.jsonl", '{"text": "x", "label": "a"}\n{"text": ', "train.jsonl:2: broken JSON"),
        ("train.jsonl", "[1]", "train.jsonl:1: a list; write one JSON object per line"),
        ("train.jsonl", '{"body": "x", "label": "a"}', "train.jsonl:1: no column 'text'; there is body, label"),
        ("train.csv", 'text,label\nx,a\n"y" z,b\n', "train.csv:3: broken CSV"),
        ("train.csv", "text,class\nx,a\n", "train.csv:2: no column 'label'; there is text, class. Set label_column"),
        ("train.csv", b"text,label\n\xff,a\n", "train.csv: cannot be read: .*utf-8"),
        ("test.csv", "text,label\n", "both test.csv and test.jsonl are there"),
    ],
)
def test_files_that_are_refused(tmp_path, name, data, message):
    write_task(tmp_path, test=TEST)
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UserError, match=message):
        load_task(str(tmp_path))


def test_no_directory_and_no_hub_data_set(monkeypatch):
    with pytest.raises(UserError, match="'nowhere' is no directory; give one with train, dev and test"):
        load_task("nowhere")

    def fail(name):
        raise RuntimeError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="end-task 'hub:org/name' could not be loaded: no network. Check its name"):
        load_task("hub:org/name")
