"""``python -m lmms_eval_accelerate`` (also below ``torchrun`` and ``accelerate launch -m``)."""

from lmms_eval_accelerate.cli import main

if __name__ == "__main__":
    main()
