"""Training several adapters of a bank at once, each as if it were trained alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..indexed import plain_tensors
from ..recipe import is_number
from .slots import Source, split

if TYPE_CHECKING:
    from ..linear import LoraXSLinear
    from .adapter_bank import AdapterBank


class Training(AbstractContextManager):
    """The adapters that `AdapterBank.train` trains, until `close`, which the end of a `with` block calls.

    Attributes:
        names: of the n adapters, in the order in which `parameters` have them.
        parameters: for each module of the bank, in order, a Parameter (n, r, r), fp32, with R of every adapter.  Any
            optimizer takes them.  But an ordinary optimizer also changes adapters that no sample of the batch used, by
            weight decay and by their moments.  The optimizer that `optimizer` makes does not.

    A sample's gradient reaches only the R of its own adapter.  An adapter trains as it would if it were trained alone
    if the loss is a sum over the adapters, each term of which is the loss of that adapter's own samples (their mean,
    if the loss of a batch is a mean).  A GradScaler looks at all adapters together: if one of them has gradients that
    are not finite, the step is skipped for all.
    """

    def __init__(self, bank: AdapterBank, layers: Sequence[LoraXSLinear], names: Sequence[str], create: bool) -> None:
        self.bank, self.names, self.n = bank, tuple(names), len(names)
        devices = {layer.A.device for layer in layers}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"model: has adapted layers on several devices ({found}), must have all on one to train")
        self.device = devices.pop()
        with plain_tensors():
            self._records = torch.empty(self.n, bank.size, dtype=torch.float32, device=self.device)
        # The SHA-256 of each record as it was read or written here last.
        self._read: dict[str, bytes | None] = dict.fromkeys(self.names)
        for name, record in zip(self.names, self._records, strict=True):
            if name in bank:
                self._read |= bank.digests([name])
                stored, alphas = bank.record(name)
                if alphas != bank.alphas:
                    raise ValueError(
                        f"names: adapter {name!r} has a different alpha than the bank, so that its gradients would be "
                        "scaled wrongly; must have the bank's alpha to be trained in it"
                    )
                matrices = stored.values()
            elif create:
                matrices = [layer.recipe.initial_R(layer.rank, layer.init_std) for layer in layers]
            else:
                raise KeyError(f"names: the bank {bank.path} has no adapter {name!r}; create=True begins a new one")
            record.copy_(torch.cat([R.flatten() for R in matrices]))
        with plain_tensors():
            views = split(self._records, [rank for _, rank in bank.modules])  # a record is contiguous
        self.parameters = [nn.Parameter(R) for R in views]
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
        """torch's AdamW, with moments, step count, learning rate and clipping for each adapter by itself.

        Args:
            lr: for all adapters, or {name: lr} for each.  A scheduler of torch changes the largest; the others keep
                their ratio to it.
            betas, eps, weight_decay: as in torch.optim.AdamW, whose default weight_decay is 0.01.
            max_norm: the gradient of each adapter, over all modules, is scaled down to at most this 2-norm; None:
                never.

        A step changes only the adapters that have a gradient, and leaves no gradient: Trainer, which calls zero_grad of
        the model alone, may have a model that only holds the bank's.
        """
        return AdapterAdamW(self, lr, betas=betas, eps=eps, weight_decay=weight_decay, max_norm=max_norm)

    def commit(self, names: Sequence[str] | None = None) -> None:
        """Write these adapters, or all, to the bank as they are now, in one transaction, rounded to the bank's dtype.

        Adapters that are as they were read are left alone.  Raises ValueError, naming the adapter, if R has NaN or Inf
        values, or if another has changed or removed the adapter in the bank meanwhile; nothing is written then.
        """
        self.check_open()
        if isinstance(names, str):
            raise TypeError(f"names: got {names!r}, must be a list of names")
        modules = [name for name, _ in self.bank.modules]
        of = {
            name: {module: R.detach()[self._place(name)] for module, R in zip(modules, self.parameters, strict=True)}
            for name in (self.names if names is None else names)
        }
        self._read |= self.bank._put(of, True, self._read)

    def zero_grad(self) -> None:
        """Set the gradients to None, as zero_grad of the model does, too."""
        for R in self.parameters:
            R.grad = None

    def check_open(self) -> None:
        """Raise a RuntimeError after `close`."""
        if self.bank._training is not self:
            raise RuntimeError("this training is closed, and its adapters are those of the bank again")

    def close(self) -> None:
        """End the training: selections use the bank's records again.  What was not committed is lost."""
        if self.bank._training is self:
            self.bank._training = None

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
            raise ValueError(
                f"adapter_ids: got {other!r}, which is not in training, beside adapters that are; must be only "
                "adapters in training, or none of them"
            )
        return slots

    def bring(self, names: Sequence[str], used: Collection[int], changing: bool = False) -> dict[str, int]:
        self.check_open()
        return {name: self._place(name) for name in names}

    def release(self) -> None:
        pass

    def state(self, names: Iterable[str]) -> dict[str, tuple[int, bytes | None]]:
        return {name: (self._place(name), None) for name in names}  # they stay where they are

    def table(self, module: int, device: torch.device) -> Tensor:
        if device != self.device:
            raise RuntimeError(f"model: was moved to {device} while adapters train on {self.device}")
        return self.parameters[module]


class AdapterAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101, as torch.optim.AdamW) whose state and step count are each adapter's own.

    A step changes the adapters that have a gradient, and only those.  The others, whose gradient is zero everywhere,
    keep their values, moments and counts, where AdamW would decay and go on moving them.  `Training.optimizer` makes
    it, and describes its arguments.
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
            if wrong := sorted(map(repr, lr.keys() ^ set(training.names))):
                raise ValueError(f"lr: {wrong[0]} is in only one of lr and the adapters trained, must be in both")
            rates = [lr[name] for name in training.names]
        else:
            rates = [lr] * training.n
        if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
            raise ValueError(f"betas: got {betas!r}, must be two numbers")
        numbers = {"lr": rates, "betas": betas, "eps": [eps], "weight_decay": [weight_decay]}
        numbers["max_norm"] = [] if max_norm is None else [max_norm]
        for argument, values in numbers.items():
            for value in values:
                if not is_number(value) or value < 0 or (argument == "betas" and value >= 1):
                    raise ValueError(f"{argument}: got {value!r}, must be a number of at least 0, below 1 for betas")
        largest, self._training = max(rates), training
        ratios = [rate / largest if largest else 1.0 for rate in rates]
        defaults = {"lr": float(largest), "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        own = {"max_norm": max_norm, "names": list(training.names), "ratios": ratios}
        super().__init__(training.parameters, defaults | own)

    def add_param_group(self, group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ValueError("param_group: this optimizer takes only the adapters, use another one beside it")
        super().add_param_group(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from another run's state, with its rates and, once it has made a step, its R.

        So a checkpoint that holds an optimizer's state and no R, as Trainer's do, is complete.  ValueError for other
        adapters, another order of them, or those of another bank.
        """
        training = self._training
        training.check_open()
        theirs, ours = state_dict["param_groups"][0].get("names"), list(training.names)
        if theirs != ours:
            raise ValueError(f"state_dict: is of the adapters {theirs}, must be of {ours}")
        must = training._records.shape
        if any(getattr(each.get("R"), "shape", None) != must for each in state_dict["state"].values()):
            raise ValueError(
                f"state_dict: has no R of shape {tuple(must)}, must be of adapters of this bank, and of a version of "
                "this library that saves R"
            )
        super().load_state_dict(state_dict)
        for state in self.state.values():  # torch moves all but "step", as of a file that was read into memory
            state["step"] = state["step"].to(training.device)
            with torch.no_grad():
                state["R"] = training._records.copy_(state["R"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        training, group, p = self._training, self.param_groups[0], self._training._records
        training.check_open()
        if all(R.grad is None for R in training.parameters):
            return loss
        starts = (p.data_ptr() + 4 * place.start for place in training.bank.places.values())
        if any(R.data_ptr() != at for R, at in zip(training.parameters, starts, strict=True)):
            raise RuntimeError("parameters: their memory was replaced (by .data or .to), must be written in place")
        state = self.state[training.parameters[0]]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] = torch.zeros(training.n, dtype=torch.float64, device=p.device)
        state["R"] = p  # not a copy, as of a state that was moved to the CPU and back
        gradients = [torch.zeros_like(R) if R.grad is None else R.grad for R in training.parameters]
        g = torch.cat([each.flatten(1) for each in gradients], dim=1)
        there = (g != 0).any(dim=1)
        if group["max_norm"] is not None:
            g *= (group["max_norm"] / (g.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
        count = state["step"] + there
        lr = group["lr"] * torch.tensor(group["ratios"], dtype=torch.float64, device=p.device)
        beta1, beta2 = group["betas"]

        def column(values: Tensor) -> Tensor:
            return values.to(p.dtype)[:, None]

        m = state["exp_avg"].lerp(g, 1 - beta1)
        v = (state["exp_avg_sq"] * beta2).addcmul_(g, g, value=1 - beta2)
        spread = v.sqrt().div_(column((1 - beta2**count).sqrt())).add_(group["eps"])
        moved = p * column(1 - lr * group["weight_decay"]) - column(lr / (1 - beta1**count)) * (m / spread)
        made = ((state["exp_avg"], m), (state["exp_avg_sq"], v), (p, moved))
        made = [(t, torch.where(there[:, None], new, t)) for t, new in made]  # what can fail has been done
        for t, new in (*made, (state["step"], count)):
            t.copy_(new)
        training.zero_grad()
        return loss
