"""Development only: torchvision's wheel expects its compiled operators, which do not load beside a CPU-only torch.

Python runs this at start-up (through the .pth file beside it), in Ray's workers too. When torchvision is about to be
imported and torch has no CUDA, the two operators torchvision registers Python kernels for are declared first.
"""

import importlib.abc
import importlib.machinery
import sys


class _Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__]._library = library  # the declarations live as long as this object


sys.meta_path.insert(0, _Declare())
