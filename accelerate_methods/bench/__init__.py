"""What a method costs on a model of a given shape: ``python -m accelerate_methods.bench``. See docs/efficiency.md."""
