"""What tests against torch share."""

import importlib

import torch


class Float64(torch.overrides.TorchFunctionMode):
    """Inside, who asks for float32 gets float64: norms do, and PEFT's layers with Fourier transforms."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {name: torch.float64 if a is torch.float32 else a for name, a in (kwargs or {}).items()}
        answer = func(*args, **kwargs)
        return answer.double() if func is torch.zeros and answer.dtype == torch.float32 else answer


def compute_in_float64(monkeypatch) -> None:
    """Takes roundings to float32 out of transformers: those of Llama's and Qwen2's norms and rotary angles, and of the
    square root in DeBERTa's attention."""
    for family, name in (("llama", "Llama"), ("qwen2", "Qwen2")):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        monkeypatch.setattr(getattr(module, f"{name}RMSNorm"), "forward", _rms_norm)
        monkeypatch.setattr(getattr(module, f"{name}RotaryEmbedding"), "forward", _rotary)
    deberta = importlib.import_module("transformers.models.deberta_v2.modeling_deberta_v2")
    monkeypatch.setattr(deberta, "scaled_size_sqrt", _root)


def _rms_norm(self, x):
    return self.weight * (x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt())


def _rotary(self, x, position_ids):
    dim = self.config.hidden_size // self.config.num_attention_heads
    speeds = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = (position_ids[..., None] * speeds).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


def _root(x, factor):
    return torch.tensor(float(x.size(-1) * factor) ** 0.5, dtype=torch.float64)
