"""The command line: ``das-lm COMMAND …``. Each command is one function that takes its arguments."""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import json
import os
import re
import signal
import sys
import typing
from collections.abc import Callable
from typing import Any, NoReturn

from das_lm.errors import UserError, did_you_mean, one_line, speaks
from das_lm.files import is_about_disk
from das_lm.signals import readers_may_go
from das_lm.terminal import printable

DESCRIPTION = """\
Continual pre-training of language models without forgetting.

commands:
{commands}

'das-lm COMMAND --help' tells more.
"""


@dataclasses.dataclass
class RecipeOptions:
    """What goes before a recipe and is no training argument; the defaults are the recipe's."""

    _argument_group_name = "recipe"

    recipe: str | None = dataclasses.field(
        default=None, metadata={"help": "Name of a recipe (see 'das-lm recipes') or path of a .yaml file. Required."}
    )
    model_name_or_path: str | None = dataclasses.field(
        default=None, metadata={"help": "'built-in', 'built-in-causal', a directory, or a model of the hub."}
    )
    domain: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "action": "extend",
            "metavar": "NAME[=DATA]",
            "help": "Learn these domains, in this order, instead of the recipe's. NAME is one of the recipe's or "
            "built in; DATA is a path or glob, several with commas, or hub:ORGANISATION/NAME.",
        },
    )
    measure: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "action": "extend",
            "metavar": "NAME[=DATA]",
            "help": "Measure this text too after every stage, without training on it.",
        },
    )
    text_column: str | None = dataclasses.field(
        default=None, metadata={"help": "Column of the text in DATA. The default is 'text'."}
    )
    schedule: str | None = dataclasses.field(
        default=None, metadata={"help": "sequential, alternating or interleaved."}
    )
    output_dir: str | None = dataclasses.field(
        default=None, metadata={"help": "Directory for checkpoints and results."}
    )
    attn_implementation: str | None = dataclasses.field(
        default=None, metadata={"help": "Attention of the model, such as sdpa or eager."}
    )
    peft: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Train LoRA adapters: the recipe's mapping as JSON, such as '{\"r\": 8}'."},
    )
    new_lm_head: int | None = dataclasses.field(
        default=None,
        metadata={
            "metavar": "STEPS",
            "help": "The model is an encoder without its LM head: begin with a new one, and train it alone for so "
            "many steps on the text of --measure.",
        },
    )
    trust_remote_code: bool = dataclasses.field(
        default=False, metadata={"help": "Run the code that comes with a model of the hub."}
    )


@dataclasses.dataclass
class PretrainOptions(RecipeOptions):
    """Options of ``das-lm pretrain`` that are no training arguments."""

    method: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "Continual-learning method, one or several."}
    )
    resume: bool = dataclasses.field(
        default=False, metadata={"help": "Continue the run in output_dir where it was interrupted."}
    )
    overwrite_output_dir: bool = dataclasses.field(
        default=False, metadata={"help": "Delete what an earlier run left in output_dir."}
    )
    print_recipe: bool = dataclasses.field(
        default=False, metadata={"help": "Print the recipe with all that is given here, and stop."}
    )


@dataclasses.dataclass
class SweepOptions(RecipeOptions):
    """Options of ``das-lm sweep`` that are no training arguments."""

    sweep: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "action": "extend",
            "metavar": "'METHOD: KEY=VALUE,VALUE'",
            "help": "Run a method (several: naive,das; together: das+replay) with every value of a training argument, "
            "and with every combination of several; repeatable. Required.",
        },
    )
    seeds: list[int] | None = dataclasses.field(
        default=None, metadata={"help": "Seeds of every configuration (default: 0 1 2)."}
    )
    keep_models: bool = dataclasses.field(
        default=False,
        metadata={"help": "Keep the checkpoints; without, a finished run keeps its results and its recipe."},
    )


