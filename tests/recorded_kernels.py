"""What stands for a CUDA graph on a CPU: it records the operators of a step, as a graph does, and repeats them in the
memory of the first run, without any of the Python between them.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Kernels(TorchDispatchMode):
    """Stands for CudaGraph on a CPU."""

    captured = 0

    def __init__(self, device, pool):
        super().__init__()
        self.calls = []

    @staticmethod
    def memory_pool():
        return None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def capture(self, function):
        Kernels.captured += 1
        with self:
            return function()

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.calls:
            if function.is_view:
                continue
            again = function(*args, **kwargs)
            for place, value in zip(tensors(result), tensors(again), strict=True):
                if place is not value:
                    place.copy_(value)


def tensors(value):
    return [part for part in (value if isinstance(value, tuple | list) else [value]) if isinstance(part, torch.Tensor)]
