"""Let torchvision load beside a CPU build of torch where its wheel is the CUDA build, which PyPI has.

Its own kernels do not load there; nothing that vLLM does with pictures needs them, but torchvision describes two of
them at import, and they have to be known by name. scripts/lib/vllm.sh puts this into an environment that needs it.
"""

import importlib.abc
import sys

KERNELS = ("nms", "qnms")
KEPT = []  # a library's registrations end with the object


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for kernel in KERNELS:
                library.define(f"{kernel}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            KEPT.append(library)
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
