"""Side by side: ``python -m lmms_eval_accelerate.compare`` runs settings on tasks and shows one table."""
