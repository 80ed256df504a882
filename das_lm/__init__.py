"""das-lm: continual pre-training of language models without forgetting."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "Architecture": "das_lm.units.architectures",
    "ContinualConfig": "das_lm.training.config",
    "ContinualTrainer": "das_lm.training.trainer",
    "DASConfig": "das_lm.training.config",
    "DASTrainer": "das_lm.training.trainer",
    "Domain": "das_lm.data.domains",
    "Importance": "das_lm.units.importance",
    "Recipe": "das_lm.run.recipe",
    "Results": "das_lm.report.shown",
    "UserError": "das_lm.errors",
    "continual_pretrain": "das_lm.run.walk",
    "load_recipe": "das_lm.run.recipe_file",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from das_lm.data.domains import Domain
    from das_lm.errors import UserError
    from das_lm.report.shown import Results
    from das_lm.run.recipe import Recipe
    from das_lm.run.recipe_file import load_recipe
    from das_lm.run.walk import continual_pretrain
    from das_lm.training.config import ContinualConfig, DASConfig
    from das_lm.training.trainer import ContinualTrainer, DASTrainer
    from das_lm.units.architectures import Architecture
    from das_lm.units.importance import Importance


def __getattr__(name: str):
    """Load what was asked for: transformers and datasets take seconds."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'das_lm' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
