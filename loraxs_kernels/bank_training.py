"""Training several adapters of a bank at once, each as if it were trained alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .bank_layers import Source, split
from .basis import is_number

if TYPE_CHECKING:
    from .bank import AdapterBank
    from .linear import LoRAXSLinear


class Training(AbstractContextManager):
    """The adapters that `AdapterBank.train` trains, until `close`, which the end of a `with` block calls.

    Attributes:
        names: of the adapters, in the order of the first dimension of everything here.
        parameters: for each module of the bank, in order, a Parameter (n, r, r) fp32 with R of every adapter; a list to
            hand to any optimizer, but one that treats all elements alike changes adapters that no sample used, by
            weight decay and by moments that go on.  `optimizer` makes one that does not.
        reached: the places of the adapters that backward passes have made gradients of since `optimizer` made a step or
            cleared the gradients.

    A sample's gradient reaches the R of its own adapter alone.  For each adapter to train as it would alone, the loss
    must be a sum over adapters of what each would have alone: the mean over its own samples, where that was a mean.
    """

    def __init__(self, bank: AdapterBank, layers: Sequence[LoRAXSLinear], names: Sequence[str], create: bool) -> None:
        self.bank, self.names, self.n = bank, tuple(names), len(names)
        devices = {layer.A.device for layer in layers}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"model: has adapted layers on several devices ({found}), must have all on one to train")
        self.device = devices.pop()
        ranks = [rank for _, rank in bank.modules]
        self._records = torch.empty(self.n, sum(rank * rank for rank in ranks), device=self.device)
        for name, record in zip(self.names, self._records, strict=True):
            if name in bank:
                if bank.record(name)[1] != bank.alphas:
                    raise ValueError(
                        f"names: adapter {name!r} has an alpha other than the bank's, by which its gradients would be "
                        "scaled otherwise than alone; must have the bank's to train"
                    )
                bank.read(name, record)
            elif create:
                parts = [layer.recipe.initial_R(layer.rank, layer.sigma).flatten() for layer in layers]
                record.copy_(torch.cat(parts))
            else:
                raise KeyError(f"names: the bank {bank.path} has no adapter {name!r}; create=True begins a new one")
        self.parameters = [nn.Parameter(R) for R in split(self._records, ranks)]  # views: one record is contiguous
        self.reached: set[int] = set()
        self._places = {name: place for place, name in enumerate(self.names)}

    def optimizer(
        self,
        lr: float | Mapping[str, float],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
    ) -> AdapterAdamW:
        """AdamW as torch has it, for each adapter by itself; see `AdapterAdamW`."""
        return AdapterAdamW(self, lr, betas=betas, eps=eps, weight_decay=weight_decay, max_norm=max_norm)

    def commit(self, names: Sequence[str] | None = None) -> None:
        """Write these adapters, or all, to the bank as they are now, in one transaction.

        Raises ValueError, naming adapter and module, where R has NaN or Inf values; nothing is written then.
        """
        modules = [name for name, _ in self.bank.modules]
        of = {
            name: {module: R.detach()[self._place(name)] for module, R in zip(modules, self.parameters, strict=True)}
            for name in (self.names if names is None else names)
        }
        self.bank.add_many(of, replace=True)

    def close(self) -> None:
        """End: selections use what the bank has again.  What was not committed is given up."""
        self.bank._end(self)

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _place(self, name: str) -> int:
        if name not in self._places:
            raise KeyError(f"names: {name!r} is not trained here")
        return self._places[name]

    # As the source of a selection.

    def source_of(self, names: Sequence[str | None], slots: Source) -> Source:
        """Where a selection of these names finds its R; ValueError where some are trained and others are not."""
        here = {name: name in self._places for name in names if name is not None}
        if all(here.values()):
            return self
        if any(here.values()):
            other = next(name for name, is_here in here.items() if not is_here)
            raise ValueError(f"adapter_ids: {other!r} is not trained and others of the batch are; must be all or none")
        return slots

    def bring(self, names: Sequence[str]) -> dict[str, int]:
        return {name: self._places[name] for name in names}

    def release(self, names: Sequence[str]) -> None:
        pass

    def holds(self, places: Mapping[str, int]) -> bool:
        return True

    def table(self, module: int, device: torch.device) -> Tensor:
        if device != self.device:
            raise RuntimeError(f"model: was moved to {device} while adapters train on {self.device}")
        return self.parameters[module]


class AdapterAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101, as torch.optim.AdamW) whose state and step count are each adapter's own.

    A step changes the adapters that backward passes have reached since the last one, and only those: the others keep
    their values, moments and counts, where AdamW would decay and go on moving them.

    Args:
        lr: for all, or for each name.  A scheduler of torch changes the largest, param_groups[0]["lr"]; the others
            keep their ratio to it.
        max_norm: each adapter's gradient, over all modules, is scaled down to at most this 2-norm, as
            clip_grad_norm_ does; None: never.
    """

    def __init__(
        self,
        training: Training,
        lr: float | Mapping[str, float],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_norm: float | None,
    ) -> None:
        if isinstance(lr, Mapping):
            if wrong := sorted(lr.keys() ^ set(training.names)):
                raise ValueError(f"lr: {wrong[0]!r} is in only one of lr and the adapters trained, must be in both")
            rates = [lr[name] for name in training.names]
        else:
            rates = [lr] * training.n
        numbers = {"lr": rates, "betas": betas, "eps": [eps], "weight_decay": [weight_decay]}
        numbers["max_norm"] = [] if max_norm is None else [max_norm]
        for argument, values in numbers.items():
            for value in values:
                if not is_number(value) or value < 0 or (argument == "betas" and value >= 1):
                    raise ValueError(f"{argument}: got {value!r}, must be a number of at least 0, below 1 for betas")
        largest = max(rates)
        self._ratios = torch.tensor([rate / largest if largest else 1.0 for rate in rates], dtype=torch.float64)
        self._training = training
        defaults = {
            "lr": float(largest),
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_norm": max_norm,
        }
        super().__init__(training.parameters, defaults)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._training.reached.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        training, group = self._training, self.param_groups[0]
        rows = sorted(training.reached)
        training.reached.clear()
        if not rows:
            return loss
        p, state = training._records, self.state[training.parameters[0]]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] = torch.zeros(training.n, dtype=torch.float64, device="cpu")
        at = torch.tensor(rows, device=p.device)
        gradients = [(R.new_zeros(R.shape) if R.grad is None else R.grad) for R in training.parameters]
        g = torch.cat([each.index_select(0, at).flatten(1) for each in gradients], dim=1)
        if group["max_norm"] is not None:
            g *= (group["max_norm"] / (g.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
        state["step"][rows] += 1
        count, lr = state["step"][rows], group["lr"] * self._ratios[rows]
        beta1, beta2 = group["betas"]

        def column(values: Tensor) -> Tensor:
            return values.to(p.device, p.dtype)[:, None]

        values, m, v = (t.index_select(0, at) for t in (p, state["exp_avg"], state["exp_avg_sq"]))
        values *= column(1 - lr * group["weight_decay"])
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        spread = v.sqrt().div_(column((1 - beta2**count).sqrt())).add_(group["eps"])
        values -= column(lr / (1 - beta1**count)) * (m / spread)
        for t, new in ((p, values), (state["exp_avg"], m), (state["exp_avg_sq"], v)):
            t.index_copy_(0, at, new)
        return loss
