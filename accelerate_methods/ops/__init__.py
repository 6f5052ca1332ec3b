"""Tensor algorithms that several methods share. Each is written once, batched, and free of model knowledge."""
