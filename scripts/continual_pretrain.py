"""Continual pre-training from a recipe: ``accelerate launch scripts/continual_pretrain.py --recipe bio_then_cs``.

The same as ``das-lm pretrain``; ``--help`` and ``--help_all`` list the options.
"""

import sys

from das_lm.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
