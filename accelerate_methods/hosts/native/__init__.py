"""Hosts of transformers' own multimodal models.

Nothing of a model is replaced: ``model.forward`` and the language model's ``forward`` of that one object get a wrapper,
vision encoder layers a hook. transformers encodes the images and puts their features into the prompt as ever; what
reaches the language model is then cut (:mod:`.prompt`), and the decoder loop takes over. ``generate``, processors and
chat templates stay those of transformers. A family (one module here) says where tokens stand and what signals there
are; :func:`register_family` adds one from outside (docs/adding_a_host.md).
"""

from accelerate_methods.hosts.native.family import Call, Family, Seen, expected, locate_items
from accelerate_methods.hosts.native.host import HOST, register_family
from accelerate_methods.hosts.native.prompt import PromptItem
from accelerate_methods.hosts.native.tower import ClipTower

__all__ = ["Call", "ClipTower", "Family", "HOST", "PromptItem", "Seen", "expected", "locate_items", "register_family"]