@dataclasses.dataclass
class EvaluateOptions:
    """Options of ``das-lm evaluate`` that are no training arguments."""

    _argument_group_name = "evaluation"

    run: str | None = dataclasses.field(
        default=None,
        metadata={
            "aliases": ["--run_dir"],
            "help": "Output directory of das-lm pretrain. (--run_dir where torchrun takes --run for an option of its "
            "own.)",
        },
    )
    checkpoint: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "action": "extend",
            "metavar": "NAME=PATH",
            "help": "Instead of --run: checkpoints in the order in which they were trained, the base model first. "
            "What has the name of a domain has learned it.",
        },
    )
    domain: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "action": "extend",
            "metavar": "NAME[=DATA]",
            "help": "Held-out text; with --run, beside that of the run. DATA is a path or glob, several with commas, "
            "or hub:ORGANISATION/NAME; without it, the built-in domain.",
        },
    )
    cloze: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "action": "extend",
            "metavar": "NAME[=FILE]",
            "help": "Cloze questions: JSON lines with 'text', in which ___ is the blank, 'answer', and perhaps "
            "'choices'; without a file, those about the built-in domain.",
        },
    )
    end_task: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "action": "extend",
            "metavar": "NAME=DATA",
            "help": "Fine-tune a classifier from every checkpoint: a directory with train, dev and test as .jsonl or "
            ".csv with 'text' and 'label', or hub:ORGANISATION/NAME. A NAME such as bio or bio.chemprot belongs to "
            "the domain bio.",
        },
    )
    end_task_seeds: list[int] | None = dataclasses.field(
        default=None, metadata={"help": "One fine-tuning each (default: 0 1 2 3 4)."}
    )
    end_task_epochs: int = dataclasses.field(default=10, metadata={"help": "Passes over the labelled text."})
    end_task_learning_rate: float = dataclasses.field(default=3e-5, metadata={"help": "Of AdamW."})
    end_task_batch_size: int = dataclasses.field(default=16, metadata={"help": "Rows per step."})
    end_task_max_train: int | None = dataclasses.field(default=None, metadata={"help": "Use this many rows only."})
    pseudo_perplexity: int = dataclasses.field(
        default=0,
        metadata={"help": "Measure this many documents of every domain with one mask at a time, too (slow)."},
    )
    output_dir: str | None = dataclasses.field(
        default=None, metadata={"help": "Directory of the results (default: that of --run)."}
    )
    trust_remote_code: bool = dataclasses.field(
        default=False, metadata={"help": "Run the code that comes with a model of the hub."}
    )


@dataclasses.dataclass
class ClassicOptions:
    """Options of ``das-lm classic`` that are no training arguments."""

    _argument_group_name = "benchmark"

    experiment: str | None = dataclasses.field(
        default=None, metadata={"help": "permuted, split, odd_even or seasons. Required."}
    )
    method: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "Methods, combinations as ewc+replay (default: all that apply)."}
    )
    seeds: list[int] | None = dataclasses.field(
        default=None, metadata={"help": "Seeds of the reported runs (default: 0 1 2 3 4)."}
    )
    epochs: int | None = dataclasses.field(
        default=None, metadata={"help": "Passes over each task (default: the experiment's own)."}
    )
    schedule: str | None = dataclasses.field(
        default=None, metadata={"help": "sequential (default), alternating or interleaved."}
    )
    search: bool = dataclasses.field(
        default=True,
        metadata={"help": "Choose each method's main knob on development data; --no-search takes its default."},
    )
    search_seeds: list[int] | None = dataclasses.field(
        default=None, metadata={"help": "Seeds of the search, not those of the reported runs (default: 1000)."}
    )
    chosen_from: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Instead of a search: take what another benchmark, in this directory, has chosen."},
    )
    data: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Images: 'digits' (default), a directory with IDX files, two IDX files (images and labels), or "
            "hub:ORGANISATION/NAME."
        },
    )
    scenario: str | None = dataclasses.field(
        default=None, metadata={"help": "Of split: class (default), task or domain."}
    )
    groups: list[str] | None = dataclasses.field(
        default=None, metadata={"metavar": "CLASS,CLASS", "help": "Of split: the classes of every task."}
    )
    tasks: int | None = dataclasses.field(default=None, metadata={"help": "Of permuted: how many (default: 5)."})
    output_dir: str | None = dataclasses.field(
        default=None, metadata={"help": "Directory of the results (default: output/classic/EXPERIMENT)."}
    )
    workers: int | None = dataclasses.field(
        default=None, metadata={"help": "Processes, each of one thread (default: as many as there are cores)."}
    )


