"""``python -m das_lm`` is ``das-lm``."""

import sys

from das_lm.cli import main

if __name__ == "__main__":
    sys.exit(main())
