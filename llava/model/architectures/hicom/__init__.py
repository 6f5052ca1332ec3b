"""HICom: a video in blocks and queries that the instruction asks for (CVPR 2025, arXiv 2503.16036)."""
