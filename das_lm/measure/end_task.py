"""End-tasks: how well a checkpoint can be fine-tuned to classify labelled text of a domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from das_lm.data.packing import longest_input
from das_lm.errors import UserError, as_user_error
from das_lm.measure.rows import read_rows
from das_lm.plain_words import describe_value
from das_lm.randomness import permutation

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

#: Split -> what it may be called.
SPLITS = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",)}

Examples = list[tuple[str, int]]  # text, and the index of its class
Rows = Iterable[tuple[str, dict[str, Any]]]  # where a row stands, and its cells


@dataclass(frozen=True)
class TaskData:
    """
    Labelled text.

    Args:
        name: of the directory or data set.
        classes: the labels of the training text, sorted.
        train: texts, each with the index of its class.
        dev: what the best epoch is chosen by.
        test: what is reported.
        skipped: why rows were left out -> how many.
    """

    name: str
    classes: list[str]
    train: Examples
    dev: Examples
    test: Examples
    skipped: dict[str, int]


@dataclass(frozen=True)
class EndTaskConfig:
    """
    How a classifier is fine-tuned. The defaults are those of the authors' code of DAS (2302.03241), which trains for
    5 to 15 epochs, depending on the task. They suit a model of RoBERTa's size; a tiny one needs larger steps.

    Args:
        seeds: of the new classification head, the order of the rows, and dropout; one run each.
        learning_rate: of AdamW; it falls to zero in a straight line.
        epochs: passes over the training text.
        batch_size: rows per step, over all processes.
        max_length: tokens per text; what is beyond them, or beyond what the model reads, is cut off.
        max_train: train on this many rows at most, the same for every seed and checkpoint.

    Raises:
        UserError: a number that cannot be.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    learning_rate: float = 3e-5
    epochs: int = 10
    batch_size: int = 16
    max_length: int = 164
    max_train: int | None = None

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds: {list(self.seeds)}; give one or more, each once")
        for name in ("learning_rate", "epochs", "batch_size", "max_length", "max_train"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name}: {value} must be above 0")


@dataclass(frozen=True)
class EndTask:
    """
    What fine-tuning gave.

    Args:
        task: the labelled text.
        seeds: one run each.
        epochs: of each run the one that was best on `dev`, from 1.
        predictions: classes of the test text, shape [seeds, test].
        trained: number of training rows.
    """

    task: TaskData
    seeds: list[int]
    epochs: list[int]
    predictions: np.ndarray
    trained: int

    def measures(self) -> dict[str, Any]:
        """What is reported: `accuracy`, `macro_f1` and `micro_f1` on the test text, one value per seed each, and how
        they came about."""
        targets = np.array([label for _, label in self.task.test])
        scores = [classification_scores(targets, row) for row in self.predictions]
        return {
            **{name: [score[name] for score in scores] for name in scores[0]},
            "seeds": self.seeds,
            "epochs": self.epochs,
            "train": self.trained,
            "dev": len(self.task.dev),
            "test": len(self.task.test),
            "classes": self.task.classes,
            "skipped": self.task.skipped,
        }


