"""What tests against torch share."""

import torch


class Float64(torch.overrides.TorchFunctionMode):
    """Inside, who asks for float32 gets float64: norms do, and PEFT's layers with Fourier transforms."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {name: torch.float64 if a is torch.float32 else a for name, a in (kwargs or {}).items()}
        answer = func(*args, **kwargs)
        return answer.double() if func is torch.zeros and answer.dtype == torch.float32 else answer
