"""A whole recipe: the recipe, the walk over its domains, the directory of a run, sweeps, evaluation."""
