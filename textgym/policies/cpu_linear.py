"""Linear layers on a CPU by oneDNN, which PyTorch has and does not use for float32 on x86.

PyTorch multiplies float32 matrices with MKL, which has its fast kernels for some makers' processors
only; oneDNN asks the processor what it can do. `scripts/bench_linear.py` measures both.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

SMALLEST = 1 << 22
"""Multiplications of a product that is worth it: oneDNN writes code for a new shape (0.5 ms)."""
SMALLEST_AGAIN = 1 << 20
"""The same where no gradient is wanted: the shapes of decoding steps come again and again."""


class OneDNNLinear(nn.Linear):
    """`nn.Linear` whose large float32 products on a CPU are oneDNN's; else it is `nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        smallest = SMALLEST if torch.is_grad_enabled() else SMALLEST_AGAIN
        if input.numel() * self.out_features < smallest or not _applies(input, self.weight):
            return super().forward(input)
        rows = input.reshape(-1, input.shape[-1]).contiguous()
        if torch.is_grad_enabled() and (rows.requires_grad or self.weight.requires_grad):
            out: Tensor = _Product.apply(rows, self.weight)  # type: ignore[no-untyped-call]
        else:
            out = product(rows, self.weight)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*input.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    """X W^T, with its gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return product(rows, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        gradient = gradient.contiguous()  # that of a sum has strides 0, which takes oneDNN minutes
        # Under create_graph the gradient gets one of its own (TRPO's Hessian-vector products).
        times = _Product.apply if torch.is_grad_enabled() else product
        of_rows = times(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[
            1
        ]:  # the narrower one first: the other order takes 1.2 to 1.5 times
            narrow = rows.shape[1] <= gradient.shape[1]
            first, second = (rows, gradient) if narrow else (gradient, rows)
            of_weight = times(first.t(), second.t())
            of_weight = of_weight.t() if narrow else of_weight
        return of_rows, of_weight


def use_onednn(model: nn.Module) -> None:
    """Let every plain linear layer of a model multiply by oneDNN on a CPU.

    The layers stay what they are: same parameters, same state dict, still `nn.Linear`. Subclasses
    (quantised layers, say) are left alone.
    """
    if not has_onednn():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W^T + b of float32 rows [n, k] and a weight [m, k] on a CPU, by oneDNN."""
    operator = torch.ops.mkldnn._linear_pointwise
    return cast(Tensor, operator(rows, weight, bias, "none", [], ""))


def _applies(*tensors: Tensor) -> bool:
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors) and not (
        torch.is_autocast_enabled("cpu")
    )


def has_onednn() -> bool:
    """Whether this build of PyTorch has the operator that its compiler uses for linear layers."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and hasattr(torch.ops.mkldnn, "_linear_pointwise")
