"""``das-lm evaluate``: a run, or any checkpoints."""

from __future__ import annotations

from das_lm.cli.parsing import option, pairs, parse_with_training
from das_lm.errors import UserError

OPTIONS = {
    "run": option(
        "Output directory of das-lm pretrain. (--run_dir where torchrun takes --run for an option of its own.)",
        aliases=["--run_dir"],
    ),
    "checkpoint": option(
        "Instead of --run: checkpoints in the order in which they were trained, the base model first. What has the "
        "name of a domain has learned it.",
        list[str],
        action="extend",
        metavar="NAME=PATH",
    ),
    "domain": option(
        "Held-out text; with --run, beside that of the run. DATA is a path or glob, several with commas, or "
        "hub:ORGANISATION/NAME; without it, the built-in domain.",
        list[str],
        action="extend",
        metavar="NAME[=DATA]",
    ),
    "cloze": option(
        "Cloze questions: JSON lines with 'text', in which ___ is the blank, 'answer', and perhaps 'choices'; without "
        "a file, those about the built-in domain.",
        list[str],
        action="extend",
        metavar="NAME[=FILE]",
    ),
    "lm_eval": option(
        "Tasks or groups of lm-eval, with commas, such as hellaswag,arc_challenge,mmlu: causal models, every example "
        "paired between checkpoints. The built-in questions are das_lm_general, das_lm_bio and das_lm_cs. A NAME such "
        "as bio.pubmedqa belongs to the domain bio. (Extra: lm_eval.)",
        list[str],
        action="extend",
        metavar="[NAME=]TASK",
    ),
    "limit": option("Of lm-eval: the first so many examples of every task (default: all).", int),
    "num_fewshot": option("Of lm-eval: examples in every prompt (default: as the task says).", int),
    "include_path": option("Of lm-eval: directory with tasks of your own, as YAML."),
    "apply_chat_template": option("Of lm-eval: write prompts as the chat template does.", bool),
    "end_task": option(
        "Fine-tune a classifier from every checkpoint: a directory with train, dev and test as .jsonl or .csv with "
        "'text' and 'label', or hub:ORGANISATION/NAME. A NAME such as bio or bio.chemprot belongs to the domain bio.",
        list[str],
        action="extend",
        metavar="NAME=DATA",
    ),
    "end_task_seeds": option("One fine-tuning each (default: 0 1 2 3 4).", list[int]),
    "end_task_epochs": option("Passes over the labelled text (default: 10).", int),
    "end_task_learning_rate": option("Of AdamW (default: 3e-5).", float),
    "end_task_batch_size": option("Rows per step (default: 16).", int),
    "end_task_max_train": option("Use this many rows only.", int),
    "pseudo_perplexity": option(
        "Measure this many documents of every domain with one mask at a time, too (slow).", int
    ),
    "max_drift": option(
        "How much the loss on held-out text may rise from the base model, nats per token; where it has risen more, "
        "beyond its 95 %% interval, the status is 3.",
        list[str],
        action="extend",
        metavar="NAME=NATS",
    ),
    "output_dir": option("Directory of the results (default: that of --run)."),
    "trust_remote_code": option("Run the code that comes with a model of the hub.", bool),
}
#: The training arguments that measuring reads: what is masked and how it is cut, precision, devices and processes.
TRAINING = (
    *("max_length", "separate_documents", "mlm_probability", "seed", "data_seed", "per_device_eval_batch_size"),
    *("bf16", "fp16", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "full_determinism"),
    *("use_cpu", "accelerator_config", "fsdp", "fsdp_config", "ddp_backend", "ddp_timeout", "dataloader_num_workers"),
    *("dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_in_order"),
    *("dataloader_multiprocessing_context", "log_level", "log_level_replica"),
)


def evaluate(arguments: list[str]) -> None:
    """Measure a run, or any checkpoints: held-out text, questions, lm-eval, end-tasks."""
    options, training = parse_with_training(
        "evaluate",
        "evaluation",
        OPTIONS,
        arguments,
        usage="(--run DIRECTORY | --checkpoint base=PATH --checkpoint NAME=PATH …) [OPTION …]",
        description="Measure what checkpoints know and what they lost. What was measured before is read.",
        epilog="Some training arguments go here too, such as --max_length and --bf16; --help_all lists them.",
        only=TRAINING,
    )
    run, checkpoints = options.get("run"), pairs("checkpoint", options.get("checkpoint", []))
    if (run is None) == (not checkpoints):
        raise UserError("give either --run DIRECTORY, or --checkpoint NAME=PATH, the base model first")
    if run is None and "output_dir" not in options:
        raise UserError("--output_dir is missing; checkpoints have no directory of their own for the results")
    from das_lm.measure.end_task import EndTaskConfig
    from das_lm.measure.harness import HarnessConfig
    from das_lm.run.evaluate import Probes, evaluate_checkpoints, evaluate_run

    cloze = [spec if "=" in spec else f"{spec}=built-in:{spec}" for spec in options.get("cloze", [])]
    tasks = [task for spec in options.get("lm_eval", []) for task in spec.split(",") if task]
    asked = {
        key: options[key] for key in ("limit", "num_fewshot", "include_path", "apply_chat_template") if key in options
    }
    for key in asked.keys() & {"limit", "num_fewshot"}:
        if asked[key] < (key == "limit"):
            raise UserError(f"--{key} {asked[key]}: is a number of examples, {int(key == 'limit')} or more")
    if asked and not tasks:
        raise UserError(f"--{next(iter(asked))}: is of lm-eval; name its tasks with --lm_eval")
    tuning = {key.removeprefix("end_task_"): value for key, value in options.items() if key.startswith("end_task_")}
    if "seeds" in tuning:
        tuning["seeds"] = tuple(tuning["seeds"])
    probes = Probes(
        pairs("cloze", cloze),
        pairs("lm_eval", [task if "=" in task else f"{task}={task}" for task in tasks]),
        HarnessConfig(**asked),
        pairs("end_task", options.get("end_task", [])),
        EndTaskConfig(**tuning),
        options.get("pseudo_perplexity", 0),
        {name: _nats(name, text) for name, text in pairs("max_drift", options.get("max_drift", [])).items()},
    )
    domains, output = options.get("domain", []), options.get("output_dir")
    trusts = options.get("trust_remote_code", False)
    if run is not None:
        evaluate_run(run, domains, probes, output, training, trusts)
    else:
        evaluate_checkpoints(checkpoints, domains, output, probes, training, trusts)


def _nats(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not -float("inf") < value < float("inf"):
        raise UserError(f"--max_drift {name}={text}: '{text}' is no number; write nats per token, such as {name}=0.05")
    return value
