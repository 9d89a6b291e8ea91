"""The ways to compute one adapted layer, side by side: what they are, how they are built, and whether they are right.

Every path gets the same operands and is checked against an fp64 oracle, by the accuracy rule of
`loraxs_kernels/reference.py`, before it is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from types import FunctionType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import backends, reference
from ..backends.torch import scaled_mm
from ..linear import LoraXSLinear
from ..ops import LowRankLinear
from ..padding import padded_rows
from .compare import errors, some
from .question import GREY, Path, earlier
from .timer import Call


@dataclass(frozen=True)
class Operands:
    """Random operands of one layer, y of order 1; s = 1/2, so that a path that forgets it is found out."""

    x: Tensor  # (T, K), requires grad
    gY: Tensor  # (T, N)
    W: Tensor  # (N, K)
    A: Tensor  # (r, K)
    R: Tensor  # (r, r), fp32
    B: Tensor  # (N, r), in padded rows, as layers keep it
    s: float = 0.5

    @classmethod
    def random(cls, T: int, N: int, K: int, r: int, dtype: torch.dtype, device: torch.device, seed: int) -> Operands:
        g = torch.Generator(device).manual_seed(seed)

        def rand(*shape: int, over: int = 1) -> Tensor:
            return (torch.randn(*shape, generator=g, device=device) / over**0.5).to(dtype)

        R = torch.randn(r, r, generator=g, device=device) / r**0.5
        x, gY, W, A, B = rand(T, K), rand(T, N), rand(N, K, over=K), rand(r, K, over=K), rand(N, r, over=r)
        return cls(x.requires_grad_(), gY, W, A, R, padded_rows(B))

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.x, self.gY, self.W, self.A, self.B))

    def linear(self) -> nn.Linear:
        """The frozen linear alone."""
        linear = nn.Linear(self.W.shape[1], self.W.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(self.W, requires_grad=False)
        return linear


@dataclass(frozen=True)
class Layer:
    """A built path: y = call(x); `trained` get gradients; what it computes is x W^T + s x (B R A)^T with `factors`."""

    call: Callable[[Tensor], Tensor]
    trained: tuple[Tensor, ...] = ()
    factors: tuple[Tensor, Tensor, Tensor] | None = None  # (A, R, B); None: no adapter
    s: float = 1.0


# `make` makes a layer on operands.  Ours in blues and greens, what people run today in warm colours, the floor black.
PATHS: dict[str, Path] = {}


def _path(name: str, colour: str, what: str, **more: Any) -> Callable[[Callable], Callable]:
    """The function below it is how the path is built."""

    def register(make: Callable[[Operands], Layer]) -> Callable[[Operands], Layer]:
        PATHS[name] = Path(name, colour, what, make=make, **more)
        return make

    return register


def _peft_has(config: str) -> str | None:
    if importlib.util.find_spec("peft") is None:
        return "the package peft is not installed"
    import peft

    return None if hasattr(peft, config) else f"peft {peft.__version__} has no {config}"


def fused(o: Operands, dtype: torch.dtype | None = None) -> LoraXSLinear:
    layer = LoraXSLinear.from_linear(o.linear(), o.R.shape[0], alpha=o.s * o.R.shape[0], init=(o.A, o.B), dtype=dtype)
    layer.R.data.copy_(o.R)
    return layer


@_path("frozen", "#000000", "the frozen linear alone: the floor")
def _frozen(o: Operands) -> Layer:
    return Layer(o.linear())


@_path("reference-fp32", "#a63603", "the reference layer as PEFT runs it: four ops, adapters upcast to fp32")
def _reference_fp32(o: Operands) -> Layer:
    return _reference(o, torch.float32)


@_path("reference", "#e6550d", "the reference layer: four ops, adapters in the weight's dtype")
def _reference(o: Operands, dtype: torch.dtype | None = None) -> Layer:
    layer = reference.UnfusedLinear(fused(o, dtype))
    layer.lora_latent.to(dtype or o.x.dtype)
    R = layer.lora_latent.weight
    return Layer(layer, (R,), (layer.lora_A.weight, R, layer.lora_B.weight), o.s)


@_path("addmm", "#b8860b", "y = x W^T, then the adapter added by a second GEMM (unsloth's way with LoRA)")
def _addmm(o: Operands) -> Layer:
    """In one autograd node."""
    R = o.R.to(o.x.dtype).requires_grad_()

    def primitive(x: Tensor, W: Tensor, A: Tensor, R: Tensor, B: Tensor, s: float, *more: Tensor | None) -> tuple:
        z, other = x @ A.t(), (more[2] if len(more) > 2 else None)  # a bias and `out` come first, and are None here
        gram = None if other is None else scaled_mm(z.t(), other, s, R)
        return F.linear(x, W).addmm_(z @ R.t(), B.t(), alpha=s), z, gram

    def call(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return LowRankLinear.apply(x, R, (o.W, o.A, o.B, o.s, None, None, "forward", primitive))[0]
        return primitive(x, o.W, o.A, R, o.B, o.s)[0]

    return Layer(call, (R,), (o.A, R, o.B), o.s)


def _in_own_code(call: FunctionType, **how: Any) -> Callable[..., Tensor]:
    """torch.compile of a function with a code object of its own.

    torch keeps its compilations by code object and only a few for each: calls of further sizes would run eagerly.
    """
    own = FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, **how)


@cache
def _chain(mode: str, *sizes: object) -> Callable[..., Tensor]:
    """For operands of these sizes."""

    def chain(x: Tensor, W: Tensor, A: Tensor, R: Tensor, B: Tensor, s: float) -> Tensor:
        return reference.lowrank_linear(x, W, A, R, B, s)[0]

    return _in_own_code(chain, mode=mode)  # without cudagraphs: graph mode measures those for every path alike


@_path("compile", "#8c6bb1", "torch.compile of the reference chain", run="all")
def _compiled(o: Operands, mode: str = "default") -> Layer:
    R, B = o.R.to(o.x.dtype).requires_grad_(), o.B.contiguous()
    chain = _chain(mode, *o.x.shape, *B.shape, o.x.dtype, o.x.device)
    return Layer(lambda x: chain(x, o.W, o.A, R, B, o.s), (R,), (o.A, R, B), o.s)


@_path("compile-max", "#4d004b", "torch.compile of the reference chain, max-autotune", run="all")
def _compiled_max(o: Operands) -> Layer:
    return _compiled(o, "max-autotune-no-cudagraphs")


def _peft_layer(o: Operands, config: Any) -> nn.Module:
    from peft import get_peft_model

    return get_peft_model(nn.Sequential(o.linear()), config).base_model.model[0]


@_path("peft-lora", "#d6616b", "PEFT's LoRA layer (A and B train)", missing=partial(_peft_has, "LoraConfig"))
def _peft_lora(o: Operands) -> Layer:
    """With PEFT's defaults: A and B are in fp32.  It starts with lora_A = R A, lora_B = B."""
    from peft import LoraConfig

    r = o.R.shape[0]
    layer = _peft_layer(o, LoraConfig(r=r, lora_alpha=o.s * r, target_modules=["0"]))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A.data.copy_(o.R @ o.A.float())
    B.data.copy_(o.B)
    return Layer(layer, (A, B), (A, torch.eye(r, device=A.device), B), o.s)