def classic(arguments: list[str]) -> None:
    """Compare methods with small models on classic tasks."""
    options = _parse_training(
        ClassicOptions,
        arguments,
        prog="das-lm classic",
        usage="%(prog)s --experiment NAME [OPTION …]",
        description="Compare methods with small models on classic tasks. Training options given here go to all runs "
        "and are not searched for; the same command again does what is missing.",
    )
    from das_lm.classic.benchmark import benchmark
    from das_lm.classic.tasks import EXPERIMENTS

    if "experiment" not in options:
        raise UserError(f"--experiment is missing; give one of {', '.join(EXPERIMENTS)}")
    ours = {field.name for field in dataclasses.fields(ClassicOptions)}
    training = {key: options.pop(key) for key in list(options) if key not in ours}
    parameters = _experiment_parameters(options)
    methods = options.pop("method", None)
    benchmark(methods=methods, parameters=parameters, options=training, **options)


def _experiment_parameters(options: dict[str, Any]) -> dict[str, Any]:
    """Take the parameters of an experiment out of the options."""
    parameters = {key: options.pop(key) for key in ("data", "scenario", "groups", "tasks") if key in options}
    if len(parameters.get("data", [])) == 1:
        (parameters["data"],) = parameters["data"]
    if "groups" in parameters:
        try:
            parameters["groups"] = [[int(one) for one in group.split(",")] for group in parameters["groups"]]
        except ValueError:
            raise UserError(
                f"--groups {' '.join(parameters['groups'])}: write the classes of every task with commas, as in "
                "--groups 0,1 2,3"
            ) from None
    return parameters


@dataclasses.dataclass
class SearchOptions:
    """Options of ``das-lm search-lambda`` that are no training arguments."""

    _argument_group_name = "search"

    experiment: str | None = dataclasses.field(
        default=None, metadata={"help": "permuted, split, odd_even or seasons. This, or --recipe."}
    )
    recipe: str | None = dataclasses.field(
        default=None, metadata={"help": "Name of a recipe (see 'das-lm recipes') or path of a .yaml file."}
    )
    trust_remote_code: bool = dataclasses.field(
        default=False, metadata={"help": "Run the code that comes with the recipe's model of the hub."}
    )
    method: str | None = dataclasses.field(default=None, metadata={"help": "A penalty (default: ewc)."})
    low: list[float] | None = dataclasses.field(
        default=None, metadata={"help": "Lower end of the first bracket, or two to draw it from (default: 0)."}
    )
    high: list[float] | None = dataclasses.field(
        default=None, metadata={"help": "Upper end of the first bracket, or two to draw it from (default: 100)."}
    )
    log: bool = dataclasses.field(default=False, metadata={"help": "Search on a logarithmic scale."})
    num_steps: int | None = dataclasses.field(
        default=None, metadata={"help": "Values from the lower to the upper end of a bracket (default: 5)."}
    )
    threshold: float | None = dataclasses.field(
        default=None,
        metadata={
            "help": "A trial ends once its bracket is narrower (default: a twentieth of the first); with --log, the "
            "ratio of its ends (default: 1.5)."
        },
    )
    max_evaluations: int | None = dataclasses.field(
        default=None, metadata={"help": "Values that a trial may measure (default: 30)."}
    )
    trials: int | None = dataclasses.field(default=None, metadata={"help": "Trials that choose λ (default: 5)."})
    confirm: int | None = dataclasses.field(
        default=None, metadata={"help": "Further trials that test the choice; 0 for no test (default: 10)."}
    )
    sampler: str | None = dataclasses.field(
        default=None,
        metadata={"help": "bracket (default), or optuna:tpe, optuna:random, optuna:gp, optuna:qmc."},
    )
    epochs: int | None = dataclasses.field(
        default=None, metadata={"help": "Passes over each task of the experiment (default: its own)."}
    )
    data: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "Images of the experiment, as in 'das-lm classic'."}
    )
    scenario: str | None = dataclasses.field(
        default=None, metadata={"help": "Of split: class (default), task or domain."}
    )
    groups: list[str] | None = dataclasses.field(
        default=None, metadata={"metavar": "CLASS,CLASS", "help": "Of split: the classes of every task."}
    )
    tasks: int | None = dataclasses.field(default=None, metadata={"help": "Of permuted: how many (default: 5)."})
    output_dir: str | None = dataclasses.field(
        default=None, metadata={"help": "Directory of the results (default: output/search/NAME-METHOD)."}
    )
    resume: bool = dataclasses.field(
        default=False, metadata={"help": "Go on with the search in output_dir; it may get more trials."}
    )
    overwrite_output_dir: bool = dataclasses.field(
        default=False, metadata={"help": "Delete what an earlier search left in output_dir."}
    )


