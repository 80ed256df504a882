"""``das-lm classic``: methods side by side with small models."""

from __future__ import annotations

from typing import Any

from das_lm.cli.parsing import option, parse_with_training, switch
from das_lm.errors import UserError

#: Parameters of an experiment, as `build_experiment` takes them.
PARAMETERS = {
    "data": option(
        "Images: 'digits' (default), a directory with IDX files, two IDX files (images and labels), or "
        "hub:ORGANISATION/NAME.",
        list[str],
    ),
    "scenario": option("Of split: class (default), task or domain."),
    "groups": option("Of split: the classes of every task.", list[str], metavar="CLASS,CLASS"),
    "tasks": option("Of permuted: how many (default: 5).", int),
}
EPOCHS = {"epochs": option("Passes over each task (default: the experiment's own).", int)}
OPTIONS = {
    "experiment": option("permuted, split, odd_even or seasons. Required."),
    "method": option("Methods, combinations as ewc+replay (default: all that apply).", list[str]),
    "seeds": option("Seeds of the reported runs (default: 0 1 2 3 4).", list[int]),
    **EPOCHS,
    "schedule": option("sequential (default), alternating or interleaved."),
    "search": option("Choose each method's main knob on development data (default).", bool),
    "no_search": switch("Take the default of each method's main knob.", action="store_false", dest="search"),
    "search_seeds": option("Seeds of the search, not those of the reported runs (default: 1000).", list[int]),
    "chosen_from": option("Instead of a search: take what another benchmark, in this directory, has chosen."),
    **PARAMETERS,
    "output_dir": option("Directory of the results (default: output/classic/EXPERIMENT)."),
    "workers": option("Processes, each of one thread (default: as many as there are cores).", int),
}


def classic(arguments: list[str]) -> None:
    """Compare methods with small models on classic tasks."""
    options, training = parse_with_training(
        "classic",
        "benchmark",
        OPTIONS,
        arguments,
        usage="--experiment NAME [OPTION …]",
        description="Compare methods with small models on classic tasks. Training options given here go to all runs "
        "and are not searched for; the same command again does what is missing.",
    )
    from das_lm.classic.benchmark import benchmark
    from das_lm.classic.tasks import EXPERIMENTS

    if "experiment" not in options:
        raise UserError(f"--experiment is missing; give one of {', '.join(EXPERIMENTS)}")
    parameters, methods = experiment_parameters(options), options.pop("method", None)
    benchmark(methods=methods, parameters=parameters, options=training, **options)


def experiment_parameters(options: dict[str, Any]) -> dict[str, Any]:
    """Take the parameters of an experiment out of the options."""
    parameters = {key: options.pop(key) for key in PARAMETERS if key in options}
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
