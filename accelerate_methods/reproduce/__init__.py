"""The tables of the papers, run again: `python -m accelerate_methods.reproduce`."""
