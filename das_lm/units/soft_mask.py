"""Soft-masking: the more important a unit, the less its parameters move (DAS, equation 6)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch

from das_lm.errors import UserError
from das_lm.units.discovery import Units
from das_lm.units.sharding import local, named_parameters, own_slice

logger = logging.getLogger(__name__)

#: Values of `TrainingArguments.optim` that keep further iterates of the parameters, which masks would not reach.
REFUSED_OPTIMIZERS = ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd")
#: Those whose step follows the gradient's size, so that a masked gradient is a masked step. RMSprop, Adagrad, Lion and
#: all of Adam's relatives divide a constant factor out.
GRADIENT_PROPORTIONAL_OPTIMIZERS = ("sgd",)


def check_optimizer(optim: str, target: str) -> None:
    """Refuse an optimizer that masks cannot act on, and warn where `target="gradient"` does nothing.

    Raises:
        UserError: `optim` is one of `REFUSED_OPTIMIZERS`.
    """
    if optim in REFUSED_OPTIMIZERS:
        raise UserError(
            f"optim: soft-masks do not work with '{optim}', which keeps further iterates of the parameters, where the "
            "mask does not reach; use 'adamw_torch'"
        )
    if target == "gradient" and optim not in GRADIENT_PROPORTIONAL_OPTIMIZERS:
        logger.warning(
            "soft_mask_target: 'gradient' does next to nothing with optim '%s', which divides a constant factor out "
            "of its step; use soft_mask_target 'update' (or optim 'sgd')",
            optim,
        )


def check_adapter(units: Units, kinds: Iterable[str]) -> None:
    """Refuse a LoRA adapter that masks by unit cannot act on exactly; a model without adapter passes.

    An adapter adds s · B A to the weights. Rows of B are rows of that: held at their 0, they add nothing to a unit's
    rows. Columns have no parameter of their own: all of them move with B.

    Raises:
        UserError: what the adapter has to leave out, or what it lacks.
    """
    adapted = {name: module for name, module in units.model.named_modules() if hasattr(module, "lora_B")}
    if not adapted:
        return
    kinds, parameters = set(kinds), named_parameters(units.model)
    rows = [piece for piece in units.slices if ".lora_B." in piece.parameter]
    if not any(units.groups[piece.group].kind in kinds for piece in rows):
        raise UserError(
            f"peft: target_modules ({', '.join(sorted({name.split('.')[-1] for name in adapted}))}) hold no unit of "
            f"the kinds that are masked ({', '.join(sorted(kinds))}); units are in the rows of "
            f"{', '.join(sorted(_own_projections(units)))}: name some of these, or train without 'das'"
        )
    readers = {id(group.module) for group in units.groups.values() if group.kind == "head"}
    for name, module in adapted.items():
        if "head" in kinds and id(module) in readers:
            raise UserError(
                f"peft: '{name}' has an adapter, and what belongs to a head are columns there, which all move "
                "together with B, so that no mask can hold one back: leave the module out of target_modules (or name "
                "it in exclude_modules), or leave 'head' out of soft_mask_units"
            )
    for piece in units.slices:
        if ".modules_to_save." in piece.parameter:
            raise UserError(
                f"peft: modules_to_save trains '{piece.parameter.split('.modules_to_save.')[0]}', which holds units; "
                "name it in target_modules instead"
            )
    check_fresh(parameters, "masks by unit are exact on a fresh one alone")


def check_fresh(parameters: Mapping[str, torch.nn.Parameter], reason: str) -> None:
    """Refuse a LoRA adapter that adds something already.

    Raises:
        UserError: some trainable B is not 0; with the reason.
    """
    for name, parameter in parameters.items():
        if ".lora_B." in name and parameter.requires_grad and parameter.any():
            raise UserError(
                f"peft: the adapter does not begin at 0 ({name}), and {reason}: give a peft_config that makes a fresh "
                "one, and merge what was trained before into the model (merge_and_unload)"
            )


def _own_projections(units: Units) -> set[str]:
    """Names of the projections whose rows are units'."""
    entry = units.architecture
    paths = [*entry.attention_in, *entry.ffn_in, *([entry.ffn_out] if entry.ffn_out else [])]
    return {path.split(".")[-1] for path in paths if path not in entry.optional}


class ParameterMask:
    """
    Scales what one optimizer step does to parameters by 1 − what is held back.

    Call [`before_step`] when the gradients are final (accumulated, clipped) and [`mask_step`] when the optimizer has
    stepped. What is held back by 1 stays what it was bit for bit, by 0 it takes the optimizer's step bit for bit.

    Under FSDP2 each process masks its own slice of the parameters, and nothing is gathered.

    Args:
        masked: parameters, and what is held back of each: in [0, 1], of a shape that broadcasts to the parameter's.
        target: `"gradient"` multiplies the gradients, before the step; `"update"` scales the difference between the
            parameters after and before the step, which takes one copy of the masked parameters and masks weight decay
            too.
    """

    def __init__(self, masked: Iterable[tuple[torch.nn.Parameter, torch.Tensor]], target: str = "update"):
        self.target = target
        # Of a sharded parameter, what it holds here may move to other memory: look at it in every step.
        self._masked = [
            (parameter, own_slice(held_back.to(parameter.device, parameter.dtype), parameter))
            for parameter, held_back in masked
        ]
        self._before: list[torch.Tensor] | None = None

    @torch.no_grad()
    def before_step(self) -> None:
        """Mask the gradients, or keep the parameters as they are before the step."""
        if self.target == "gradient":
            for parameter, held_back in self._masked:
                if parameter.grad is not None:
                    local(parameter.grad).mul_(1 - held_back)
        elif self._before is None:
            self._before = [local(parameter).clone() for parameter, _ in self._masked]
        elif self._masked:
            torch._foreach_copy_(self._before, [local(parameter) for parameter, _ in self._masked])

    @torch.no_grad()
    def mask_step(self) -> None:
        """Take back the masked share of the step. A step that the gradient scaler skipped stays skipped."""
        if self.target == "update":
            for (parameter, held_back), before in zip(self._masked, self._before, strict=True):
                local(parameter).lerp_(before, held_back)


class SoftMask(ParameterMask):
    """
    A [`ParameterMask`] of the units' parameters: strength × importance is held back.

    Args:
        units: the model's units.
        importance: group key -> importance in [0, 1], shape [units].
        target: see [`ParameterMask`].
        kinds: the kinds of units that are masked.
        strength: factor on the importance, in [0, 1].
    """

    def __init__(
        self,
        units: Units,
        importance: Mapping[str, torch.Tensor],
        target: str = "update",
        kinds: Iterable[str] = ("head", "intermediate", "output"),
        strength: float = 1.0,
    ):
        kinds = set(kinds)
        parameters = named_parameters(units.model)
        masked = []
        for piece in units.slices:
            parameter = parameters[piece.parameter]
            if strength > 0 and units.groups[piece.group].kind in kinds and parameter.requires_grad:
                held_back = piece.spread(importance[piece.group].to(parameter.device), parameter.ndim) * strength
                masked.append((parameter, held_back))
        super().__init__(masked, target)
