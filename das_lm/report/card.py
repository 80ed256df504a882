"""The model card of a finished stage, and pushing the stage to the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from das_lm import __version__
from das_lm.data.built_in import MODELS
from das_lm.errors import UserError
from das_lm.files import write_text
from das_lm.measure.results import FIGURES, Results
from das_lm.methods import files_with_training_text
from das_lm.training.config import ContinualConfig
from das_lm.units.importance import FILE_NAME as IMPORTANCE_NAME

FILE_NAME = "README.md"
TEMPLATE = str(Path(__file__).with_name("templates") / "card.md")
#: What a push leaves out: what only a resumed run reads, and the training text that the memories of replay hold.
NOT_PUSHED = ("manifest.json", "trainer_state.json", *files_with_training_text())

#: Training arguments that do not change what is learned, or are about one machine.
_NOT_TOLD = ("save_", "logging_", "eval_", "dataloader_", "report_", "hub_", "push_", "disable_tqdm", "use_cpu")


def write_card(directory: Path, results: Results, repository: str | None = None) -> None:
    """
    Write `README.md` for the last stage of the results.

    Args:
        directory: its checkpoint; it stays as whole as it was, for its manifest does not speak of the card.
        results: the results so far.
        repository: name of the repository on the hub that it is pushed to.
    """
    write_text(directory / FILE_NAME, str(model_card(results, directory, repository)))


def model_card(results: Results, directory: Path, repository: str | None = None) -> ModelCard:
    """
    The card of the last stage: the domains, the method, the forgetting so far, how to load it, and what was not
    measured. Names that somebody chose are text in it, never markup, and no folders of this machine are told.

    Args:
        results: the results so far.
        directory: the checkpoint.
        repository: name of its repository on the hub.
    """
    recipe, stage = results.run["recipe"], results.stages[-1]
    number, count = len(results.stages) - 1, max(filter(None, results.domains.values()))
    learned = [domain["name"] for domain in recipe["domains"] if results.domains[domain["name"]] <= number]
    base = recipe["model_name_or_path"]
    start = _plain(base if _is_on_hub(base) else os.path.basename(os.path.normpath(base)))
    start = "das-lm's built-in model" if base in MODELS else start
    order = "one after the other" if recipe["schedule"] == "sequential" else recipe["schedule"]
    sources = [domain["data"] for domain in recipe["domains"] if domain["name"] in learned]
    task, kind, loader = (
        ("text-generation", "causal", "AutoModelForCausalLM")
        if results.causal
        else ("fill-mask", "masked", "AutoModelForMaskedLM")
    )
    place = json.dumps(repository or directory.name, ensure_ascii=False)
    is_adapter = recipe.get("peft", {}).get("adapters", "merge") != "merge"
    load, needed = f"{loader}.from_pretrained({place})", "`transformers`"
    if is_adapter:
        name = base if _is_on_hub(base) else os.path.basename(os.path.normpath(base))
        load = f"PeftModel.from_pretrained({loader}.from_pretrained({json.dumps(name, ensure_ascii=False)}), {place})"
        needed = f"`transformers`, `peft` and {start}"
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=task,
        tags=["das-lm", "continual-pretraining", "continual-learning", *recipe["method"]],
        base_model=base if _is_on_hub(base) else None,
        datasets=[source.removeprefix("hub:") for source in sources if _is_hub_data(source)] or None,
        model_name=(repository or directory.name).split("/")[-1],
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=domain,
                dataset_name=f"held-out text of {domain}",
                metric_type=measure,
                metric_name=name,
                metric_value=round(score[measure], 6),
            )
            for domain, score in stage["scores"].items()
            for measure, name in (("loss", f"loss, {results.unit}"), ("accuracy", "top-1 accuracy"))
        ],
    )
    return ModelCard.from_template(
        data,
        TEMPLATE,
        table=_table,
        start=start,
        learned=_plain(", ".join(learned)),
        learned_in_bold=_bold(learned),
        order=f" ({order})" if len(learned) > 1 else "",
        kind=kind,
        method="+".join(recipe["method"]),
        schedule=recipe["schedule"],
        number=number,
        count=count,
        is_adapter=is_adapter,
        loader=loader,
        load=load,
        place=place,
        needed=needed,
        importance_file=IMPORTANCE_NAME if (directory / IMPORTANCE_NAME).is_file() else "",
        domains=_domains(results),
        seen=[[_plain(cell) for cell in row] for row in results.tokens_seen()],
        new_head=_new_head(recipe),
        arguments=_arguments(recipe),
        unit=results.unit,
        titles=[_plain(_titled(*domain)) for domain in results.domains.items()],
        matrix=_matrix(results),
        words=_words(results),
        figures=_figures(results),
        limits=_limits(results),
        versions=", ".join(f"{name} {version}" for name, version in results.run["versions"].items()),
        device=_plain(results.run["device"]),
    )


def _new_head(recipe: dict[str, Any]) -> str:
    if "new_lm_head" not in recipe:
        return ""
    name = _plain(os.path.basename(os.path.normpath(recipe["model_name_or_path"])))
    return (
        f"{name} came without an LM head. It got a new one, tied to the embeddings and trained alone at first, for "
        f"{recipe['new_lm_head']:,} steps on {_bold([entry['name'] for entry in recipe['measure']])}; 'base' below is "
        "measured with it."
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown cells."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def _titled(domain: str, stage: int | None) -> str:
    return domain if stage else f"{domain} (never learned)"


def _domains(results: Results) -> list[list[str]]:
    recipe, rows = results.run["recipe"], []
    for entry in [*recipe["domains"], *recipe.get("measure", [])]:
        stage, documents = results.domains[entry["name"]], results.run["documents"][entry["name"]]
        when = (
            "never" if stage is None else f"stage {stage}{' (still to come)' if stage >= len(results.stages) else ''}"
        )
        held_out = results.stages[-1]["scores"][entry["name"]]["documents"]
        train = f"{documents:,}" if documents else "–"
        rows.append([_plain(entry["name"]), when, _source(entry["data"]), train, f"{held_out:,}"])
    return rows


def _matrix(results: Results) -> list[list[str]]:
    """A row per stage: the losses, with intervals and accuracies."""
    rows = []
    for index, stage in enumerate(results.stages):
        rows.append([_plain(stage["name"])])
        for domain, learned in results.domains.items():
            score, ends = stage["scores"][domain], stage.get("intervals", {}).get(domain, {}).get("loss")
            loss = f"**{score['loss']:.3f}**" if learned == index else f"{score['loss']:.3f}"
            interval = f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else ""
            rows[-1].append(f"{loss}{interval}, {score['accuracy']:.1%}")
    return rows


def _words(results: Results) -> list[str]:
    """What became of every domain, in a sentence each."""
    last, sentences = len(results.stages) - 1, []
    for name, when in results.domains.items():
        losses = [stage["scores"][name]["loss"] for stage in results.stages]
        if when is None:
            since, then, said = 0, "before training", "was never learned"
        elif when < last:
            since, then, said = when, f"when it was learned (stage {when})", "was learned earlier"
        elif when == last:
            since, then, said = last - 1, "before this stage", "was learned last"
        else:
            since, then, said = 0, "before training", "is not learned yet"
        change = losses[last] - losses[since]
        verdict = f"{abs(change):.3f} {'worse' if change > 0 else 'better'}"
        sentences.append(f"{_plain(name)} {said}: loss {losses[since]:.3f} {then}, {losses[last]:.3f} now, {verdict}.")
    return sentences


def _figures(results: Results) -> list[list[str]]:
    rows = []
    for name, value in results.summary()["loss"].items():
        if value is not None:
            style, ends = (".4f" if name == "average" else "+.4f"), results.intervals.get("loss", {}).get(name)
            interval = f" ({ends[0]:{style}} to {ends[1]:{style}})" if ends else ""
            rows.append([FIGURES[name], f"{value:{style}}{interval}"])
    return rows


def _limits(results: Results) -> list[str]:
    """What the numbers do not say."""
    others = {"cloze": "questions with blanks", "end_tasks": "end-tasks"}
    measured = [words for key, words in others.items() if key in results.stages[-1]]
    missing = [words for key, words in others.items() if key not in results.stages[-1]]
    seed = results.run["recipe"].get("training", {}).get("seed", 42)
    tokens = "tokens" if results.causal else "masked tokens"
    return [
        f"Measured on {tokens} of held-out documents{''.join(f', {words}' for words in measured)}; not measured: "
        f"{', '.join([*missing, 'bias', 'toxicity', 'facts in free text'])}. What the base model and the text hold of "
        "these, this model may hold too.",
        "A loss per token can be compared only between models with the same tokenizer, on the same text.",
        f"One run with seed {seed}: the intervals are about the choice of documents, not about another seed.",
        *(
            f"Warning about {_plain(about)}: {_plain(warning)}"
            for about, warnings in results.run.get("warnings", {}).items()
            for warning in warnings
        ),
    ]


def _arguments(recipe: dict[str, Any]) -> list[list[str]]:
    """Name and value of what the recipe sets, for all domains or for one."""
    given = [(f"peft.{key}", value, "") for key, value in recipe.get("peft", {}).items()]
    given += [(key, value, "") for key, value in recipe.get("training", {}).items()]
    for domain in recipe["domains"]:
        given += [(key, value, f" ({_plain(domain['name'])})") for key, value in domain.get("training", {}).items()]
    return [
        [f"`{key}`{where}", _plain(value)]
        for key, value, where in given
        if not key.startswith(_NOT_TOLD) and os.sep not in str(value)
    ]


def _source(data: Any) -> str:
    """Where a domain's text comes from; of files their names alone; of a mixture each part with its share."""
    if isinstance(data, list) and data and isinstance(data[0], dict):
        total = sum(part.get("weight", 1.0) for part in data)
        return ", ".join(f"{_source(part['path'])} {part.get('weight', 1.0) / total:.0%}" for part in data)
    if isinstance(data, str) and data.startswith("built-in"):
        return "built into das-lm"
    if _is_hub_data(data):
        return f"{_plain(data.removeprefix('hub:'))} (hub)"
    files = [os.path.basename(path) for path in ([data] if isinstance(data, str) else data)]
    return _plain(f"{', '.join(files[:3])}{' …' if len(files) > 3 else ''}")


