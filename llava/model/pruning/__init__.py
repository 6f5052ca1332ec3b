"""Pruning the weights of a LLaVA's decoder by a policy, a ratio for every matrix, which can be searched for."""
