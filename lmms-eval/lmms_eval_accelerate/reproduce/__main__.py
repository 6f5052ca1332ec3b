"""``python -m lmms_eval_accelerate.reproduce``."""

import sys

from lmms_eval_accelerate.reproduce.cli import main

if __name__ == "__main__":
    sys.exit(main())