def search_lambda(arguments: list[str]) -> None:
    """Search for the weight of a penalty, and say whether the best one stands out of the noise."""
    options = _parse_training(
        SearchOptions,
        arguments,
        prog="das-lm search-lambda",
        usage="%(prog)s (--experiment NAME | --recipe NAME_OR_PATH) [OPTION …]",
        description="Search for λ, the penalty_weight of a method, in several trials, and test what they choose in "
        "others. Training options given here go to all runs; --seed is the seed of the search.",
    )
    from das_lm.classic import search as searching

    if ("experiment" in options) == ("recipe" in options):
        raise UserError("give one of --experiment and --recipe: what is it that learns?")
    ours = {field.name for field in dataclasses.fields(SearchOptions)}
    fields = [field.name for field in dataclasses.fields(searching.Search)]
    settings = {name: options.pop(name) for name in fields if name in options}
    for name in ("low", "high"):
        if len(settings.get(name, [])) == 1:
            (settings[name],) = settings[name]
    search = searching.Search(**settings)
    training = {key: options.pop(key) for key in list(options) if key not in ours}
    resume, overwrite = (options.pop(key, False) for key in ("resume", "overwrite_output_dir"))
    method, trusts = options.pop("method", "ewc"), options.pop("trust_remote_code", False)
    name, output = options.get("experiment") or options["recipe"], options.pop("output_dir", None)
    output = output or os.path.join("output", "search", f"{os.path.splitext(os.path.basename(name))[0]}-{method}")
    if "experiment" in options:
        if trusts:
            raise UserError("--trust_remote_code goes with --recipe; an experiment has models of its own")
        import torch

        torch.set_num_threads(1)  # models as small as these are slower with more
        about = {"parameters": _experiment_parameters(options), **options, "method": method, "options": training}
        objective = searching.experiment_objective(**about)
    else:
        from das_lm.run.recipe_file import load_recipe

        options.pop("recipe")
        if options:
            raise UserError(f"--{next(iter(options))} goes with --experiment; what a recipe learns stands in it")
        searching.check_method(method)
        recipe = load_recipe(name, {"method": method, "training": training, "trust_remote_code": trusts})
        about = {"recipe": recipe.to_yaml(), "method": method}
        objective = searching.recipe_objective(recipe, method, os.path.join(output, "runs"))
    searching.search_lambda(search, objective, output, about, resume=resume, overwrite=overwrite)


