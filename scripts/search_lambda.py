"""The search for a penalty's weight: ``python scripts/search_lambda.py --experiment split --method ewc …``.

The same as ``das-lm search-lambda``; ``--help`` and ``--help_all`` list the options.
"""

import sys

from das_lm.cli import main

if __name__ == "__main__":
    sys.exit(main(["search-lambda", *sys.argv[1:]]))
