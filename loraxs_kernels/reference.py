"""The primitive in plain torch: what every backend must compute, and the layer people run today."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def lowrank_linear(
    x: Tensor, W: Tensor | None, A: Tensor, R: Tensor, B: Tensor, s: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y = x W^T + s (x A^T) R^T B^T (+ bias), and z = x A^T.

    x (T, K), W (N, K) or None for the low-rank part alone, A (r, K), R (r, r), B (N, r), bias (N,).
    Every operand in one dtype: with fp64 operands this is the oracle, with bf16 ones the unfused chain that
    the accuracy rule of the tests compares with.  Source: LoRA-XS, arXiv 2405.17604, equation 5.
    """
    z = x @ A.T
    y = s * (z @ R.T) @ B.T
    if W is not None:
        y = F.linear(x, W, bias) + y
    elif bias is not None:
        y = y + bias
    return y, z


class UnfusedLinear(nn.Module):
    """The layer as the LoRA-XS reference runs it on PEFT: a frozen linear, three small linears, a scale, an add.

    For comparison only.  It shares the tensors of `layer` (a LoRAXSLinear), R included, in the dtypes they have.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer.base_layer
        self.lora_A, self.lora_latent, self.lora_B = (_linear(layer.A), _linear(layer.R), _linear(layer.B))
        self.lora_dropout = nn.Dropout(layer.dropout) if layer.dropout else nn.Identity()
        self.scaling = layer.scaling

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        h = self.lora_dropout(x.to(self.lora_A.weight.dtype))
        return y + self.lora_B(self.lora_latent(self.lora_A(h))) * self.scaling


def _linear(weight: Tensor) -> nn.Linear:
    """An nn.Linear around an existing tensor; a Parameter stays the same Parameter."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    return linear
