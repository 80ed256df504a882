"""Classic continual-learning experiments: their tasks, the order of the training rows, and the model that learns."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from das_lm.classic.images import DIGITS, Images, LabelledImages, load_images, spread
from das_lm.classic.models import MLP
from das_lm.data.blocks import TrainingRows
from das_lm.errors import UserError, did_you_mean
from das_lm.randomness import addressed_seed, permutation

SCENARIOS = ("task", "domain", "class")

#: Where images come from: see `load_images`.
Source = str | Path | Sequence[str | Path]


class Examples(Dataset):
    """
    The rows of one task as tensors.

    Args:
        columns: name -> tensor of shape [rows, …]. Models read `inputs`, float32 of shape [rows, features], `labels`
            of shape [rows] (int64 classes or float32 numbers), and `task`, int64 of shape [rows], where there are
            several heads.

    Raises:
        UserError: no columns, or columns of different lengths.
    """

    def __init__(self, columns: Mapping[str, torch.Tensor]):
        self.columns = dict(columns)
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) != 1:
            raise UserError(f"examples need columns of one length, not {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One row: name -> tensor of shape […]."""
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: Sequence[int] | torch.Tensor) -> dict[str, torch.Tensor]:
        """A batch in one go, name -> tensor of shape [batch, …]; a data loader asks for this, see [`collate`]."""
        indices = torch.as_tensor(indices)
        return {name: column[indices] for name, column in self.columns.items()}

    def select(self, indices: Sequence[int] | torch.Tensor) -> Examples:
        """The rows at these indices, in their order."""
        return Examples(self.__getitems__(indices))


class TrainingExamples(TrainingRows):
    """
    [`TrainingRows`] of one or several tasks, a batch in one go. To the columns of the tasks comes `example_id`, an
    int64 that is the row's own on every machine.

    Args:
        domains: task -> its training rows; all with the same columns.
        seed: of the order.
        schedule: see [`TrainingRows`].

    Raises:
        UserError: no tasks, tasks with different columns, or an unknown schedule.
    """

    def __init__(self, domains: Mapping[str, Examples], seed: int, schedule: str = "sequential"):
        super().__init__(domains, seed, schedule)
        layouts = {tuple((k, c.dtype, c.shape[1:]) for k, c in rows.columns.items()) for rows in self.domains.values()}
        if len(layouts) != 1:
            raise UserError(f"tasks that are learned together need the same columns: {', '.join(self.domains)}")
        parts = [
            {**rows.columns, "example_id": (addressed_seed(name) >> 2) + torch.arange(len(rows))}  # fits int64
            for name, rows in self.domains.items()
        ]
        # One task's rows are not copied.
        self._rows = Examples(
            parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        )

    def row(self, rows: Any, domain: Any, index: int, epoch: int) -> dict[str, torch.Tensor]:
        """One row, with its `example_id`."""
        return {**rows[index], "example_id": torch.tensor((addressed_seed(domain) >> 2) + index)}

    def __getitems__(self, positions: Sequence[int] | torch.Tensor) -> dict[str, torch.Tensor]:
        """A batch in one go; see [`Examples.__getitems__`]."""
        epoch, positions = self._epoch.item(), np.asarray(positions)
        batch = self._rows.__getitems__(torch.from_numpy(self._ordered(epoch)[positions]))
        replayed = self._replayed(len(self), epoch)
        if replayed is None:
            return batch
        numbers, rows = (part[positions] for part in replayed)
        batch["replayed_from"] = torch.from_numpy(numbers)
        for place in numbers.nonzero()[0].tolist():
            row = self._recalled(int(numbers[place]), int(rows[place]), epoch, int(positions[place]))
            for name, value in row.items():
                batch[name][place] = value
        return batch


