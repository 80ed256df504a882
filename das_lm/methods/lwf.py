"""LwF: the model before the domain teaches on the domain's own text (Li and Hoiem, arXiv 1606.09282)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from das_lm.methods.arguments import Arguments, NotNegative, Temperature, knob
from das_lm.methods.base import Engine, Method
from das_lm.methods.teacher import Teacher
from das_lm.model.objective import Output


@dataclass
class LwFArguments(Arguments):
    lwf_weight: NotNegative = knob(
        0.5, "Weight of the distillation from the model before the domain (Li and Hoiem, 1606.09282)."
    )
    lwf_temperature: Temperature = knob(2.0, "Temperature of both distributions of that loss.")


class LwF(Method):
    """
    Learning without forgetting: adds `lwf_weight` · T² · KL(p_old^{1/T} ‖ p_new^{1/T}), averaged as the domain's own
    loss is over the predictions of a step (regression: the squared difference). A pre-trained language model teaches
    from the first domain on, another module from the second. A module with heads (a method
    `head_logits(inputs, task)`) is taught on the heads of all earlier tasks.

    Memory: one copy of the model, and a forward pass.
    """

    needs_domain_ends = True
    works_sharded = False
    protects_base = True
    arguments = LwFArguments
    search_grid = ("lwf_weight", (0.1, 0.3, 1.0, 3.0, 10.0))

    def __init__(self):
        self.teacher: Teacher | None = None
        self.domains = 0
        self.tasks: set[int] = set()

    def attach(self, trainer: Engine) -> None:
        super().attach(trainer)
        Teacher.check(self.args)
        self.protects_base = trainer.units is not None
        self._seen: set[int] = set()

    def begin_domain(self) -> None:
        if self.teacher is None and (self.trainer.units is not None or self.domains):
            self.teacher = Teacher(self.trainer)

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor], outputs: Output) -> dict[str, torch.Tensor]:
        """The weighted distillation, once there is a teacher."""
        if "task" in batch:
            self._seen.update(batch["task"].unique().tolist())
        if self.teacher is None or self.args.lwf_weight == 0:
            return {}
        if self.tasks:
            inner = self.trainer.accelerator.unwrap_model(model)
            pairs = []
            for task in sorted(self.tasks):
                with torch.no_grad():
                    taught = self.teacher.model.head_logits(batch["inputs"], task)
                pairs.append((inner.head_logits(batch["inputs"], task), taught))
            loss = sum(self._distance(ours, taught, outputs.classifies) for ours, taught in pairs) / len(pairs)
        else:
            ours = outputs.logits[outputs.rows < len(next(iter(batch.values())))]
            loss = self._distance(ours, self.teacher(batch).logits, outputs.classifies)
        loss = self.args.lwf_weight * loss
        return {"lwf": loss if outputs.loss is None else loss.mean()}

    def _distance(self, ours: torch.Tensor, taught: torch.Tensor, classifies: bool) -> torch.Tensor:
        """Of each prediction, [predictions]; both of shape [predictions, classes]."""
        if not classifies:
            return (ours.float() - taught.float()).square().reshape(len(ours), -1).mean(1)
        temperature = self.args.lwf_temperature
        ours, taught = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (ours, taught))
        return temperature**2 * F.kl_div(ours, taught, reduction="none", log_target=True).sum(-1)

    def end_domain(self) -> None:
        self.teacher, self.domains = None, self.domains + 1
        self.tasks |= self._seen

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The teacher too, so that a resumed domain has the same one."""
        state = {} if self.teacher is None else self.teacher.state_dict()
        if self.domains:
            state["domains"] = torch.tensor(self.domains)
        if self.tasks:
            state["tasks"] = torch.tensor(sorted(self.tasks))
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.domains = int(state.get("domains", 0))
        self.tasks = set(state["tasks"].tolist()) if "tasks" in state else set()
        if any(name.startswith("teacher.") for name in state):
            self.teacher = Teacher(self.trainer, state, self.file_name)
