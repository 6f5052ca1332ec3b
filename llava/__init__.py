"""A LLaVA-NeXT compatible tree (LLaVA-1.5, 1.6, OneVision, Video) for today's torch and transformers.

Importing the package alone costs nothing: torch, transformers and the video readers are loaded by the modules that
need them.
"""

__version__ = "0.1.0"
