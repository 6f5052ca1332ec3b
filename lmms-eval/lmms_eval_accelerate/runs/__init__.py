"""What makes, keeps and describes a run: folders, journals, costs, summaries, the launcher."""
