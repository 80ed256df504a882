"""``das-lm self-text``: text that a model writes, for `remember`."""

from __future__ import annotations

from das_lm.cli.parsing import option, parse_with_training
from das_lm.errors import UserError

OPTIONS = {
    "model": option(
        "'built-in', 'built-in-causal', a directory, or a model of the hub.", positional=True, metavar="MODEL"
    ),
    "rows": option("How many rows of max_length tokens. Required.", int),
    "output": option("The file, .safetensors. Required.", metavar="FILE"),
    "trust_remote_code": option("Run the code that comes with a model of the hub.", bool),
}
#: The training arguments that writing reads.
TRAINING = (
    *("max_length", "self_replay_sweeps", "seed", "bf16", "fp16", "tf32", "use_cpu", "disable_tqdm"),
    *("fsdp", "fsdp_config", "ddp_backend", "ddp_timeout", "log_level"),
)


def self_text(arguments: list[str]) -> None:
    """Let a model write text that stands for what it knows, for remember."""
    options, training = parse_with_training(
        "self-text",
        "self-text",
        OPTIONS,
        arguments,
        usage="MODEL --rows N --output FILE [OPTION …]",
        description="Let a model write text at temperature 1 that stands for what it knows. A recipe remembers it "
        "with 'remember: [{self: FILE}]'. Interrupted, the same command goes on.",
        epilog="Some training arguments go here too, such as --max_length, --seed and --bf16; --help_all lists them.",
        only=TRAINING,
    )
    for name in ("rows", "output"):
        if name not in options:
            raise UserError(f"--{name} is missing; write das-lm self-text MODEL --rows 4096 --output self.safetensors")
    from das_lm.run.self_text import write_self_text

    trusts = options.get("trust_remote_code", False)
    write_self_text(options["model"], options["rows"], options["output"], training, trusts)
