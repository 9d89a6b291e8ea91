"""How large the R of a model and their deltas are, and whether R gets gradients."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...linear import LoraXSLinear, makers_of_R
from ...matching import is_peft_layer
from ...sharding import whole
from ...weights import weight_of


@dataclass
class Adapter:
    """One adapter, from `attach` or of the PEFT method."""

    name: str
    layer: LoraXSLinear
    R: Callable[[], Tensor]  # as it is now
    trained: list[nn.Parameter]  # R, or what a parametrization makes it of


def adapters_of(model: nn.Module) -> list[Adapter]:
    found = []
    for name, m in model.named_modules():
        if isinstance(m, LoraXSLinear):
            trained = [p for p in makers_of_R(m) if p.requires_grad]
            found.append(Adapter(name, m, functools.partial(getattr, m, "R"), trained))
        elif is_peft_layer(m):
            for each in (each for each in m.active_adapters if each in m.loraxs_R):
                R = functools.partial(m.loraxs_R.__getitem__, each)
                found.append(Adapter(f"{name}.{each}", m.adapter(each), R, [p for p in [R()] if p.requires_grad]))
    return found


class Sizes:
    """|R| and |s B R A| / |W| of all adapters; A A^T, B^T B and |W| never change and are computed once.

    |B R A|_F^2 = tr(R^T (B^T B) R (A A^T)), where every matrix is r x r.
    """

    @torch.no_grad()
    def __init__(self, adapters: list[Adapter]) -> None:
        self.groups: dict[tuple, list[tuple[Adapter, Tensor, Tensor, Tensor]]] = {}
        for adapter in adapters:
            layer = adapter.layer
            A, B = layer.A.double(), layer.B.double()
            try:
                W = weight_of(layer.base_layer, layer.label).read()
            except TypeError:  # A and B can be given to a layer whose weight cannot be read
                size = A.new_tensor(torch.nan)
            else:
                size = torch.linalg.vector_norm(W, dtype=torch.float64)
                size = size.where(size > 0, torch.nan)
            record = (adapter, A @ A.t(), B.t() @ B, abs(layer.scaling) / size.to(A.device))
            self.groups.setdefault((layer.rank, A.device), []).append(record)

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        squares, ratios = [], []
        for group in self.groups.values():
            adapters, *columns = zip(*group, strict=True)
            R = torch.stack([whole(adapter.R()).double() for adapter in adapters])
            G_A, G_B, scale = map(torch.stack, columns)
            squares.append(R.square().sum().cpu())
            deltas = (R.mT @ G_B @ R * G_A).sum((1, 2)).clamp(min=0).sqrt()
            ratios.append((deltas * scale)[~scale.isnan()].cpu())
        ratios = torch.cat(ratios)
        figures = {"loraxs_R_norm": float(sum(squares).sqrt())}
        if len(ratios):
            figures |= {"loraxs_delta_mean": float(ratios.mean()), "loraxs_delta_max": float(ratios.max())}
        return figures


def check_gradients(adapters: list[Adapter]) -> None:
    """RuntimeError if no R has a gradient: only a head would train then, and the loss might fall all the same."""
    trained = [adapter for adapter in adapters if adapter.trained]
    without = [adapter.name for adapter in trained if all(p.grad is None for p in adapter.trained)]
    if trained and len(without) == len(trained):
        raise RuntimeError(
            "model: no R got a gradient in the first step. The cause may be reentrant gradient checkpointing of layers "
            'whose inputs do not require grad: use gradient_checkpointing_kwargs={"use_reentrant": False}, or make '
            "the embeddings' output require grad"
        )
    if without:
        warnings.warn(
            f"model: R of {len(without)} of {len(trained)} modules, the first {without[0]!r}, got no gradient in the "
            "first step (normal for experts that no token has reached)",
            stacklevel=3,
        )
