"""Learning rates of an optimizer's parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def scale_learning_rate(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], scale: float) -> None:
    """Give some of an optimizer's parameters groups of their own, whose learning rate is `scale` times that of their
    present group."""
    scaled = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        split = [parameter for parameter in group["params"] if id(parameter) in scaled]
        if split:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in scaled]
            optimizer.add_param_group({**group, "params": split, "lr": group["lr"] * scale})
