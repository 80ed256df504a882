"""``das-lm classic``."""

from __future__ import annotations

import dataclasses
from typing import Any

from das_lm.cli.parsing import parse_training
from das_lm.errors import UserError


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
    options = parse_training(
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
    parameters = experiment_parameters(options)
    methods = options.pop("method", None)
    benchmark(methods=methods, parameters=parameters, options=training, **options)


def experiment_parameters(options: dict[str, Any]) -> dict[str, Any]:
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
