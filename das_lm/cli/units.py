"""``das-lm units``: the heads and neurons of a model."""

from __future__ import annotations

from das_lm.cli.parsing import option, parse, switch
from das_lm.errors import UserError

OPTIONS = {
    "model": option(
        "A model type such as llama, a directory with config.json, or a model of the hub.",
        positional=True,
        metavar="MODEL",
    ),
    "entry": option("An entry of your own: the value of a recipe's key 'units', or a recipe.", metavar="FILE.yaml"),
    "trust_remote_code": switch("Run the code that comes with the model."),
}


def units(arguments: list[str]) -> None:
    """Show which heads and neurons a model has, and check them; propose an entry for an unknown model."""
    options = parse(
        "units",
        OPTIONS,
        arguments,
        "Show which heads and neurons a model has and which parameter slices belong to each, and check it on a few "
        "layers with random weights. For a model type that is not in the table, propose an entry. Reads the config "
        "alone.",
    )
    from das_lm.run.inspection import inspect, load_entry
    from das_lm.terminal import Console

    entry = load_entry(options["entry"]) if options.get("entry") else None
    inspection = inspect(options["model"], entry, options.get("trust_remote_code", False))
    inspection.print(Console(highlight=False))
    if not inspection.holds:
        raise UserError("the contract does not hold; DAS would mask or gate something else than these units")