_TINY = "PEFT's TinyLoRA layer (R = sum v_i P_i)"


@_path("peft-tinylora", "#e7969c", _TINY, missing=partial(_peft_has, "TinyLoraConfig"))
def _peft_tinylora(o: Operands) -> Layer:
    """With PEFT's defaults: v trains, in fp32.  A and B are the operands'."""
    from peft import TinyLoraConfig
    from peft.tuners.tinylora.layer import TinyLoraLayer

    def given(layer: TinyLoraLayer, adapter: str, r: int, *_: object) -> None:  # in place of a full SVD of W
        layer.tinylora_A[adapter], layer.tinylora_B[adapter], layer.r[adapter] = o.A.clone(), o.B.clone(), r

    config = TinyLoraConfig(r=o.R.shape[0], target_modules=["0"], init_v_bound=0.2)
    with mock.patch.object(TinyLoraLayer, "_init_svd", given):
        layer = _peft_layer(o, config)
    v = next(p for p in layer.parameters() if p.requires_grad)
    factors = (layer.tinylora_A["default"], layer._compute_R("default").detach(), layer.tinylora_B["default"])
    return Layer(layer, (v,), factors)


_VERA = "PEFT's VeRA layer (random A and B, vectors d and b train)"


@_path("vera", "#7b4173", _VERA, run="all", missing=partial(_peft_has, "VeraConfig"))
def _vera(o: Operands) -> Layer:
    """With PEFT's defaults: d, b, A and B are in fp32.

    The adapter is diag(b) B diag(d) A, with random A and B that all layers share; here they are the operands'.
    """
    from peft import VeraConfig

    layer = _peft_layer(o, VeraConfig(r=o.R.shape[0], target_modules=["0"]))
    for shared, own in ((layer.vera_A, o.A), (layer.vera_B, o.B)):
        shared["default"] = own.to(shared["default"].dtype)
    d, b = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]
    d.data.copy_(o.R.diagonal() + 1)
    b.data.copy_(o.gY[0] + 1)
    return Layer(layer, (d, b), (o.A, d.detach().diag(), b.detach()[:, None] * o.B))


