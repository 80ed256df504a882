"""Compare methods with small models on classic tasks: ``python scripts/classic_benchmark.py --experiment permuted``.

The same as ``das-lm classic``; ``--help`` and ``--help_all`` list the options.
"""

import sys

from das_lm.cli import main

if __name__ == "__main__":
    sys.exit(main(["classic", *sys.argv[1:]]))
