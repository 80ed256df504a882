"""Small models on classic continual-learning tasks: permuted, split and relabelled digits, and seasons."""

from das_lm.classic.images import Images, LabelledImages, load_images
from das_lm.classic.models import MLP
from das_lm.classic.tasks import EXPERIMENTS, Examples, Experiment, Task, TrainingExamples, build_experiment

__all__ = [
    "EXPERIMENTS",
    "MLP",
    "Examples",
    "Experiment",
    "Images",
    "LabelledImages",
    "Task",
    "TrainingExamples",
    "build_experiment",
    "load_images",
]
