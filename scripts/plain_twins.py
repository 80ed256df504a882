"""Plain training beside the built-in recipes, for their reports: ``python scripts/plain_twins.py bio_then_cs …``.

Runs each recipe with ``--method naive`` and keeps its `forgetting.json` as ``recipes/plain/RECIPE/forgetting.json``,
without what reports of a twin do not show (curves, importance, keys of a cache). To be made anew whenever a recipe,
its text or a built-in model changes; `tests/report/test_plain.py` compares.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from das_lm.measure.results import Results
from das_lm.run.recipe_file import load_recipe
from das_lm.run.walk import continual_pretrain

NOT_SHOWN = ("history", "measured", "importance", "mean_importance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="*", default=["bio_then_cs", "bio_then_cs_gpt"])
    for name in parser.parse_args().recipes:
        directory = Path(__file__).resolve().parent.parent / "recipes" / "plain" / name
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory() as scratch:
            recipe = load_recipe(name, {"method": ["naive"], "output_dir": f"{scratch}/run"})
            results: Results = continual_pretrain(recipe, report=False)
        results.run["recipe"]["output_dir"] = "output"
        results.stages = [{key: one for key, one in row.items() if key not in NOT_SHOWN} for row in results.stages]
        results.save(directory)


if __name__ == "__main__":
    main()