def classification_scores(targets: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """
    Scores of a classification, by scikit-learn.

    Args:
        targets: true classes, shape [rows].
        predictions: shape [rows].

    Returns:
        `accuracy`; `macro_f1`, the mean over the classes that occur in either; `micro_f1`, from the counts of all
        classes together, which with one label per row is the accuracy. DAS reports the latter for ChemProt, macro F1
        for its other end-tasks.
    """
    from sklearn.metrics import accuracy_score, f1_score

    return {
        "accuracy": float(accuracy_score(targets, predictions)),
        "macro_f1": float(f1_score(targets, predictions, average="macro")),
        "micro_f1": float(f1_score(targets, predictions, average="micro")),
    }


# ---- labelled text -------------------------------------------------------------------------------------------------


def load_task(source: str, text_column: str = "text", label_column: str = "label") -> TaskData:
    """
    Read labelled text. Left out and counted are rows without text or label and, of `dev` and `test`, those with a
    label that `train` does not have.

    Args:
        source: a directory with `train`, `dev` (or `validation`) and `test`, each `.jsonl` (one object per line) or
            `.csv` (with a header); or `"hub:ORGANISATION/NAME"`, a data set of the Hugging Face hub with these splits.
            Without `dev`, a tenth of `train` is split off, the same on every machine.
        text_column: column (of a JSON line: key) of the text.
        label_column: that of the label, a text or a whole number.

    Raises:
        UserError: a split or column is missing, a file is broken, there is one class, or nothing is left of a split.
    """
    splits = _hub_splits(source.removeprefix("hub:")) if source.startswith("hub:") else _file_splits(Path(source))
    skipped: Counter[str] = Counter()
    labelled = {
        split: list(_labelled(rows, split, text_column, label_column, skipped)) for split, rows in splits.items()
    }
    classes = sorted({label for _, label in labelled["train"]})
    if len(classes) == 1:
        raise UserError(f"end-task '{source}': train has one class, '{classes[0]}'; a classifier needs two or more")
    index = {label: number for number, label in enumerate(classes)}
    examples: dict[str, Examples] = {}
    for split, rows in labelled.items():
        examples[split] = [(text, index[label]) for text, label in rows if label in index]
        skipped.update(f"{split}: label '{label}' is not in train" for _, label in rows if label not in index)
    if "dev" not in examples:
        train = examples["train"]
        order = permutation(len(train), "dev").tolist()
        size = max(1, len(train) // 10)
        examples["dev"] = [train[row] for row in sorted(order[:size])]
        examples["train"] = [train[row] for row in sorted(order[size:])]
    for split, rows in examples.items():
        if not rows:
            reasons = ", ".join(
                f"{reason} ({count:,})" for reason, count in skipped.items() if reason.startswith(split)
            )
            raise UserError(f"end-task '{source}': {split} has no row to use. {reasons}")
    name = Path(source.removeprefix("hub:")).resolve().name
    return TaskData(name, classes, examples["train"], examples["dev"], examples["test"], dict(skipped))


def _file_splits(directory: Path) -> dict[str, Rows]:
    if not directory.is_dir():
        raise UserError(
            f"end-task '{directory}' is no directory; give one with train, dev and test as .jsonl or .csv, or "
            "hub:ORGANISATION/NAME"
        )
    files: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix in (".jsonl", ".csv") and files.setdefault(path.stem, path) != path:
            raise UserError(f"end-task '{directory}': both {files[path.stem].name} and {path.name} are there")
    return _splits(f"'{directory}'", {split: read_rows(path) for split, path in files.items()})


def _hub_splits(name: str) -> dict[str, Rows]:
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # whatever the library and the network raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"end-task 'hub:{name}' could not be loaded: {reason}. Check its name and the network; it must hold plain "
            "data (Parquet, JSON, CSV), no loading script"
        ) from error
    where = f"hub data set '{name}'"
    return _splits(
        f"'hub:{name}'", {split: ((f"{where}, {split}", row) for row in rows) for split, rows in splits.items()}
    )


def _splits(source: str, found: dict[str, Rows]) -> dict[str, Rows]:
    """`train`, `test` and, where it is there, `dev`."""
    splits = {split: found[name] for split, names in SPLITS.items() for name in names if name in found}
    missing = [split for split in ("train", "test") if split not in splits]
    if missing:
        raise UserError(
            f"end-task {source}: no {' and no '.join(missing)} (in a directory: .jsonl or .csv); found: "
            f"{', '.join(found) or 'nothing'}"
        )
    return splits


def _labelled(
    rows: Rows, split: str, text_column: str, label_column: str, skipped: Counter[str]
) -> Iterator[tuple[str, str]]:
    """Texts with their labels; what has none is counted in `skipped`."""
    for number, (where, row) in enumerate(rows):
        text, label = row.get(text_column), row.get(label_column)
        for key, column in (("text_column", text_column), ("label_column", label_column)):
            if number == 0 and column not in row:
                raise UserError(f"{where}: no column '{column}'; there is {', '.join(row)}. Set {key}")
        if not isinstance(text, str | None):
            raise UserError(f"{where}: column '{text_column}' holds {describe_value(text)}, not text; set text_column")
        if not isinstance(label, str | int | None):
            raise UserError(
                f"{where}: column '{label_column}' holds {describe_value(label)}, no text or whole number; set "
                "label_column"
            )
        label = "" if label is None else str(label).strip()
        if not text or not text.strip():
            skipped[f"{split}: no text"] += 1
        elif not label:
            skipped[f"{split}: no label"] += 1
        else:
            yield text, label


# ---- fine-tuning ---------------------------------------------------------------------------------------------------


def fine_tune(
    checkpoint: str | Path, task: TaskData, config: EndTaskConfig | None = None, progress: str | None = None
) -> EndTask:
    """
    Fine-tune a classifier from a checkpoint, all of its parameters, in fp32; once for every seed. Of each run the
    epoch with the best macro F1 on `dev` is the one whose predictions of `test` count. (DAS takes the last epoch.)

    Several processes (`torchrun`, `accelerate launch`) train together, each on its share of every batch. The same seed
    on the same CPU gives the same result; it is set for all of Python, NumPy and torch. Nothing is written but to a
    temporary directory.

    Args:
        checkpoint: directory or name of a model, with its tokenizer; whatever head it has is replaced by a new one.
        task: labelled text.
        config: how to train; `None`: the defaults.
        progress: caption of a progress bar over the epochs of all seeds, shown by the main process.

    Raises:
        UserError: the checkpoint cannot be loaded, has no tokenizer or lacks weights; or the batch size cannot be
            shared out evenly.
    """
    import torch
    import transformers
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    config = config or EndTaskConfig()
    state = PartialState(cpu=not torch.cuda.is_available())
    if config.batch_size % state.num_processes:
        raise UserError(
            f"batch_size: {config.batch_size} rows cannot be shared out to {state.num_processes} processes"
        )
    train = task.train
    if config.max_train is not None:
        train = [train[row] for row in sorted(permutation(len(train), "max_train")[: config.max_train].tolist())]
    with _quiet():
        tokenizer = _load_tokenizer(checkpoint)
        length = min(config.max_length, longest_input(_load_classifier(checkpoint, task, tokenizer), tokenizer))
        rows = {
            split: [
                {**tokenizer(text, truncation=True, max_length=length), "labels": label} for text, label in examples
            ]
            for split, examples in (("train", train), ("dev", task.dev), ("test", task.test))
        }
        predictions, epochs = [], []
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            transient=True,
            disable=progress is None or not state.is_main_process,
        ) as bar:
            done = bar.add_task(progress or "", total=len(config.seeds) * config.epochs)

            class Advance(transformers.TrainerCallback):
                def on_epoch_end(self, *args, **kwargs):
                    bar.advance(done)

            for seed in config.seeds:
                with TemporaryDirectory() as directory:
                    (directory,) = broadcast_object_list([directory])  # the main process's, for all
                    transformers.set_seed(seed)  # of the new head
                    trainer = transformers.Trainer(
                        model=_load_classifier(checkpoint, task, tokenizer),
                        args=_training_arguments(config, seed, state.num_processes, directory),
                        data_collator=transformers.DataCollatorWithPadding(tokenizer),
                        train_dataset=rows["train"],
                        eval_dataset=rows["dev"],
                        compute_metrics=_scores_of_output,
                        callbacks=[Advance],
                    )
                    trainer.remove_callback(transformers.PrinterCallback)
                    trainer.train()
                    predictions.append(trainer.predict(rows["test"]).predictions.argmax(-1))
                    state.wait_for_everyone()
                steps_per_epoch = trainer.state.max_steps // config.epochs
                epochs.append(trainer.state.best_global_step // steps_per_epoch)
    return EndTask(task, list(config.seeds), epochs, np.stack(predictions), len(train))


def _scores_of_output(output: EvalPrediction) -> dict[str, float]:
    return classification_scores(output.label_ids, output.predictions.argmax(-1))


def _training_arguments(config: EndTaskConfig, seed: int, processes: int, directory: str) -> TrainingArguments:
    import torch
    import transformers

    args = transformers.TrainingArguments(
        output_dir=directory,
        learning_rate=config.learning_rate,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size // processes,
        per_device_eval_batch_size=64,
        weight_decay=0.01,
        seed=seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_only_model=True,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="macro_f1",
        logging_strategy="no",
        report_to="none",
        log_level="error",
        log_level_replica="error",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
    if args.n_gpu > 1:
        raise UserError(
            f"one process sees {args.n_gpu} GPUs: start it with `accelerate launch`, or show it one GPU with "
            "CUDA_VISIBLE_DEVICES=0"
        )
    return args


def _load_tokenizer(checkpoint: str | Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with as_user_error(f"no tokenizer can be loaded from '{checkpoint}'"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a directory without one
        raise UserError(f"no tokenizer is saved beside the model in '{checkpoint}'")
    if tokenizer.pad_token is None:  # of causal models
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer of '{checkpoint}' has no token for padding, and none that ends a text")
    return tokenizer


def _load_classifier(checkpoint: str | Path, task: TaskData, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model with a new head for classes, drawn from torch's generator; a causal model's reads the last token."""
    import torch
    from transformers import AutoModelForSequenceClassification

    with as_user_error(f"'{checkpoint}' cannot be loaded as a classifier"):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            checkpoint, num_labels=len(task.classes), dtype=torch.float32, output_loading_info=True
        )
    # BERT's pooler is a part of the head: a masked language model has none.
    missing = [
        name
        for name in sorted(info["missing_keys"])
        if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name
    ]
    if missing:
        raise UserError(
            f"the checkpoint '{checkpoint}' lacks weights, which would be random: {', '.join(missing[:3])}"
        )
    model.config.pad_token_id = tokenizer.pad_token_id  # by which a causal model finds the last token
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the reports and bars of transformers: that the head is new, of loading and saving weights."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
