"""The primitive in plain torch: what every backend must compute, how exactly, and the layer people run today."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def lowrank_linear(
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    bias: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x W^T + s (x A^T) R^T B^T (+ bias), and z = x A^T.

    x (T, K), W (N, K) or None for the low-rank part alone, A (r, K), R (r, r), B (N, r), bias (N,).  With an index (T,)
    of integers R is a stack (n, r, r): row t uses R[index[t]], or none where that is -1.
    Every operand in one dtype: with fp64 operands this is the oracle, with bf16 ones the unfused chain that
    the accuracy rule of the tests compares with.  Source: LoRA-XS, arXiv 2405.17604, equation 5.
    """
    z = x @ A.T
    y = s * mixed(z, R, index) @ B.T
    if W is not None:
        y = F.linear(x, W, bias) + y
    elif bias is not None:
        y = y + bias
    return y, z


def mixed(z: Tensor, R: Tensor, index: Tensor | None = None) -> Tensor:
    """z R^T (T, r), with the R of each row where there is an index."""
    if index is None:
        return z @ R.T
    idle = (index < 0)[:, None]
    own = torch.where(idle[:, None], 0, R[index.clamp(min=0)])
    return torch.einsum("tij,tj->ti", own, torch.where(idle, 0, z))


class UnfusedLinear(nn.Module):
    """The layer as the LoRA-XS reference runs it on PEFT: a frozen linear, three small linears, a scale, an add.

    For comparison only.  It shares the tensors of `layer` (a LoraXSLinear), R included, in the dtypes they have.
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
        y += self.lora_B(self.lora_latent(self.lora_A(h))) * self.scaling  # in place, as the reference does
        return y.to(x.dtype)


def _linear(weight: Tensor) -> nn.Linear:
    """An nn.Linear around an existing tensor; a Parameter stays the same Parameter."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    return linear


def relative_error(got: Tensor, oracle: Tensor) -> float:
    """Frobenius norm of the difference over that of the oracle; NaN counts as infinite."""
    if oracle.numel() == 0:
        return 0.0
    error = (got.double() - oracle.double()).norm() / oracle.double().norm().clamp(min=1e-300)
    return error.nan_to_num(nan=torch.inf).item()


def allowed_error(chain: Tensor, oracle: Tensor, dtype: torch.dtype) -> float:
    """The accuracy rule: at most twice the error of the unfused torch chain in the same dtype, plus a floor.

    The floor is one rounding, for results so small that the chain may be exact by luck (four in fp64, where the
    oracle rounds as well).
    """
    return 2 * relative_error(chain, oracle) + torch.finfo(dtype).eps * (4 if dtype == torch.float64 else 1)