def pretrain(arguments: list[str]) -> None:
    """Learn the domains of a recipe one after the other."""
    options = _parse_training(
        PretrainOptions,
        arguments,
        prog="das-lm pretrain",
        usage="%(prog)s --recipe NAME_OR_PATH [OPTION …]",
        description="Learn the domains of a recipe one after the other. What is given here goes before the recipe.",
    )
    from das_lm.run.recipe_file import load_recipe

    resume, overwrite, print_only = (
        options.pop(key, False) for key in ("resume", "overwrite_output_dir", "print_recipe")
    )
    name, overrides = _recipe_and_overrides(PretrainOptions, options)
    recipe = load_recipe(name, overrides, check_device=not print_only)
    if print_only:
        print(recipe.to_yaml(), end="")
        return

    from das_lm.run.walk import continual_pretrain

    continual_pretrain(recipe, resume=resume, overwrite=overwrite)


def sweep(arguments: list[str]) -> None:
    """Run one recipe with several methods, values and seeds, and compare."""
    options = _parse_training(
        SweepOptions,
        arguments,
        prog="das-lm sweep",
        usage="%(prog)s --recipe NAME_OR_PATH --sweep 'METHOD: KEY=VALUE,VALUE' --output_dir DIRECTORY [OPTION …]",
        description="Run one recipe with several methods, values of their training arguments, and seeds, and compare "
        "them; as in --sweep 'naive: learning_rate=1e-4,3e-4' --sweep 'das: soft_mask_strength=0.5,1'. What is given "
        "here goes before the recipe. The same command again does what is missing.",
    )
    from das_lm.run.sweep import sweep

    entries, seeds, keep = options.pop("sweep", []), options.pop("seeds", [0, 1, 2]), options.pop("keep_models", False)
    name, overrides = _recipe_and_overrides(SweepOptions, options)
    if "output_dir" not in overrides:
        raise UserError("--output_dir is missing; a sweep has a directory of its own")
    sweep(name, entries, seeds, overrides.pop("output_dir"), overrides, keep_models=keep)


