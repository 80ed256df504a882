"""The table of commands, the exit status, and what a process says of a mistake."""

from __future__ import annotations

import codecs
import signal
import sys
from collections.abc import Callable

from das_lm import __version__
from das_lm.cli.check_data import check_data
from das_lm.cli.classic import classic
from das_lm.cli.compare import compare
from das_lm.cli.evaluate import evaluate
from das_lm.cli.pretrain import pretrain
from das_lm.cli.recipes import recipes
from das_lm.cli.report import report
from das_lm.cli.search_lambda import search_lambda
from das_lm.cli.self_text import self_text
from das_lm.cli.sweep import sweep
from das_lm.cli.units import units
from das_lm.errors import UserError, did_you_mean, one_line, speaks
from das_lm.files import is_about_disk
from das_lm.signals import is_about_workers, readers_may_go
from das_lm.terminal import printable

DESCRIPTION = """\
Continual pre-training of language models without forgetting.

commands:
{commands}

'das-lm COMMAND --help' tells more; 'das-lm --version' says which this is.
"""


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "pretrain": pretrain,
    "evaluate": evaluate,
    "compare": compare,
    "report": report,
    "sweep": sweep,
    "self-text": self_text,
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
        The exit status: 0, 1 for what a check was to refuse, 2 for bad input (one message on stderr), 3 for a
        checkpoint that has lost more than it may, 130 for Ctrl-C, 143 for SIGTERM.
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
        elif argv[0] == "--version":
            print(f"das-lm {__version__}")
        elif argv[0] not in COMMANDS:
            raise UserError(f"there is no command '{argv[0]}'.{did_you_mean(argv[0], COMMANDS)}")
        else:
            return COMMANDS[argv[0]](argv[1:]) or 0
        return 0
    except UserError as error:
        message, status = f"error: {error}", error.status
        everywhere = getattr(error, "everywhere", False)
    except Exception as error:  # that of safetensors is no OSError
        if is_about_workers(error):
            where, what = "dataloader_num_workers", "a worker of the data loader was killed, perhaps for its memory"
            again = "write a smaller number"
        elif is_about_disk(error):
            where, what = getattr(error, "filename", None) or "the disk", getattr(error, "strerror", None)
            again = "free some space, or make it writable"
        else:
            raise
        message = f"error: {where}: {what or one_line(error)}; {again}, and run the command again"
        status = 2
    except KeyboardInterrupt as error:
        again = "the same command with --resume" if argv[0] in ("pretrain", "search-lambda") else "the same command"
        message = f"{str(error) or 'interrupted'}; {again} continues"
        status = 128 + getattr(error, "number", signal.SIGINT)
    if everywhere or speaks():
        print(printable(f"das-lm: {message}"), file=sys.stderr)
    return status
