"""A recipe is one experiment, checked as a whole before anything heavy loads."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from das_lm.data.domains import Domain
from das_lm.data.remembered_text import RememberedText, is_self
from das_lm.errors import UserError, did_you_mean
from das_lm.plain_words import in_plain_words, key_path
from das_lm.run.arguments import check_peft, check_training

if TYPE_CHECKING:
    from das_lm.data.domains import Documents
    from das_lm.training.config import ContinualConfig
    from das_lm.units.architectures import Architecture


@in_plain_words
@dataclass(config=ConfigDict(extra="forbid"))
class Recipe:
    """
    A continual pre-training run. A recipe file has the same keys; `recipes/README.md` explains them with examples.

    Args:
        model_name_or_path: `"built-in"`, a directory, or a model of the Hugging Face hub.
        domains: What to learn, in this order.
        output_dir: Where checkpoints and results go.
        measure: Domains that are measured after every stage and never trained on.
        remember: Text that stands for what the model knew before the first domain, for the methods that hold on to it:
            text of yours, `self` (the model writes it), or both, by weight.
        method: Name of a continual-learning method of `das_lm.methods.METHODS`, or several; stored as a list.
        schedule: Domain after domain (`"sequential"`), their epochs in turns (`"alternating"`), or mixed in every
            batch (`"interleaved"`). Methods that consolidate when a domain ends need the first.
        training: Training arguments, any field of [`ContinualConfig`]; a domain may override them in its own
            `training`.
        trust_remote_code: Run the code that comes with a model of the hub. A recipe file cannot say so; the command
            line can.
        attn_implementation: Attention of the model, as `from_pretrained` takes it.
        units: Where the units of an architecture are that the package does not know.
        peft: Train LoRA adapters instead of all weights: arguments of PEFT's `LoraConfig`; `adapters`, what becomes of
            a domain's (`"merge"` into the model, `"stack"` beside it, or keep every domain's `"apart"`); and
            `load_in_4bit`.
        new_lm_head: The model is an encoder without its LM head. It gets a new one, tied to the embeddings, which is
            trained alone for so many steps, on the text of `measure` (of which `held_out` is then split off).
        description: One line for people.

    Raises:
        UserError: A wrong key, type or combination.
    """

    model_name_or_path: str
    domains: list[Domain]
    output_dir: str
    measure: list[Domain] = Field(default_factory=list)
    remember: list[RememberedText] = Field(default_factory=list)
    method: str | list[str] = Field(default="das", validate_default=True)
    schedule: Literal["sequential", "alternating", "interleaved"] = "sequential"
    training: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    units: dict[str, Any] | None = None
    peft: dict[str, Any] | None = None
    new_lm_head: int | None = None
    description: str = ""

    @field_validator("model_name_or_path", "output_dir")
    @classmethod
    def _check_not_empty(cls, value: str, info: ValidationInfo) -> str:
        if not value.strip():
            raise ValueError("is empty")
        return os.path.expanduser(value) if info.field_name == "output_dir" else value

    @field_validator("domains")
    @classmethod
    def _check_domains(cls, domains: list[Domain]) -> list[Domain]:
        if not domains:
            raise ValueError("is empty; name at least one domain to learn")
        _check_names(domains, [])
        return domains

    @field_validator("measure")
    @classmethod
    def _check_measure(cls, measure: list[Domain], info: ValidationInfo) -> list[Domain]:
        _check_names(measure, info.data.get("domains", []))
        for domain in measure:
            if domain.training:
                raise ValueError(f"'{domain.name}' is never trained on; leave out its training arguments")
        return measure

    @field_validator("remember", mode="before")
    @classmethod
    def _expand_remember(cls, remember: Any) -> Any:
        entries = remember if isinstance(remember, list) else [remember]
        return [RememberedText.expanded(entry) for entry in entries]

    @field_validator("remember")
    @classmethod
    def _check_remember(cls, remember: list[RememberedText], info: ValidationInfo) -> list[RememberedText]:
        _check_names(remember, [*info.data.get("domains", []), *info.data.get("measure", [])])
        if remember and not any(entry.weight for entry in remember):
            raise ValueError("no entry has a weight above 0; leave remember out, or give one a weight")
        return remember

    @field_validator("method")
    @classmethod
    def _check_method(cls, method: str | list[str], info: ValidationInfo) -> list[str]:
        from das_lm.methods import METHODS

        methods = [method] if isinstance(method, str) else method
        if not methods:
            raise ValueError("is empty; for training without a method write naive")
        streamed = [domain.name for domain in info.data.get("domains", []) if domain.streaming]
        for name in methods:
            if name not in METHODS:
                raise ValueError(f"there is no method '{name}'.{did_you_mean(name, METHODS)}")
            if METHODS[name].needs_earlier_domains and streamed:
                raise ValueError(
                    f"'{name}' mixes all domains so far, and '{streamed[0]}' is streamed; leave streaming out of it, "
                    "or write another method, such as replay"
                )
        if len(set(methods)) < len(methods):
            raise ValueError(f"{', '.join(methods)}: a method stands there twice")
        return methods

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, schedule: str, info: ValidationInfo) -> str:
        from das_lm.methods import METHODS

        if schedule != "sequential":
            for name in info.data.get("method", []):
                if METHODS[name].needs_domain_ends:
                    raise ValueError(
                        f"'{schedule}' does not go with the method '{name}', which consolidates when a domain ends; "
                        "write sequential, or another method"
                    )
            for domain in info.data.get("domains", []):
                if domain.streaming:
                    raise ValueError(
                        f"'{schedule}' mixes whole domains, and '{domain.name}' is streamed; write sequential, or "
                        "leave streaming out of it"
                    )
                if domain.training:
                    raise ValueError(
                        f"'{schedule}' trains on all domains at once, so '{domain.name}' cannot have training "
                        "arguments of its own; write sequential, or leave them out"
                    )
        return schedule

    @field_validator("training")
    @classmethod
    def _check_steps_of_streams(cls, training: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for domain in info.data.get("domains", []):
            if domain.streaming and {**training, **domain.training}.get("max_steps") in (None, -1):
                raise ValueError(
                    f"domain '{domain.name}' is streamed, and how long it is, is not known: write max_steps, such as "
                    "max_steps: 1000"
                )
        return training

    @field_validator("training")
    @classmethod
    def _check_importance(cls, training: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        from das_lm.training.config import ContinualConfig

        for before, domain in itertools.pairwise(info.data.get("domains", [])):
            for key in ("importance_normalization", "importance_accumulation"):
                ways = [
                    {**training, **one.training}.get(key, getattr(ContinualConfig, key)) for one in (before, domain)
                ]
                if "importance" not in domain.training and ways[0] != ways[1]:
                    raise ValueError(
                        f"domain '{domain.name}' has {key} '{ways[1]}', and '{before.name}', whose importance it "
                        f"takes over, '{ways[0]}': write the same for both"
                    )
        return training

    @field_validator("peft")
    @classmethod
    def _check_peft(cls, peft: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        from das_lm.methods import METHODS

        if peft is None:
            return None
        for name in info.data.get("method", []):
            if not METHODS[name].works_with_adapters:
                raise ValueError(
                    f"the method '{name}' remembers single parameters, and the next domain's adapter has others; "
                    "leave peft out, or write another method, such as das or replay"
                )
        return check_peft(peft)

    @field_validator("new_lm_head")
    @classmethod
    def _check_new_lm_head(cls, steps: int | None, info: ValidationInfo) -> int | None:
        if steps is None:
            return None
        if steps < 1:
            raise ValueError(f"{steps} must be at least 1: how many steps is the new head trained alone?")
        if not info.data.get("measure"):
            raise ValueError("a new head learns from general text before all else; name some as `measure`")
        for domain in info.data["measure"]:
            if domain.streaming:
                raise ValueError(f"it learns from the text of '{domain.name}', which is streamed; leave streaming out")
        if (info.data.get("peft") or {}).get("adapters", "merge") != "merge":
            raise ValueError("adapters without their model would lack the head; write adapters: merge")
        return steps

    def load_text(self) -> dict[str, Documents]:
        """The text of all domains by name, those that are learned first; then what is remembered."""
        text = {domain.name: domain.load() for domain in self.domains}
        text |= {one.name: one.load_whole() for one in self.remember if not is_self(one.data)}
        return text | {one.name: one.load(measure_only=self.new_lm_head is None) for one in self.measure}

    def architecture(self) -> Architecture | None:
        """The entry that `units` gives, if it does."""
        from das_lm.units.architectures import Architecture

        return Architecture.from_dict(self.units) if self.units else None

    def training_arguments(self, domain: Domain | None, output_dir: str, check_device: bool = True) -> ContinualConfig:
        """The training arguments of the recipe with those of a domain over them.

        Args:
            domain: `None` for what belongs to no single domain.
            output_dir: The directory that the trainer is given.
            check_device: Refuse what this machine cannot follow; without, they are those of a CPU.

        Raises:
            UserError: Unknown or wrong training arguments, or some that this machine cannot follow.
        """
        from das_lm.training.config import ContinualConfig

        where = f"domain '{domain.name}': " if domain else ""
        given = {**self.training, **(domain.training if domain else {}), **({} if check_device else {"use_cpu": True})}
        arguments, problems = check_training(given, ())
        if problems:
            raise UserError("\n".join(f"{where}training.{key_path(path)}: {message}" for path, message in problems))
        try:
            config = ContinualConfig(output_dir=output_dir, **arguments)
            self._check_metric(config.metric_for_best_model)
            if check_device:
                config.check_packages()
            return config
        except Exception as error:  # whatever transformers makes of values that do not go together
            raise UserError(f"{where}training arguments: {' '.join(str(error).split())}") from error

    def _check_metric(self, metric: str | None) -> None:
        domain, _, score = (metric or "").removeprefix("eval_").rpartition("_")
        names = [one.name for one in [*self.domains, *self.measure]]
        if metric is not None and not (domain in names and score in ("loss", "accuracy")):
            raise ValueError(
                f"metric_for_best_model: '{metric}' is not measured; write the loss or accuracy of a domain, such as "
                f"{names[0]}_loss"
            )

    def to_yaml(self) -> str:
        """The recipe as a file that [`load_recipe`] reads back to an equal one, without what no file may hold: secrets
        like `hub_token`, and `trust_remote_code`."""
        adapter = TypeAdapter(Recipe)
        recipe = adapter.dump_python(self, mode="json")
        explicit = adapter.dump_python(self, mode="json", exclude_defaults=True)
        for key in ("domains", "measure", "remember"):  # of a domain, only what is not the default
            recipe[key] = [{"name": entry.pop("name"), "data": "built-in", **entry} for entry in explicit.get(key, [])]
        for entry in (recipe, *recipe["domains"]):
            if "training" in entry:
                entry["training"] = {k: v for k, v in entry["training"].items() if not k.endswith("token")}
        recipe.pop("trust_remote_code")
        recipe = {"description": recipe.pop("description"), **recipe}
        recipe = {key: value for key, value in recipe.items() if value not in (None, "", [], {})}
        return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)


def _check_names(domains: list[Domain], others: list[Domain]) -> None:
    seen = {domain.name.lower() for domain in others}
    for domain in domains:
        name = domain.name.lower()  # folders are named after domains, and some file systems ignore case
        if name in seen:
            raise ValueError(
                f"'{domain.name}' stands there twice; the domains that are learned and those that are only measured "
                "all need different names"
            )
        seen.add(name)
