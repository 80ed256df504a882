"""``das-lm evaluate``."""

from __future__ import annotations

import dataclasses

from das_lm.cli.parsing import pairs, parse_training
from das_lm.errors import UserError


@dataclasses.dataclass
class EvaluateOptions:
    """Options of ``das-lm evaluate`` that are no training arguments."""

    _argument_group_name = "evaluation"

    run: str | None = dataclasses.field(
        default=None,
        metadata={
            "aliases": ["--run_dir"],
            "help": "Output directory of das-lm pretrain. (--run_dir where torchrun takes --run for an option of its "
            "own.)",
        },
    )
    checkpoint: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "action": "extend",
            "metavar": "NAME=PATH",
            "help": "Instead of --run: checkpoints in the order in which they were trained, the base model first. "
            "What has the name of a domain has learned it.",
        },
    )
    domain: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "action": "extend",
            "metavar": "NAME[=DATA]",
            "help": "Held-out text; with --run, beside that of the run. DATA is a path or glob, several with commas, "
            "or hub:ORGANISATION/NAME; without it, the built-in domain.",
        },
    )
    cloze: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "action": "extend",
            "metavar": "NAME[=FILE]",
            "help": "Cloze questions: JSON lines with 'text', in which ___ is the blank, 'answer', and perhaps "
            "'choices'; without a file, those about the built-in domain.",
        },
    )
    end_task: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "action": "extend",
            "metavar": "NAME=DATA",
            "help": "Fine-tune a classifier from every checkpoint: a directory with train, dev and test as .jsonl or "
            ".csv with 'text' and 'label', or hub:ORGANISATION/NAME. A NAME such as bio or bio.chemprot belongs to "
            "the domain bio.",
        },
    )
    end_task_seeds: list[int] | None = dataclasses.field(
        default=None, metadata={"help": "One fine-tuning each (default: 0 1 2 3 4)."}
    )
    end_task_epochs: int = dataclasses.field(default=10, metadata={"help": "Passes over the labelled text."})
    end_task_learning_rate: float = dataclasses.field(default=3e-5, metadata={"help": "Of AdamW."})
    end_task_batch_size: int = dataclasses.field(default=16, metadata={"help": "Rows per step."})
    end_task_max_train: int | None = dataclasses.field(default=None, metadata={"help": "Use this many rows only."})
    pseudo_perplexity: int = dataclasses.field(
        default=0,
        metadata={"help": "Measure this many documents of every domain with one mask at a time, too (slow)."},
    )
    output_dir: str | None = dataclasses.field(
        default=None, metadata={"help": "Directory of the results (default: that of --run)."}
    )
    trust_remote_code: bool = dataclasses.field(
        default=False, metadata={"help": "Run the code that comes with a model of the hub."}
    )


def evaluate(arguments: list[str]) -> None:
    """Measure a run, or any checkpoints: held-out text, questions, end-tasks."""
    options = parse_training(
        EvaluateOptions,
        arguments,
        prog="das-lm evaluate",
        usage="%(prog)s (--run DIRECTORY | --checkpoint base=PATH --checkpoint NAME=PATH …) [OPTION …]",
        description="Measure what checkpoints know and what they lost. What was measured before is read.",
    )
    ours = {field.name for field in dataclasses.fields(EvaluateOptions)}
    training = {key: options.pop(key) for key in list(options) if key not in ours}
    run, checkpoints = options.get("run"), pairs("checkpoint", options.get("checkpoint", []))
    if (run is None) == (not checkpoints):
        raise UserError("give either --run DIRECTORY, or --checkpoint NAME=PATH, the base model first")
    if run is None and "output_dir" not in options:
        raise UserError("--output_dir is missing; checkpoints have no directory of their own for the results")
    from das_lm.measure.end_task import EndTaskConfig
    from das_lm.run.evaluate import Probes, evaluate_checkpoints, evaluate_run

    cloze = [spec if "=" in spec else f"{spec}=built-in:{spec}" for spec in options.get("cloze", [])]
    tuning = {key.removeprefix("end_task_"): value for key, value in options.items() if key.startswith("end_task_")}
    if "seeds" in tuning:
        tuning["seeds"] = tuple(tuning["seeds"])
    probes = Probes(
        pairs("cloze", cloze),
        pairs("end_task", options.get("end_task", [])),
        EndTaskConfig(**tuning),
        options.get("pseudo_perplexity", 0),
    )
    domains, output = options.get("domain", []), options.get("output_dir")
    trusts = options.get("trust_remote_code", False)
    if run is not None:
        evaluate_run(run, domains, probes, output, training, trusts)
    else:
        evaluate_checkpoints(checkpoints, domains, output, probes, training, trusts)
