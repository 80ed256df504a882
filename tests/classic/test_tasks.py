"""Images, tasks and the order of training: splits, permutations, label sets, IDX files."""

import gzip
import pickle
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader

from das_lm.classic import EXPERIMENTS, Examples, TrainingExamples, build_experiment, load_images
from das_lm.classic.images import read_idx, spread
from das_lm.data.collating import collate
from das_lm.errors import UserError

MNIST = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"
PARTS = ("train", "development", "test")


def as_rows(*parts):
    """The rows of tensors as plain tuples, to compare them as sets."""
    return [tuple(row) for part in parts for row in part.tolist()]


# ---- images --------------------------------------------------------------------------------------------------------


def test_digits_are_split_once_and_for_all():
    """Disjoint, covering, 60/20/20, every class in proportion."""
    images = load_images()
    assert [len(part.labels) for part in images] == [1079, 359, 359]
    whole = load_digits()
    rows = as_rows(*(torch.cat([part.pixels, part.labels[:, None]], 1) for part in images))
    expected = np.column_stack([whole.data / 16, whole.target]).tolist()
    assert sorted(rows) == sorted(map(tuple, expected))
    for part in images:
        assert part.pixels.dtype == torch.float32 and part.labels.dtype == torch.int64
        assert part.pixels.min() == 0 and part.pixels.max() == 1
        share = len(part.labels) / len(whole.target)
        expected = np.bincount(whole.target) * share
        assert np.abs(np.bincount(part.labels) - expected).max() < 2


def test_spread():
    classes = np.repeat([0, 1, 2], [60, 30, 10])
    chosen = spread(classes, 20, "a")
    assert np.bincount(classes[chosen]).tolist() == [12, 6, 2]
    assert np.array_equal(chosen, spread(classes, 20, "a"))
    assert not np.array_equal(chosen, spread(classes, 20, "b"))
    assert np.flatnonzero(spread(np.arange(12), 3)).tolist() == [2, 6, 10]
    assert spread(classes, 0).sum() == 0 and spread(classes, 100).sum() == 100


