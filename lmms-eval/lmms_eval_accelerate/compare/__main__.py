"""``python -m lmms_eval_accelerate.compare``."""

from lmms_eval_accelerate.compare.cli import main

if __name__ == "__main__":
    main()
