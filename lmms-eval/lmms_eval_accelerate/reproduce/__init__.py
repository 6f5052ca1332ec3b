"""The tables of the papers, run again: `python -m lmms_eval_accelerate.reproduce`."""