# ---- experiments ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """
    One thing to learn, in three disjoint parts: `train` is trained on, what is searched for is chosen on
    `development`, and `test` is reported.
    """

    name: str
    train: Examples
    development: Examples
    test: Examples


@dataclass(frozen=True)
class Experiment:
    """
    Tasks that a small model learns one after the other.

    Attributes:
        name: the experiment's name in [`EXPERIMENTS`].
        tasks: in the order in which they are learned.
        build_model: seed -> a new model; the parameters are a function of the seed.
        measure: what a task is scored by: `"accuracy"`, or `"r2"`, the coefficient of determination.
        scenario: `"task"` (a head per task), `"domain"` (one head, the same labels) or `"class"` (one growing label
            set), as in van de Ven & Tolias, arXiv 1904.07734.
        epochs: passes over each task.
        batch_size: rows per step.
        description: one line for people.
    """

    name: str
    tasks: tuple[Task, ...]
    build_model: Callable[[int], nn.Module]
    measure: Literal["accuracy", "r2"]
    scenario: Literal["task", "domain", "class"]
    epochs: int
    batch_size: int
    description: str


def build_experiment(name: str, **parameters: Any) -> Experiment:
    """
    Build one of [`EXPERIMENTS`].

    Args:
        name: of the experiment.
        parameters: what its builder takes.

    Raises:
        UserError: no such experiment, a parameter that it does not take, or a wrong value of one.
    """
    if name not in EXPERIMENTS:
        raise UserError(f"there is no experiment '{name}'.{did_you_mean(name, EXPERIMENTS)}")
    known = inspect.signature(EXPERIMENTS[name]).parameters
    for key in parameters:
        if key not in known:
            raise UserError(f"experiment '{name}': unknown parameter '{key}'.{did_you_mean(key, known)}")
    return EXPERIMENTS[name](**parameters)


def permuted(seed: int = 0, data: Source = DIGITS, tasks: int = 5) -> Experiment:
    """
    Every task shows the images with their pixels permuted in one way of its own; the first shows them as they are. The
    labels stay (domain-incremental). The model for 28×28 pixels is 784–1024–512–256–10, for 8×8 64–256–128–64–10.

    Args:
        seed: of the permutations.
        data: where the images come from, see `load_images`.
        tasks: how many, 1 or more; more of them do not change the first.
    """
    if tasks < 1:
        raise UserError(f"experiment 'permuted': tasks: {tasks} must be 1 or more")
    images = load_images(data)
    pixels = images.train.pixels.shape[1]

    def permute(part: LabelledImages, number: int) -> Examples:
        if number == 0:
            return Examples({"inputs": part.pixels, "labels": part.labels})
        order = torch.from_numpy(permutation(pixels, seed, "pixels", number))
        return Examples({"inputs": part.pixels[:, order], "labels": part.labels})

    names = ["identity", *(f"permutation-{number}" for number in range(1, tasks))]
    outputs = 1 + max(int(part.labels.max()) for part in images)
    return Experiment(
        name="permuted",
        tasks=tuple(Task(name, *(permute(part, number) for part in images)) for number, name in enumerate(names)),
        build_model=functools.partial(
            MLP, [pixels, *((256, 128, 64) if _is_small(images) else (1024, 512, 256))], outputs
        ),
        measure="accuracy",
        scenario="domain",
        epochs=10,
        batch_size=32 if _is_small(images) else 128,
        description=f"{tasks} permutations of the pixels, the first the identity; {_describe(images)}",
    )


def split(
    seed: int = 0,
    data: Source = DIGITS,
    scenario: str = "class",
    groups: Sequence[Sequence[int]] = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9)),
) -> Experiment:
    """
    Every task shows some of the classes. The hidden layers are two of 400 as in van de Ven & Tolias (arXiv
    1904.07734), for 8×8 pixels two of 100.

    Args:
        seed: nothing is drawn here; all experiments take one.
        data: where the images come from, see `load_images`.
        scenario: `"task"`, a head per task, labels counted within the group; `"domain"`, one head and labels counted
            within the group; `"class"`, one head over the classes of all groups, in the order of the groups.
        groups: the classes of every task.
    """
    if scenario not in SCENARIOS:
        raise UserError(f"experiment 'split': scenario: there is no '{scenario}'.{did_you_mean(scenario, SCENARIOS)}")
    images = load_images(data)
    groups = [list(group) for group in groups]
    _check_groups(groups, scenario, images)
    sizes = [len(group) for group in groups]
    firsts = [sum(sizes[:number]) if scenario == "class" else 0 for number in range(len(groups))]

    def of_group(part: LabelledImages, number: int) -> Examples:
        """The images of one group of classes."""
        matches = part.labels[:, None] == torch.tensor(groups[number])  # [images, classes of the group]
        rows = matches.any(dim=1)
        labels = firsts[number] + matches[rows].int().argmax(dim=1)
        columns = {"inputs": part.pixels[rows], "labels": labels}
        if scenario == "task":
            columns["task"] = torch.full_like(labels, number)
        return Examples(columns)

    heads = {"task": sizes, "domain": sizes[0], "class": sum(sizes)}[scenario]
    names = ["-".join(map(str, group)) for group in groups]
    return Experiment(
        name="split",
        tasks=tuple(Task(name, *(of_group(part, number) for part in images)) for number, name in enumerate(names)),
        build_model=functools.partial(
            MLP, [images.train.pixels.shape[1], *([100] if _is_small(images) else [400]) * 2], heads
        ),
        measure="accuracy",
        scenario=scenario,
        epochs=20 if _is_small(images) else 10,
        batch_size=32 if _is_small(images) else 128,
        description=f"classes {', then '.join(names)}, {scenario}-incremental; {_describe(images)}",
    )


def odd_even(seed: int = 0, data: Source = DIGITS) -> Experiment:
    """
    First the even digits, then the odd ones, with label = digit // 2: five classes, one head (domain-incremental), one
    hidden layer of 128.

    Args:
        seed: nothing is drawn here; all experiments take one.
        data: where the images come from, see `load_images`.
    """
    images = load_images(data)
    _check_groups([list(range(10))], "class", images)

    def of_parity(part: LabelledImages, parity: int) -> Examples:
        rows = (part.labels % 2 == parity) & (part.labels < 10)
        return Examples({"inputs": part.pixels[rows], "labels": part.labels[rows] // 2})

    names = ("even", "odd")
    return Experiment(
        name="odd_even",
        tasks=tuple(Task(name, *(of_parity(part, parity) for part in images)) for parity, name in enumerate(names)),
        build_model=functools.partial(MLP, [images.train.pixels.shape[1], 128], 5),
        measure="accuracy",
        scenario="domain",
        epochs=20 if _is_small(images) else 6,
        batch_size=32 if _is_small(images) else 128,
        description=f"even digits, then odd ones, label = digit // 2; {_describe(images)}",
    )


def seasons(seed: int = 0) -> Experiment:
    """
    Fruit prices over the year: first those of summer, then those of autumn; day -> price, by an MLP 1–100–100–1.

    The price on day d is 0.005 d² + 0.1 sin(π d) + 1, where the days of a year are −26, −26 + 1/7, …, 26; summer is
    days 151 to 242 of these, autumn 243 to 333. A quarter of each season is the test split (scikit-learn's
    `train_test_split` with random state 42), and days are standardised by the mean and standard deviation over both
    seasons: all as in the Neuromatch Academy tutorial on continual learning (NeuroAI, W2D4, tutorial 2). A quarter of
    the remaining days, evenly spread, is the development split.

    Args:
        seed: nothing is drawn here; all experiments take one.
    """
    from sklearn.model_selection import train_test_split

    days = np.arange(-26, 26 + 1 / 7, 1 / 7)
    prices = 0.005 * days**2 + 0.1 * np.sin(np.pi * days) + 1
    inputs = (days - days[151:334].mean()) / days[151:334].std()

    def season(name: str, start: int, end: int) -> Task:
        """The days of one season, split."""
        train, test = train_test_split(np.arange(start, end), random_state=42)
        development = spread(days[train], len(train) // 4, "seasons", name, "development")
        parts = (
            Examples(
                {
                    "inputs": torch.from_numpy(inputs[rows, None].astype(np.float32)),
                    "labels": torch.from_numpy(prices[rows].astype(np.float32)),
                }
            )
            for rows in (train[~development], train[development], test)
        )
        return Task(name, *parts)

    return Experiment(
        name="seasons",
        tasks=(season("summer", 151, 243), season("autumn", 243, 334)),
        build_model=functools.partial(MLP, [1, 100, 100], 1),
        measure="r2",
        scenario="domain",
        epochs=200,
        batch_size=16,
        description="regression of prices on days: summer, then autumn",
    )


EXPERIMENTS: dict[str, Callable[..., Experiment]] = {
    "permuted": permuted,
    "split": split,
    "odd_even": odd_even,
    "seasons": seasons,
}


def _is_small(images: Images) -> bool:
    return images.train.pixels.shape[1] < 256


def _describe(images: Images) -> str:
    train, development, test = (f"{len(part.labels):,}" for part in images)
    pixels = images.train.pixels.shape[1]
    return f"from {train} training, {development} development and {test} test images of {pixels} pixels"


def _check_groups(groups: Sequence[Sequence[int]], scenario: str, images: Images) -> None:
    where = f"groups: {[list(group) for group in groups]}"
    classes = [label for group in groups for label in group]
    if not groups or not all(groups) or len(set(classes)) < len(classes):
        raise UserError(f"{where}: write one list of classes per task, none of them empty, and no class twice")
    if scenario != "class" and min(map(len, groups)) < 2:
        raise UserError(f"{where}: a task of one class is nothing to learn; only the scenario 'class' takes such")
    if scenario == "domain" and len({len(group) for group in groups}) > 1:
        raise UserError(f"{where}: the scenario 'domain' needs groups of one size, since the tasks share their labels")
    for part_name, part in images._asdict().items():
        missing = sorted(set(classes) - set(part.labels.tolist()))
        if missing:
            raise UserError(f"{where}: the data has no {part_name} images of class {missing[0]}")
