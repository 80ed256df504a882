"""
The search for a penalty's weight λ, with the noise of training taken seriously.

A trial is one base model, one order of the data and one set of seeds, and λ alone differs between its runs: common
random numbers. It measures a grid of λ, keeps the best and its two neighbours as the new bracket, and repeats. Trials
differ more than λ does, so curves are compared within trials, and what the search found is then tested in trials that
had no part in the choice.
"""

from das_lm.classic.search.curve import LEVEL, Curve, compare, verdict
from das_lm.classic.search.directory import EVALUATIONS_NAME, PLOT_NAME, RESULT_NAME, SETTINGS_NAME
from das_lm.classic.search.objectives import (
    LearnAt,
    Objective,
    check_method,
    experiment_objective,
    integrated_loss,
    recipe_objective,
)
from das_lm.classic.search.report import plot
from das_lm.classic.search.search import search_lambda
from das_lm.classic.search.settings import SAMPLERS, Search
from das_lm.classic.search.trial import bracket_search, optuna_study

__all__ = [
    "Curve",
    "EVALUATIONS_NAME",
    "LEVEL",
    "Objective",
    "PLOT_NAME",
    "RESULT_NAME",
    "LearnAt",
    "SAMPLERS",
    "SETTINGS_NAME",
    "Search",
    "bracket_search",
    "check_method",
    "compare",
    "experiment_objective",
    "integrated_loss",
    "optuna_study",
    "plot",
    "recipe_objective",
    "search_lambda",
    "verdict",
]
