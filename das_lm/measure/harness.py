"""Tasks of the Language Model Evaluation Harness (`lm-eval`, Gao et al., 10.5281/zenodo.12608602): what practitioners
compare models by, with the answer to every example, so that the intervals are paired."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from das_lm.data.built_in import HARNESS_TASKS
from das_lm.errors import UserError, as_user_error, did_you_mean
from das_lm.terminal import is_watched

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The score of a task: the first of these that it has; of others, the first that is better when higher.
PREFERRED = ("acc_norm", "acc", "exact_match")


@dataclass(frozen=True)
class HarnessConfig:
    """
    How tasks of lm-eval are asked.

    Args:
        limit: examples of every task, its first; of a group, of each of its tasks. `None`: all.
        num_fewshot: examples in every prompt; `None`: as many as the task says.
        include_path: directory with tasks of one's own, as YAML.
        apply_chat_template: write every prompt as the tokenizer's chat template does.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    include_path: str | None = None
    apply_chat_template: bool = False


@dataclass(frozen=True)
class Answers:
    """
    What a model made of a task.

    Args:
        scores: of every example, from 0 to 1, in the same order for every model, shape [examples].
        metric: which score it is, such as `acc_norm`.
        metrics: the mean of every score that the task has per example.
        tasks: how many tasks the examples are from; more than one of a group.
        chance: what guessing gives where the examples are choices, else `None`.
    """

    scores: np.ndarray
    metric: str
    metrics: dict[str, float]
    tasks: int
    chance: float | None

    def measures(self) -> dict[str, Any]:
        """What is reported."""
        return {
            "score": float(self.scores.mean()),
            "metric": self.metric,
            "metrics": self.metrics,
            "examples": len(self.scores),
            "tasks": self.tasks,
            "chance": self.chance,
        }


class Harness:
    """
    Tasks of lm-eval, loaded once and asked of every model.

    Args:
        tasks: name for people -> name of a task or group of lm-eval.
        config: how they are asked.

    Raises:
        UserError: lm-eval is not installed, there is no such task, or its data cannot be had.
    """

    def __init__(self, tasks: Mapping[str, str], config: HarnessConfig):
        if find_spec("lm_eval") is None:
            raise UserError("lm_eval: needs the package lm-eval; pip install 'das-lm[lm_eval]'")
        from lm_eval import __version__ as version

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if config.include_path is not None and not Path(config.include_path).is_dir():
            raise UserError(f"include_path: there is no directory {config.include_path}")
        included = [path for path in (str(HARNESS_TASKS), config.include_path) if path]
        with as_user_error(f"include_path: tasks in {', '.join(included)} cannot be read"):
            self.manager = _manager(*included)
        self.tasks, self.config, self.version = dict(tasks), config, version
        self._identities: dict[str, str] = {}
        for task in dict.fromkeys(tasks.values()):
            if task not in self.manager.all_tasks:
                raise UserError(f"lm_eval: there is no task '{task}'.{did_you_mean(task, self.manager.all_tasks)}")
            with as_user_error(f"lm_eval: the task '{task}' cannot be loaded"):
                loaded = self.manager.load([task])["tasks"]
                asked = {
                    name: [one.dump_config(), list(one.eval_docs)[: config.limit]] for name, one in loaded.items()
                }
            how = [config.limit, config.num_fewshot, config.apply_chat_template, self.version]
            self._identities[task] = json.dumps([asked, how], default=_readable, sort_keys=True)

    def identity(self, name: str) -> str:
        """What decides a score beside the model: the examples, how they are asked, and the version of lm-eval."""
        return self._identities[self.tasks[name]]

    def ask(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Answers:
        """
        Ask a causal language model, dropout off.

        Args:
            name: of the task, for people.
            model: on its device. Several processes share the examples out, and all get all answers.
            tokenizer: its own.
            batch_size: rows per forward pass.

        Raises:
            UserError: the task has no score per example between 0 and 1, or lm-eval cannot ask it.
        """
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        task, was_training = self.tasks[name], model.training
        own = copy.deepcopy(tokenizer)  # it gets a padding token where it has none
        asked = HFLM(pretrained=model, tokenizer=own, backend="causal", batch_size=batch_size)
        accelerator = Accelerator(cpu=model.device.type == "cpu")
        if accelerator.num_processes > 1:  # it shares out only models that it has loaded itself
            asked.accelerator, asked._rank = accelerator, accelerator.process_index
            asked._world_size = accelerator.num_processes
        watched = contextlib.nullcontext() if is_watched() else contextlib.redirect_stderr(io.StringIO())
        with as_user_error(f"lm_eval: the task '{task}' cannot be asked"), watched:  # no bars in files
            loaded = self.manager.load([task])  # afresh: what is asked is kept in it
            for one in loaded["tasks"].values():
                if self.config.num_fewshot is not None and one.get_config("num_fewshot") != 0:
                    one.set_config(key="num_fewshot", value=self.config.num_fewshot)
                elif one.get_config("num_fewshot") is None:
                    one.set_config(key="num_fewshot", value=0)
                one.set_fewshot_seed(seed=1234)  # that of lm-eval
            found = evaluate(
                asked,
                loaded,
                limit=self.config.limit,
                bootstrap_iters=0,
                apply_chat_template=self.config.apply_chat_template,
                fewshot_as_multiturn=self.config.apply_chat_template,
            )
        model.train(was_training)
        (samples,) = broadcast_object_list([found["samples"] if found else None])
        worse = {key for one in loaded["tasks"].values() for key, up in one.higher_is_better().items() if up is False}
        return _answers(task, samples, worse)


@cache
def _manager(*included: str) -> TaskManager:
    """What tasks there are; it reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[*included])


def _answers(task: str, samples: Mapping[str, Sequence[Mapping[str, Any]]], worse: Collection[str] = ()) -> Answers:
    """From what lm-eval logs of every example of every task; of several filters, the first counts, and no score of
    `worse`, which are better when lower."""
    rows: list[Mapping[str, Any]] = []
    for name in sorted(samples):
        first = samples[name][0]["filter"]
        rows += sorted((one for one in samples[name] if one["filter"] == first), key=lambda one: one["doc_id"])
    declared = [metric for metric in rows[0]["metrics"] if metric not in worse]
    shared = [metric for metric in declared if all(_is_score(one.get(metric)) for one in rows)]
    if not shared:
        raise UserError(
            f"lm_eval: the task '{task}' has no score from 0 to 1 of every example, the higher the better "
            f"(it has {', '.join(rows[0]['metrics'])}); choose one with an accuracy or an exact match"
        )
    metric = next((one for one in PREFERRED if one in shared), shared[0])
    choices = np.array([len(one["arguments"]) for one in rows])
    chance = float((1 / choices).mean()) if metric.startswith("acc") and (choices > 1).all() else None
    means = {one: float(np.mean([row[one] for row in rows])) for one in shared}
    return Answers(np.array([float(row[metric]) for row in rows]), metric, means, len(samples), chance)


def _is_score(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.number, np.bool_)) and 0 <= value <= 1


def _readable(value: Any) -> str:
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else str(value)
