"""``python -m lmms_eval_accelerate.reproduce``."""

import sys

from lmms_eval_accelerate.reproduce.options import own_and_extra, parser

if __name__ == "__main__":
    if sys.argv[1:2] != ["leaderboard"]:
        parser().parse_args(own_and_extra(sys.argv[1:])[0])  # -h and mistakes end here, before anything is loaded
    from lmms_eval_accelerate.reproduce.cli import main

    sys.exit(main())
