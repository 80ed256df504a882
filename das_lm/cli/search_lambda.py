"""``das-lm search-lambda``."""

from __future__ import annotations

import dataclasses
import os

from das_lm.cli.classic import experiment_parameters
from das_lm.cli.parsing import parse_training
from das_lm.errors import UserError


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
    options = parse_training(
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
        about = {"parameters": experiment_parameters(options), **options, "method": method, "options": training}
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