def _two(o: Operands, layer: Callable[[Operands], nn.Module], compiled: bool = True) -> Layer:
    """Two layers on one x, each with tensors of its own, and the mean of what they give: the same as one of them."""
    each = [layer(o), layer(replace(o, W=o.W.clone(), A=o.A.clone(), B=padded_rows(o.B.clone())))]

    def call(x: Tensor) -> Tensor:
        return (each[0](x) + each[1](x)) / 2

    Rs = tuple(p for one in each for p in one.parameters() if p.requires_grad)
    return Layer(_in_own_code(call) if compiled else call, Rs, (o.A, Rs[0], o.B) if Rs else None, o.s)


def _backend(o: Operands) -> Layer:
    layer = fused(o)
    return Layer(layer, (layer.R,), (o.A, layer.R, o.B), o.s)


_COLOURS = {"torch": "#1f77b4", "triton": "#17a398", "cuda": "#2ca02c"}
for _name in backends.NAMES:
    _what = f"LoraXSLinear on the {_name} backend"
    _what += ": expand first, then the base GEMM accumulates" * (_name == "torch")
    _where = {"missing": partial(backends.unavailable, _name), "within": partial(backends.backend, _name)}
    _path(_name, _COLOURS.get(_name, GREY), _what, **_where)(_backend)
_path("chosen", "#08519c", "LoraXSLinear as it is, on the backend that is chosen for each call", run="all")(_backend)
# Only for the question host.
_WHAT = "two frozen linears by torch.compile: its floor"
_path("two", "#6baed6", "two LoraXSLinear layers on one x", run="named")(partial(_two, layer=fused, compiled=False))
_path("two-compile", "#2171b5", "the same two by torch.compile", run="named")(partial(_two, layer=fused))
_path("two-frozen-compile", "#525252", _WHAT, run="named")(partial(_two, layer=Operands.linear))
_WHAT = "the same through the torch.library operator, called eagerly"
PATHS["operator"] = earlier("operator", "#9ecae1", _WHAT)


def calls(layers: list[Layer], sets: list[Operands], direction: str) -> list[Call]:
    """What is timed: forward (under no_grad), backward (of a kept graph) or both; gradients for x and `trained`."""

    def one(layer: Layer, o: Operands) -> Call:
        def forward() -> None:
            with torch.no_grad():
                layer.call(o.x)

        inputs = (o.x, *layer.trained)
        if direction == "forward":
            return forward
        if direction == "both":
            return lambda: torch.autograd.grad(layer.call(o.x), inputs, o.gY)
        y = layer.call(o.x)
        return lambda: torch.autograd.grad(y, inputs, o.gY, retain_graph=True)

    return list(map(one, layers, sets))


def forward_and_backward(layer: Layer, o: Operands) -> tuple[Tensor, ...]:
    """y, gX, and the gradient of each that trains."""
    y = layer.call(o.x)
    return y.detach(), *torch.autograd.grad(y, (o.x, *layer.trained), o.gY)


def layer_errors(layer: Layer, o: Operands) -> dict[str, dict[str, float]]:
    """The relative errors of y, gX and, if R itself trains, gR against the fp64 oracle, and what is allowed.

    y and gX are compared on rows spread over all of x, gR whole: its oracle is low-rank and costs little.
    """
    y, gX, *trained = forward_and_backward(layer, o)
    rows, r = some(o.x), o.R.shape[0]
    R_trains = layer.factors and len(trained) == 1 and trained[0].shape == (r, r)
    got = {"y": y[rows], "gX": gX[rows], "gR": trained[0] if R_trains else None}
    A_R_B, s = layer.factors, layer.s
    return errors(got, *(expected(o, A_R_B, s, rows, dtype) for dtype in (o.x.dtype, torch.float64)), o.x.dtype)


def expected(
    o: Operands, factors: tuple[Tensor, Tensor, Tensor] | None, s: float, rows: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """y and gX on some rows, and gR, from the specification, with every operand in `dtype`."""
    x, gY, W = (t.detach().to(dtype) for t in (o.x[rows], o.gY[rows], o.W))
    if factors is None:
        return {"y": x @ W.T, "gX": gY @ W}
    A, R, B = (t.detach().to(dtype) for t in factors)
    z, v = o.x.detach().to(dtype) @ A.T, o.gY.to(dtype) @ B
    return {
        "y": reference.lowrank_linear(x, W, A, R, B, s)[0],
        "gX": reference.lowrank_linear(gY, W.T, B.T, R.T, A.T, s)[0],
        "gR": s * (v.T @ z),
    }
