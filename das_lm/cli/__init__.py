"""The command line: ``das-lm COMMAND …``. One file per command, each a function that takes its arguments."""

from das_lm.cli.main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
