"""``python -m lmms_eval_accelerate.compare``."""

from lmms_eval_accelerate.compare.options import parser

if __name__ == "__main__":
    parser().parse_args()  # -h and mistakes end here, before anything is loaded
    from lmms_eval_accelerate.compare.cli import main

    main()