def _recipe_and_overrides(kind: type[RecipeOptions], options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name or path of the recipe, and what goes before it."""
    from das_lm.run.recipe_file import recipes

    if "recipe" not in options:
        raise UserError(f"--recipe is missing; give the path of a .yaml file or one of {', '.join(sorted(recipes()))}")
    ours = {field.name for field in dataclasses.fields(kind)}
    overrides = {key: value for key, value in options.items() if key in ours and key != "recipe"}
    overrides["training"] = {key: value for key, value in options.items() if key not in ours}
    return options["recipe"], overrides


def compare(arguments: list[str]) -> None:
    """Put runs side by side: what they gained, and what they forgot at equal gain."""

    class Parser(_OneLineErrors, argparse.ArgumentParser):
        pass

    parser = Parser(
        prog="das-lm compare",
        allow_abbrev=False,
        description="Put runs side by side, seeds averaged, and say what each method forgets at the gain that the "
        "reference has too.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, or one below which there are runs")
    parser.add_argument(
        "--reference", metavar="METHOD", help="what the others are compared with at equal gain (default: naive)"
    )
    parser.add_argument("--measure", default="loss", help="loss (default), accuracy, r2, cloze or end_task")
    parser.add_argument("--output_dir", help="write comparison.json and table.md there")
    options = parser.parse(arguments)
    from pathlib import Path

    from das_lm.report.compare import compare

    output = options.pop("output_dir")
    comparison = compare(**options)
    comparison.print()
    if output:
        comparison.save(Path(output))


def _parse_training(options: type, arguments: list[str], **description: str) -> dict[str, Any]:
    """
    The options that are given, and no others.

    Args:
        options: a dataclass of the command's own options; to them come all training arguments.
        arguments: the command line.
        description: `prog`, `usage` and `description` of the command.
    """
    from transformers import HfArgumentParser, TrainingArguments
    from transformers.hf_argparser import string_to_bool

    from das_lm.training.config import DASConfig

    class Parser(_OneLineErrors, HfArgumentParser):
        pass

    hints = typing.get_type_hints(DASConfig)
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    groups: dict[str, list] = {"DAS": [], "training": []}
    for field in dataclasses.fields(DASConfig):
        if field.name != "output_dir":
            copy = dataclasses.field(
                default=field.default, default_factory=field.default_factory, metadata=field.metadata
            )
            group = "training" if field.name in inherited else "DAS"
            groups[group].append((field.name, hints[field.name], copy))
    classes = [
        dataclasses.make_dataclass("Options", fields, namespace={"_argument_group_name": group})
        for group, fields in groups.items()
    ]
    parser = Parser(
        [options, *classes],
        **description,
        formatter_class=argparse.HelpFormatter,
        allow_abbrev=False,
    )
    for action in parser._actions:
        if action.dest in hints and action.dest != "output_dir":
            action.help = f"{action.help or ''} (default: {action.default})".strip()
            if action.type not in (str, int, float, string_to_bool) and action.type and not action.choices:
                action.type = json_value
        if action.type is string_to_bool:
            action.nargs, action.const = "?", True
        if action.dest == "peft":
            action.type = json_value
        action.default = argparse.SUPPRESS
    return parser.parse(arguments)


def evaluate(arguments: list[str]) -> None:
    """Measure a run, or any checkpoints: held-out text, questions, end-tasks."""
    options = _parse_training(
        EvaluateOptions,
        arguments,
        prog="das-lm evaluate",
        usage="%(prog)s (--run DIRECTORY | --checkpoint base=PATH --checkpoint NAME=PATH …) [OPTION …]",
        description="Measure what checkpoints know and what they lost. What was measured before is read.",
    )
    ours = {field.name for field in dataclasses.fields(EvaluateOptions)}
    training = {key: options.pop(key) for key in list(options) if key not in ours}
    run, checkpoints = options.get("run"), _pairs("checkpoint", options.get("checkpoint", []))
    if (run is None) == (not checkpoints):
        raise UserError("give either --run DIRECTORY, or --checkpoint NAME=PATH, the base model first")
    if run is None and "output_dir" not in options:
        raise UserError("--output_dir is missing; checkpoints have no directory of their own for the results")
    from das_lm.measure.end_task import EndTaskConfig
    from das_lm.run.evaluate import Probes, evaluate_checkpoints, evaluate_run

    cloze = [spec if "=" in spec else f"{spec}=built-in:{spec}" for spec in options.get("cloze", [])]
    tuning = {key.removeprefix("end_task_"): value for key, value in options.items() if key.startswith("end_task_")}
    if "seeds" in tuning:
        tuning["seeds"] = tuple(tuning["seeds"])
    probes = Probes(
        _pairs("cloze", cloze),
        _pairs("end_task", options.get("end_task", [])),
        EndTaskConfig(**tuning),
        options.get("pseudo_perplexity", 0),
    )
    domains, output = options.get("domain", []), options.get("output_dir")
    trusts = options.get("trust_remote_code", False)
    if run is not None:
        evaluate_run(run, domains, probes, output, training, trusts)
    else:
        evaluate_checkpoints(checkpoints, domains, output, probes, training, trusts)


def _pairs(option: str, specs: list[str]) -> dict[str, str]:
    """``NAME=VALUE`` of an option that can be given several times."""
    pairs: dict[str, str] = {}
    for spec in specs:
        name, _, value = spec.partition("=")
        if not name or not value:
            raise UserError(f"--{option} {spec}: write --{option} NAME=PATH")
        if name in pairs:
            raise UserError(f"--{option} {spec}: '{name}' is given twice")
        pairs[name] = value
    return pairs


def recipes(arguments: list[str]) -> None:
    """List the recipes that can be given by name."""

    class Parser(_OneLineErrors, argparse.ArgumentParser):
        pass

    Parser(prog="das-lm recipes", description=recipes.__doc__).parse(arguments)
    from das_lm.run.recipe_file import describe_recipes

    for name, description in describe_recipes().items():
        print(f"{name:24} {description}")


def check_data(arguments: list[str]) -> int:
    """Look for measured text that is trained on, and for training text that repeats itself."""

    class Parser(_OneLineErrors, argparse.ArgumentParser):
        pass

    parser = Parser(prog="das-lm check-data", description=check_data.__doc__, allow_abbrev=False)
    parser.add_argument("recipe", metavar="RECIPE", help="Name of a recipe or path of a .yaml file.")
    for option in dataclasses.fields(RecipeOptions):
        if option.name in ("domain", "measure"):
            parser.add_argument(f"--{option.name}", nargs="+", **option.metadata)
        elif option.name == "text_column":
            parser.add_argument("--text_column", **option.metadata)
    parser.add_argument(
        "--end_task",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="Look for the test text of end-tasks too: a file with a column 'text', or a directory with test.jsonl.",
    )
    parser.add_argument("--n", type=int, default=13, help="Words in a row that count as shared (default: 13).")
    parser.add_argument("--output", metavar="FILE.json", help="Write all that was found to this file.")
    parser.add_argument("--strict", action="store_true", help="Exit with status 1 if measured text is trained on.")
    options = parser.parse(arguments)
    for spec in options["end_task"]:
        if not all(spec.partition("=")):
            raise UserError(f"--end_task {spec}: write NAME=PATH")

    from rich.markup import escape

    from das_lm.files import write_json
    from das_lm.measure.leakage import check
    from das_lm.run.recipe_file import load_recipe
    from das_lm.terminal import Console

    given = {key: options[key] for key in ("domain", "measure", "text_column") if options[key]}
    recipe = load_recipe(options["recipe"], {**given, "trust_remote_code": False}, check_device=False)
    leakage = check(recipe, options["n"], dict(spec.split("=", 1) for spec in options["end_task"]))
    console = Console(highlight=False)
    console.print(*leakage.tables(), sep="\n")
    warnings = [warning for _, warning in leakage.warnings()]
    for warning in warnings:
        console.print("[yellow]warning:[/yellow]", escape(warning), soft_wrap=True)
    if not warnings:
        console.print(f"No measured document has half or more of its {leakage.n}-grams in training text.")
    if options["output"]:
        write_json(options["output"], leakage.to_json())
    return 1 if options["strict"] and warnings else 0


class _OneLineErrors(argparse.ArgumentParser):
    """Raises `UserError` with one line instead of printing the usage and leaving."""

    def parse(self, arguments: list[str]) -> dict[str, Any]:
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            word = unknown[0].partition("=")[0]
            secret = next((one.partition("=")[0] for one in arguments if re.match(r"--\w*token\b", one)), None)
            if secret and not re.fullmatch(r"--\w+", word):  # it may be the secret
                raise UserError(f"a word belongs to no option; write {secret} TOKEN, one word each, and no more")
            if not word.startswith("-"):
                raise UserError(f"unexpected argument '{word}'; see {self.prog} --help")
            near = did_you_mean(word, self._option_string_actions)
            raise UserError(f"unknown option '{word}'.{near} See {self.prog} --help")
        options = vars(namespace)
        if options.get("output_dir"):
            options["output_dir"] = os.path.expanduser(options["output_dir"])
        return options

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def json_value(text: str) -> Any:
    """An option whose type is neither text, number nor switch is written as JSON."""
    return json.loads(text)


def report(arguments: list[str]) -> None:
    """Write what runs learned and lost as one HTML file, with its figures beside it."""

    class Parser(_OneLineErrors, argparse.ArgumentParser):
        pass

    parser = Parser(prog="das-lm report", description=report.__doc__, allow_abbrev=False)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="Directory of a run or of a classic benchmark, or one with such below it; several runs are compared.",
    )
    parser.add_argument(
        "--output_dir", help="Directory of report.html and figures/ (default: that of the run, of several 'report')."
    )
    parser.add_argument("--title", help="Title of the page.")
    options = parser.parse(arguments)
    from das_lm.report.page import write_report

    print(printable(f"Report: {write_report(options['runs'], options['output_dir'], options['title'])}"))


def units(arguments: list[str]) -> None:
    """Show which heads and neurons a model has, and check them; propose an entry for an unknown model."""

    class Parser(_OneLineErrors, argparse.ArgumentParser):
        pass

    parser = Parser(
        prog="das-lm units",
        allow_abbrev=False,
        description="Show which heads and neurons a model has and which parameter slices belong to each, and check it "
        "on a few layers with random weights. For a model type that is not in the table, propose an entry. Reads the "
        "config alone.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="A model type such as llama, a directory with config.json, or a model of the hub.",
    )
    parser.add_argument(
        "--entry", metavar="FILE.yaml", help="An entry of your own: the value of a recipe's key 'units', or a recipe."
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="Run the code that comes with the model.")
    options = parser.parse(arguments)
    from das_lm.run.inspection import inspect, load_entry
    from das_lm.terminal import Console

    entry = load_entry(options["entry"]) if options["entry"] else None
    inspection = inspect(options["model"], entry, options["trust_remote_code"])
    inspection.print(Console(highlight=False))
    if not inspection.holds:
        raise UserError("the contract does not hold; DAS would mask or gate something else than these units")


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "pretrain": pretrain,
    "evaluate": evaluate,
    "compare": compare,
    "report": report,
    "sweep": sweep,
    "check-data": check_data,
    "units": units,
    "classic": classic,
    "search-lambda": search_lambda,
    "recipes": recipes,
}


@readers_may_go()
def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The command and its arguments; those of the process by default.

    Returns:
        The exit status: 0, 1 for what a check was to refuse, 2 for bad input (one message on stderr), 130 for
        Ctrl-C, 143 for SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    if codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name != "utf-8":
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a sign shows a question mark
    everywhere = False
    try:
        for word in argv:
            if "\0" in word or word != word.encode("utf-8", "replace").decode("utf-8"):
                shown = "an argument" if any("token" in one for one in argv) else f"the argument {ascii(word)}"
                raise UserError(f"{shown} is not UTF-8 text; rename the file, or write it otherwise")
        if not argv or argv[0] in ("-h", "--help"):
            commands = "\n".join(f"  {name:14} {command.__doc__}" for name, command in COMMANDS.items())
            print(DESCRIPTION.format(commands=commands), end="")
        elif argv[0] not in COMMANDS:
            raise UserError(f"there is no command '{argv[0]}'.{did_you_mean(argv[0], COMMANDS)}")
        else:
            return COMMANDS[argv[0]](argv[1:]) or 0
        return 0
    except UserError as error:
        message, status = f"error: {error}", 2
        everywhere = getattr(error, "everywhere", False)
    except Exception as error:  # that of safetensors is no OSError
        if not is_about_disk(error):
            raise
        where, what = getattr(error, "filename", None) or "the disk", getattr(error, "strerror", None)
        again = "free some space, or make it writable, and run the command again"
        message = f"error: {where}: {what or one_line(error)}; {again}"
        status = 2
    except KeyboardInterrupt as error:
        again = "the same command with --resume" if argv[0] in ("pretrain", "search-lambda") else "the same command"
        message = f"{str(error) or 'interrupted'}; {again} continues"
        status = 128 + getattr(error, "number", signal.SIGINT)
    if everywhere or speaks():
        print(printable(f"das-lm: {message}"), file=sys.stderr)
    return status
