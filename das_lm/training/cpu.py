"""Training on a CPU: all of its cores, and memory that is used again."""

from __future__ import annotations

import ctypes
import os

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_INT = 2**31 - 1


def use_all_cores() -> None:
    """Take back what `accelerate launch` does to a single CPU process: it sets OMP_NUM_THREADS=1."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)


def keep_freed_memory() -> None:
    """
    Let glibc keep what is freed for the next step. By default it gives every tensor above 32 MB back to the kernel,
    which hands it out again page by page, zeroed: about a fifth of the time of a training step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # another C library
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        mallopt(parameter, LARGEST_INT)