def _is_hub_data(data: Any) -> bool:
    return isinstance(data, str) and data.startswith("hub:")


def _is_on_hub(model: str) -> bool:
    return model not in MODELS and not os.path.isdir(model) and bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model))


def _bold(names: list[str]) -> str:
    *start, last = [f"**{_plain(name)}**" for name in names]
    return f"{', '.join(start)} and {last}" if start else last


#: Characters that mean something in Markdown or HTML -> how they are written to mean nothing.
_ESCAPES = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {character: f"\\{character}" for character in "\\`*_[]|~#$:@"}
)


def _plain(value: Any) -> str:
    """Text of one line as Markdown that shows it."""
    return " ".join(str(value).split()).translate(_ESCAPES)


# ---- the hub --------------------------------------------------------------------------------------------------------


class HubRepository:
    """
    Where the walk pushes its finished stages, with the training arguments `push_to_hub`, `hub_model_id` (by default
    the name of the output directory), `hub_private_repo`, `hub_revision` and `hub_token` of the recipe.

    As in the Trainer, there is one repository, made before training. Every finished stage is one commit, such as
    `bio (1 of 2)`: the newest is the model, and the history its stages. Checkpoints on the way are not pushed,
    whatever `hub_strategy` says. Instead of `hub_token`, log in with `hf auth login` or set `HF_TOKEN`.

    Args:
        args: the training arguments.
        name: of the repository, if `hub_model_id` does not say.

    Raises:
        UserError: it cannot be made; with the hub's reason.
    """

    def __init__(self, args: ContinualConfig, name: str):
        self.args = args
        self._api = HfApi(library_name="das-lm", library_version=__version__)
        self.id = args.hub_model_id or name
        try:
            made = self._api.create_repo(self.id, token=args.hub_token, private=args.hub_private_repo, exist_ok=True)
        except Exception as error:  # whatever the library and the network raise
            raise UserError(
                f"push_to_hub: the repository '{self.id}' cannot be opened: {self._reason(error)}. Log in with "
                "`hf auth login` or set HF_TOKEN, name another repository as hub_model_id, or leave push_to_hub out"
            ) from None
        self.id = made.repo_id

    def push(self, directory: Path, message: str) -> None:
        """
        Push a checkpoint as one commit. What has not changed makes no commit.

        Args:
            directory: the checkpoint; all of it but [`NOT_PUSHED`].
            message: of the commit.

        Raises:
            UserError: it cannot be pushed; with the hub's reason.
        """
        try:
            self._api.upload_folder(
                repo_id=self.id,
                folder_path=directory,
                commit_message=message,
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                ignore_patterns=list(NOT_PUSHED),
            )
        except Exception as error:  # whatever the library and the network raise
            raise UserError(
                f"push_to_hub: {directory} is saved, but cannot be pushed to '{self.id}': {self._reason(error)}. The "
                "same command with --resume tries again"
            ) from None

    def _reason(self, error: Exception) -> str:
        """What went wrong, in one line, without the token."""
        reason = " ".join(str(error).split()) or type(error).__name__
        return reason.replace(self.args.hub_token, "…") if self.args.hub_token else reason
