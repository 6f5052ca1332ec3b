"""``python -m lmms_eval_accelerate.benchmarks``: see ``command.py``."""

import sys

from lmms_eval_accelerate.benchmarks.command import main

if __name__ == "__main__":
    sys.exit(main())
