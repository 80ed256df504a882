"""What checkpoints know and what they lost: ``accelerate launch scripts/evaluate_forgetting.py --run DIRECTORY …``.

The same as ``das-lm evaluate``; ``--help`` and ``--help_all`` list the options.
"""

import sys

from das_lm.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
