"""LLaVA's command-line scripts for inference: python -m llava.eval.<name> --help."""
