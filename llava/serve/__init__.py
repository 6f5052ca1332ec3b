"""A chat in the terminal: python -m llava.serve.cli --help."""