def idx_bytes(array):
    """An IDX file, as MNIST's page defines it."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def random_images(count, seed):
    generator = np.random.default_rng(seed)
    return generator.integers(256, size=(count, 3, 4)), np.arange(count) % 10


def write_pair(directory, part, arrays, separator="-", suffix=""):
    write = gzip.compress if suffix else bytes
    for kind, dimensions, array in zip(("images", "labels"), (3, 1), arrays, strict=True):
        path = directory / f"{part}-{kind}{separator}idx{dimensions}-ubyte{suffix}"
        path.write_bytes(write(idx_bytes(array)))


@pytest.mark.parametrize(("separator", "suffix"), [("-", ""), (".", ""), ("-", ".gz"), (".", ".gz")])
def test_idx_round_trip(tmp_path, separator, suffix):
    train, test = random_images(100, 0), random_images(20, 1)
    write_pair(tmp_path, "train", train, separator, suffix)
    write_pair(tmp_path, "t10k", test, separator, suffix)
    images = load_images(tmp_path)
    assert torch.equal(images.test.pixels, torch.tensor(test[0].reshape(20, 12) / 255, dtype=torch.float32))
    assert images.test.labels.tolist() == test[1].tolist()
    assert len(images.development.labels) == 20  # as many as for test
    assert np.bincount(images.development.labels).tolist() == [2] * 10
    expected = torch.tensor(train[0].reshape(100, 12) / 255, dtype=torch.float32)
    assert sorted(as_rows(images.train.pixels, images.development.pixels)) == sorted(as_rows(expected))


def test_one_part_and_two_files(tmp_path):
    write_pair(tmp_path, "t10k", random_images(100, 0))
    images = load_images(str(tmp_path))
    assert [len(part.labels) for part in images] == [60, 20, 20]
    (tmp_path / "t10k-images-idx3-ubyte").rename(tmp_path / "pictures")
    (tmp_path / "t10k-labels-idx1-ubyte").rename(tmp_path / "answers.gz")  # its bytes tell that it is not compressed
    again = load_images([tmp_path / "pictures", tmp_path / "answers.gz"])
    assert all(
        torch.equal(a, b) for one, other in zip(images, again, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n", "is no IDX file: it begins with '89 50 4e 47'"),
        (b"", "is no IDX file"),
        (struct.pack(">BBBBI", 0, 0, 0x0D, 1, 1) + b"\0" * 4, "IDX type 0x0d; only unsigned bytes"),
        (idx_bytes(np.zeros((2, 3, 4)))[:10], "ends within its header"),
        (idx_bytes(np.zeros((2, 3, 4)))[:-5], "announces 2 × 3 × 4 bytes, but there are 5 too few"),
        (idx_bytes(np.zeros((2, 3, 4))) + b"\0", "1 too many"),
        (gzip.compress(idx_bytes(np.zeros(9)), mtime=0)[:-9], r"cannot be read \(Compressed file ended"),
        (b"\x1f\x8b" + b"\xff" * 30, "cannot be read"),
    ],
)
def test_broken_idx_files(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_idx(tmp_path / "file")
    assert str(tmp_path / "file") in str(error.value)


def test_wrong_directories(tmp_path):
    with pytest.raises(UserError, match=r"there is no directory '.*nowhere'\. Write 'digits'"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds neither train-images-idx3-ubyte nor t10k"):
        load_images(tmp_path)
    with pytest.raises(UserError, match="gone: cannot be read"):
        load_images([tmp_path / "gone", tmp_path / "gone"])
    with pytest.raises(UserError, match="3 files; name two"):
        load_images(["a", "b", "c"])

    images, labels = random_images(30, 0)
    write_pair(tmp_path, "train", (images, labels[:-1]))
    with pytest.raises(UserError, match="holds 30 images, but .* 29 labels"):
        load_images(tmp_path)
    paths = [tmp_path / "train-labels-idx1-ubyte", tmp_path / "train-images-idx3-ubyte"]
    with pytest.raises(UserError, match="has 1 dimensions; images have 3. Are the files swapped"):
        load_images(paths)
    write_pair(tmp_path, "train", (images, labels))
    write_pair(tmp_path, "t10k", (images[:, :2], labels))
    with pytest.raises(UserError, match="differ in size, 12 and 8 pixels"):
        load_images(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte stands there without t10k-images-idx3-ubyte"):
        load_images(tmp_path)
    write_pair(tmp_path, "t10k", (images[:1], labels[:1]))
    (tmp_path / "train-images-idx3-ubyte").unlink()
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="1 images are too few to split off some for test"):
        load_images(tmp_path)


def hub_split(count, seed):
    pixels, labels = random_images(count, seed)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    rows = {"image": list(pixels.astype(np.uint8)), "label": labels.tolist()}
    return datasets.Dataset.from_dict(rows, features=features), pixels, labels


def test_hub(monkeypatch):
    pytest.importorskip("PIL", reason="datasets decodes images with Pillow")
    train, _, _ = hub_split(40, 0)
    test, pixels, labels = hub_split(10, 1)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name: {"someone/digits": {"train": train, "test": test}}[name]
    )
    images = load_images("hub:someone/digits")
    assert [len(part.labels) for part in images] == [30, 10, 10]
    assert torch.equal(images.test.pixels, torch.tensor(pixels.reshape(10, 12) / 255, dtype=torch.float32))
    assert images.test.labels.tolist() == labels.tolist()
    with pytest.raises(UserError, match="'someone/else' could not be loaded"):
        load_images("hub:someone/else")
    train = train.rename_column("image", "picture")
    with pytest.raises(UserError, match="no column 'image', but picture, label"):
        load_images("hub:someone/digits")


# ---- examples and their order --------------------------------------------------------------------------------------


def numbered(count, start=0):
    """Rows that can be told apart."""
    numbers = torch.arange(start, start + count)
    return Examples({"inputs": torch.stack([numbers, -numbers], 1).float(), "labels": numbers})


def test_examples():
    rows = numbered(5)
    assert len(rows) == 5
    assert {name: value.tolist() for name, value in rows[3].items()} == {"inputs": [3, -3], "labels": 3}
    batch = rows.__getitems__([4, 0])
    by_row = collate([rows[4], rows[0]])
    assert batch.keys() == by_row.keys() and all(torch.equal(batch[name], by_row[name]) for name in batch)
    assert rows.select([3, 1]).columns["labels"].tolist() == [3, 1]
    with pytest.raises(UserError, match="columns of one length, not {'inputs': 2, 'labels': 3}"):
        Examples({"inputs": torch.zeros(2, 1), "labels": torch.zeros(3)})
    with pytest.raises(UserError, match="columns of one length"):
        Examples({})


def order(examples):
    return examples.__getitems__(range(len(examples)))["labels"].tolist()


def test_order_is_a_function_of_seed_task_and_epoch():
    examples = TrainingExamples({"a": numbered(50)}, seed=0)
    first = order(examples)
    assert sorted(first) == list(range(50)) and first != sorted(first)
    examples.set_epoch(1)
    second = order(examples)
    assert second != first and sorted(second) == sorted(first)
    assert order(examples.at(0)) == first and order(examples) == second
    fresh = TrainingExamples({"a": numbered(50)}, seed=0)
    assert order(fresh.at(1)) == second  # without having seen epoch 0
    assert sorted(order(fresh.at(-1))) == sorted(first)
    assert order(TrainingExamples({"b": numbered(50)}, seed=0)) != first
    assert order(TrainingExamples({"a": numbered(50)}, seed=1)) != first


def test_schedules():
    tasks = {"a": numbered(40), "b": numbered(30, start=100)}
    alternating = order(TrainingExamples(tasks, seed=0, schedule="alternating"))
    assert alternating[:40] == order(TrainingExamples({"a": tasks["a"]}, seed=0))  # what comes beside changes nothing
    assert alternating[40:] == order(TrainingExamples({"b": tasks["b"]}, seed=0))
    interleaved = order(TrainingExamples(tasks, seed=0, schedule="interleaved"))
    assert sorted(interleaved) == sorted(alternating)
    assert 10 < sum(label < 100 for label in interleaved[:35]) < 30
    with pytest.raises(UserError, match="schedule: there is no 'interleave'. Did you mean 'interleaved'"):
        TrainingExamples(tasks, seed=0, schedule="interleave")
    with pytest.raises(UserError, match="need the same columns: a, c"):
        TrainingExamples({"a": tasks["a"], "c": Examples({"inputs": torch.zeros(3, 2)})}, seed=0)


def test_example_ids_belong_to_the_rows():
    def ids(examples):
        batch = examples.__getitems__(range(len(examples)))
        return dict(zip(batch["labels"].tolist(), batch["example_id"].tolist(), strict=True))

    tasks = {"a": numbered(40), "b": numbered(30, start=100)}
    both = ids(TrainingExamples(tasks, seed=0, schedule="interleaved"))
    assert len(set(both.values())) == 70
    assert ids(TrainingExamples({"b": tasks["b"]}, seed=5).at(3)).items() <= both.items()


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loader(workers):
    """Batches, with or without a worker that outlives the epoch, are the rows one by one."""
    examples = TrainingExamples({"a": numbered(10)}, seed=0)
    loader = DataLoader(
        examples, batch_size=4, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
    )
    for epoch in range(2):
        examples.set_epoch(epoch)
        batches = list(loader)
        assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
        rows = [examples[position] for position in range(10)]
        for name in ("inputs", "labels", "example_id"):
            assert torch.equal(torch.cat([b[name] for b in batches]), torch.stack([row[name] for row in rows]))


# ---- experiments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_holds_together(name):
    """The model reads what the tasks hold; no row is both trained on and measured on; two builds are one."""
    experiment, again = build_experiment(name, seed=1), build_experiment(name, seed=1)
    assert experiment.name == name and experiment.description
    assert len({task.name for task in experiment.tasks}) == len(experiment.tasks)
    model = experiment.build_model(2)
    for task, same in zip(experiment.tasks, again.tasks, strict=True):
        for part in PARTS:
            rows = getattr(task, part)
            assert all(torch.equal(rows.columns[k], getattr(same, part).columns[k]) for k in rows.columns)
            assert torch.isfinite(model(**rows.columns)["loss"])
        parts = [set(as_rows(getattr(task, part).columns["inputs"])) for part in PARTS]
        assert len(parts[0] | parts[1] | parts[2]) == sum(map(len, parts)) == sum(len(getattr(task, p)) for p in PARTS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.build_model(2).parameters(), strict=True))
    assert not torch.equal(model.heads[0].bias, experiment.build_model(3).heads[0].bias)
    pickle.dumps(experiment.build_model)


def test_permuted():
    images = load_images()
    experiment = build_experiment("permuted", seed=3, tasks=4)
    identity, *others = experiment.tasks
    assert [task.name for task in experiment.tasks] == ["identity", "permutation-1", "permutation-2", "permutation-3"]
    assert torch.equal(identity.train.columns["inputs"], images.train.pixels)
    assert [layer.out_features for layer in experiment.build_model(0).body[::2]] == [256, 128, 64]
    sources = []
    for task in others:
        shown, original = task.train.columns["inputs"], images.train.pixels
        assert torch.equal(task.train.columns["labels"], images.train.labels)
        assert torch.equal(shown.sort(1).values, original.sort(1).values) and not torch.equal(shown, original)
        # One permutation for all images and splits: any pixel of the task is one pixel of the original.
        source = [(original == shown[:, [pixel]]).all(0).nonzero()[0].item() for pixel in range(64)]
        assert torch.equal(task.test.columns["inputs"][:, 30], images.test.pixels[:, source[30]])
        sources.append(tuple(source))
    assert len(set(sources)) == 3

    more, other = build_experiment("permuted", seed=3, tasks=5), build_experiment("permuted", seed=4, tasks=4)
    for index, task in enumerate(experiment.tasks):
        inputs = task.test.columns["inputs"]
        assert torch.equal(inputs, more.tasks[index].test.columns["inputs"])
        assert torch.equal(inputs, other.tasks[index].test.columns["inputs"]) == (index == 0)


def labels_by_class(task, part="train"):
    """Class of an image -> label that the task gives it."""
    images = load_images()
    rows = dict(zip(as_rows(getattr(images, part).pixels), getattr(images, part).labels.tolist(), strict=True))
    columns = getattr(task, part).columns
    pairs = {
        (rows[row], label) for row, label in zip(as_rows(columns["inputs"]), columns["labels"].tolist(), strict=True)
    }
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize(
    ("scenario", "expected", "widths"),
    [
        ("task", [{0: 0, 1: 1, 2: 2}, {5: 0, 3: 1, 4: 2}], [3, 3]),
        ("domain", [{0: 0, 1: 1, 2: 2}, {5: 0, 3: 1, 4: 2}], [3]),
        ("class", [{0: 0, 1: 1, 2: 2}, {5: 3, 3: 4, 4: 5}], [6]),
    ],
)
def test_label_sets_of_the_scenarios(scenario, expected, widths):
    experiment = build_experiment("split", scenario=scenario, groups=[[0, 1, 2], [5, 3, 4]])
    assert experiment.scenario == scenario
    assert [task.name for task in experiment.tasks] == ["0-1-2", "5-3-4"]
    assert [labels_by_class(task) for task in experiment.tasks] == expected
    assert [head.out_features for head in experiment.build_model(0).heads] == widths
    images = load_images()
    for number, (task, group) in enumerate(zip(experiment.tasks, expected, strict=True)):
        for part in PARTS:
            rows = getattr(task, part)
            assert len(rows) == sum((getattr(images, part).labels == label).sum().item() for label in group)
            assert ("task" in rows.columns) == (scenario == "task")
            if scenario == "task":
                assert set(rows.columns["task"].tolist()) == {number}


def test_split_in_pairs_and_unequal_groups():
    experiment = build_experiment("split", scenario="class")
    assert [labels_by_class(task) for task in experiment.tasks] == [
        {2 * i: 2 * i, 2 * i + 1: 2 * i + 1} for i in range(5)
    ]
    unequal = build_experiment("split", scenario="task", groups=[[0, 1, 2], [8, 9]])
    model = unequal.build_model(0)
    assert [head.out_features for head in model.heads] == [3, 2]
    both = TrainingExamples({task.name: task.train for task in unequal.tasks}, 0, "interleaved")
    batch = both.__getitems__(range(16))
    assert len(set(batch["task"].tolist())) == 2
    del batch["example_id"]
    assert torch.isfinite(model(**batch)["loss"])


def test_odd_even():
    experiment = build_experiment("odd_even")
    assert [task.name for task in experiment.tasks] == ["even", "odd"]
    assert labels_by_class(experiment.tasks[0]) == {0: 0, 2: 1, 4: 2, 6: 3, 8: 4}
    assert labels_by_class(experiment.tasks[1], "test") == {1: 0, 3: 1, 5: 2, 7: 3, 9: 4}
    model = experiment.build_model(0)
    assert [tuple(p.shape) for n, p in model.named_parameters() if "weight" in n] == [(128, 64), (5, 128)]


def test_seasons():
    """The rows of the tutorial: its formula, its split, its normalisation."""
    days = np.arange(-26, 26 + 1 / 7, 1 / 7)
    prices = 0.005 * days**2 + 0.1 * np.sin(np.pi * days + 0) + 1
    mean, std = np.mean(days[151:334]), np.std(days[151:334])
    experiment = build_experiment("seasons")
    assert (experiment.measure, [task.name for task in experiment.tasks]) == ("r2", ["summer", "autumn"])
    for task, start, end in zip(experiment.tasks, (151, 243), (243, 334), strict=True):
        train_days, test_days, train_prices, test_prices = train_test_split(
            np.expand_dims(days[start:end], 1), prices[start:end], random_state=42
        )
        test = task.test.columns
        np.testing.assert_allclose(test["inputs"], (test_days - mean) / std, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(test["labels"], test_prices, rtol=1e-6)
        rest = [torch.cat([getattr(task, part).columns[k] for part in PARTS[:2]]) for k in ("inputs", "labels")]
        order = rest[0][:, 0].argsort()
        expected = train_days[:, 0].argsort()
        np.testing.assert_allclose(rest[0][order], (train_days[expected] - mean) / std, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(rest[1][order], train_prices[expected], rtol=1e-6)
        assert [len(getattr(task, part)) for part in PARTS] == [len(train_days) - 17, 17, 23]
    assert experiment.tasks[0].train.columns["inputs"].shape[1] == 1


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("permutated", {}, "no experiment 'permutated'. Did you mean 'permuted'"),
        ("seasons", {"data": "digits"}, "experiment 'seasons': unknown parameter 'data'"),
        ("permuted", {"tasks": 0}, "tasks: 0 must be 1 or more"),
        ("split", {"scenario": "classes"}, "there is no 'classes'. Did you mean 'class'"),
        ("split", {"groups": []}, "one list of classes per task"),
        ("split", {"groups": [[0, 1], [1, 2]]}, "no class twice"),
        ("split", {"groups": [[0, 1], [9, 10]]}, "no train images of class 10"),
        ("split", {"groups": [[0, 1], [2]], "scenario": "task"}, "a task of one class is nothing to learn"),
        ("split", {"groups": [[0, 1], [2, 3, 4]], "scenario": "domain"}, "needs groups of one size"),
    ],
)
def test_wrong_parameters(name, parameters, message):
    with pytest.raises(UserError, match=message):
        build_experiment(name, **parameters)


def train(experiment, task, model, epochs):
    examples = TrainingExamples({task.name: task.train}, seed=0)
    loader = DataLoader(examples, experiment.batch_size, collate_fn=collate)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(epochs):
        examples.set_epoch(epoch)
        for batch in loader:
            del batch["example_id"]
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            optimizer.step()


def accuracy(model, rows):
    with torch.no_grad():
        return (model(**rows.columns)["logits"].argmax(1) == rows.columns["labels"]).float().mean().item()


def test_a_plain_loop_learns_and_forgets():
    experiment = build_experiment("permuted", tasks=2)
    model = experiment.build_model(0)
    first, second = experiment.tasks
    train(experiment, first, model, experiment.epochs)
    assert accuracy(model, first.test) > 0.9
    train(experiment, second, model, experiment.epochs)
    assert accuracy(model, second.test) > 0.9
    assert accuracy(model, first.test) < 0.8


@pytest.mark.skipif(not MNIST.is_dir(), reason=f"real MNIST: there is no {MNIST}")
def test_real_mnist():
    images = load_images(MNIST)
    assert [len(part.labels) for part in images] == [6000, 2000, 2000]
    assert images.train.pixels.shape == (6000, 784)
    pixels = torch.cat([part.pixels for part in images])
    assert pixels.mean().item() == pytest.approx(0.1325, abs=1e-4)  # of the 10,000 test images
    labels = torch.cat([part.labels for part in images])
    assert torch.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]

    experiment = build_experiment("odd_even", data=MNIST)
    model = experiment.build_model(0)
    even, _ = experiment.tasks
    train(experiment, even, model, epochs=2)
    assert accuracy(model, even.test) > 0.9
    shapes = [
        tuple(layer.weight.shape)
        for layer in build_experiment("permuted", data=MNIST, tasks=1).build_model(0).body[::2]
    ]
    assert shapes == [(1024, 784), (512, 1024), (256, 512)]
