"""``das-lm search-lambda``: the weight of a penalty."""

from __future__ import annotations

import dataclasses
import os

from das_lm.cli.classic import EPOCHS, PARAMETERS, experiment_parameters
from das_lm.cli.parsing import option, parse_with_training
from das_lm.cli.pretrain import RECIPE_OPTIONS
from das_lm.errors import UserError

OPTIONS = {
    "experiment": option("permuted, split, odd_even or seasons. This, or --recipe."),
    "recipe": option("Name of a recipe (see 'das-lm recipes') or path of a .yaml file."),
    "trust_remote_code": RECIPE_OPTIONS["trust_remote_code"],
    "method": option("A penalty (default: ewc)."),
    "low": option("Lower end of the first bracket, or two to draw it from (default: 0).", list[float]),
    "high": option("Upper end of the first bracket, or two to draw it from (default: 100).", list[float]),
    "log": option("Search on a logarithmic scale.", bool),
    "num_steps": option("Values from the lower to the upper end of a bracket (default: 5).", int),
    "threshold": option(
        "A trial ends once its bracket is narrower (default: a twentieth of the first); with --log, the ratio of its "
        "ends (default: 1.5).",
        float,
    ),
    "max_evaluations": option("Values that a trial may measure (default: 30).", int),
    "trials": option("Trials that choose λ (default: 5).", int),
    "confirm": option("Further trials that test the choice; 0 for no test (default: 10).", int),
    "sampler": option("bracket (default), or optuna:tpe, optuna:random, optuna:gp, optuna:qmc."),
    **EPOCHS,
    **PARAMETERS,
    "output_dir": option("Directory of the results (default: output/search/NAME-METHOD)."),
    "resume": option("Go on with the search in output_dir; it may get more trials.", bool),
    "overwrite_output_dir": option("Delete what an earlier search left in output_dir.", bool),
}


def search_lambda(arguments: list[str]) -> None:
    """Search for the weight of a penalty, and say whether the best one stands out of the noise."""
    options, training = parse_with_training(
        "search-lambda",
        "search",
        OPTIONS,
        arguments,
        usage="(--experiment NAME | --recipe NAME_OR_PATH) [OPTION …]",
        description="Search for λ, the penalty_weight of a method, in several trials, and test what they choose in "
        "others. Training options given here go to all runs; --seed is the seed of the search.",
    )
    from das_lm.classic import search as searching

    if ("experiment" in options) == ("recipe" in options):
        raise UserError("give one of --experiment and --recipe: what is it that learns?")
    fields = [field.name for field in dataclasses.fields(searching.Search)]
    settings = {name: given.pop(name) for given in (options, training) for name in fields if name in given}
    for name in ("low", "high"):
        if len(settings.get(name, [])) == 1:
            (settings[name],) = settings[name]
    search = searching.Search(**settings)
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
