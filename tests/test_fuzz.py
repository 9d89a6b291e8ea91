"""Whatever a call is made of, its results and derivatives are right, or it is refused and nothing was written.

Hypothesis makes up the calls: sizes (none, too), dtypes, strides, views with the neg bit, `out` of every kind, what
trains, gradients of first and second order, of batches and in forward mode, vmap, autocast.  Where a call must not be
refused, an error fails the test.  The calls are the same each time; LORAXS_FUZZ=20000 makes up that many new ones, on
the backend that the process runs on (tests/conftest.py).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import fuzzing
import pytest
import torch
from helpers import EMULATED, INTERPRETED
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from loraxs_kernels import reference
from loraxs_kernels.functional import lora_xs_delta, lora_xs_linear

EXAMPLES = 200 if INTERPRETED else 500 if EMULATED else 1200
KERNELS = INTERPRETED or EMULATED

ROWS = [0, 1, 2, 3, 5, 17, 64, 70, 130]
FEATURES = [0, 1, 2, 3, 7, 8, 16, 33, 64, 129]
RANKS = [1, 2, 3, 4, 7, 8, 12, 16, 20, 25, 33]
LEADS = {(): 1, (3,): 3, (2, 3): 6, (2, 0): 0, (1, 5): 5, (2, 1, 2): 4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = ["contiguous", "transposed", "sliced", "expanded", "negated"]
# What `out` is, and whether it may be refused.
OUTS = {
    "none": False,
    "plain": False,
    "made": False,
    "sliced": False,
    "columns of another": False,
    "transposed": True,
    "a leaf": True,
    "one of two": True,
    "made under no_grad": True,
    "expanded": True,
    "negated": True,
    "x": True,
    "overlaps x": True,
}
MODES = ["grad", "grad", "grad", "no_grad", "inference", "autocast", "forward", "vmap", "batched"]


@st.composite
def cases(draw) -> dict[str, Any]:
    lead = draw(st.one_of(st.sampled_from([(T,) for T in ROWS]), st.sampled_from(list(LEADS))))
    case = {
        "lead": lead,
        "N": draw(st.sampled_from(FEATURES)),
        "K": draw(st.sampled_from(FEATURES)),
        "r": draw(st.sampled_from(RANKS)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "layouts": {name: draw(st.sampled_from(LAYOUTS)) for name in ("x", "W", "A", "R", "B", "bias", "gY")},
        "half R": draw(st.booleans()),
        "trains": draw(st.sets(st.sampled_from(["x", "R", "bias"]))),
        "W": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "out": "none",
        "mode": draw(st.sampled_from(MODES)),
        "order": draw(st.sampled_from([1, 1, 2, 2])),
        "seed": draw(st.integers(0, 2**16)),
    }
    if not case["W"]:
        case |= {"bias": False, "out": draw(st.sampled_from(list(OUTS)))}
    if not case["bias"]:
        case["trains"].discard("bias")
    return case


def laid(t: Tensor, layout: str) -> Tensor:
    """The same numbers in other memory; "expanded": those of its first row in all."""
    if layout == "transposed" and t.dim() > 1:
        return t.mT.contiguous().mT
    if layout == "sliced":
        wide = t.new_full((*(2 * n for n in t.shape[:-1]), t.shape[-1] + 3), 7.0)
        view = wide[(*(slice(None, None, 2),) * (t.dim() - 1), slice(1, 1 + t.shape[-1]))]
        return view.copy_(t)
    if layout == "expanded" and t.dim() > 1 and t.shape[0]:
        return t[:1].clone().expand(t.shape)
    return torch._neg_view(-t) if layout == "negated" else t


def make(case: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a call, those that train as leaves; base is what `out` is made of."""
    g = torch.Generator().manual_seed(case["seed"])
    dtype, lead, N, K, r = (case[name] for name in ("dtype", "lead", "N", "K", "r"))
    shapes = {"x": (*lead, K), "W": (N, K), "A": (r, K), "R": (r, r), "B": (N, r), "bias": (N,), "gY": (*lead, N)}
    tensors = {}
    for name, shape in shapes.items():
        t = torch.randn(shape, generator=g, dtype=torch.float64) / max(shape[-1], 1) ** 0.5
        wide = name == "R" and not case["half R"]
        t = t.to(torch.promote_types(dtype, torch.float32) if wide else dtype)
        t = laid(t, case["layouts"][name]).detach()
        tensors[name] = t.requires_grad_(name in case["trains"])
    if not case["W"]:
        del tensors["W"]
    if not case["bias"]:
        del tensors["bias"]
    tensors["base"] = torch.randn(*lead, N, generator=g, dtype=torch.float64).to(dtype)
    return tensors


def out_of(kind: str, base: Tensor, x: Tensor) -> Tensor | None:
    """`out` of a kind, with the numbers of base where it can have them."""
    if kind == "none" or (kind in ("x", "overlaps x") and (x.shape != base.shape or x.numel() == 0)):
        return None
    if kind == "x":
        return x
    if kind == "overlaps x":
        return x.detach().mT if x.dim() > 1 and x.shape[-1] == x.shape[-2] else None
    if kind == "made":
        return base.clone().requires_grad_() * 1
    if kind == "a leaf":
        return base.clone().requires_grad_()
    if kind == "one of two":
        return torch.cat([base, base]).requires_grad_().mul(1).chunk(2)[0] if base.dim() > 1 else base.clone()
    if kind == "made under no_grad":
        made = base.clone().requires_grad_() * 1
        with torch.no_grad():
            return made[...]
    if kind == "columns of another":
        return torch.cat([base, base, base], dim=-1)[..., base.shape[-1] : 2 * base.shape[-1]]
    return laid(base.clone(), kind)


def ours(t: dict[str, Tensor], x: Tensor, out: Tensor | None) -> Tensor:
    if "W" in t:
        return lora_xs_linear(x, t["W"], t["A"], t["R"], t["B"], 0.75, t.get("bias"))
    return lora_xs_delta(x, t["A"], t["R"], t["B"], 0.75, out=out)


def chain(t: dict[str, Tensor], x: Tensor, out: Tensor | None) -> Tensor:
    """In separate torch ops, in one dtype: that of x, under autocast bf16."""
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") and x.dtype is not torch.float64 else x.dtype
    with torch.autocast("cpu", enabled=False):
        operands = {name: a.to(dtype) for name, a in t.items() if name != "gY"} | {"x": x.to(dtype), "s": 0.75}
        y = reference.lowrank_linear(**({"W": None} | operands))[0]
        return y if out is None else out + y


def results(call, case: dict[str, Any], t: dict[str, Tensor], out: Tensor | None) -> dict[str, Tensor]:
    """What comes out of the call, and of its derivatives in the case's mode."""
    mode, x, gY = case["mode"], t["x"], t["gY"]
    if mode == "forward":
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(t[name].clone(), t[name].flip(0)) for name in ("x", "R")}
            y = call(t | duals, duals["x"], out)
            value, tangent = forward_ad.unpack_dual(y)
            return {"y": value, "tangent": torch.zeros_like(value) if tangent is None else tangent}
    if mode == "vmap":
        return {"y": torch.vmap(lambda x: call(t, x, None))(torch.stack([x, -x]))}
    contexts = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    with torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else contexts.get(mode, nullcontext)():
        y = call(t, x, out)
    found = {"y": y.detach()}
    inputs = {name: t[name] for name in sorted(case["trains"])}
    if mode in contexts or not inputs:
        return found
    gY = gY.to(y.dtype)
    if mode == "batched":
        gY = torch.stack([gY, 2 * gY])
    gY.requires_grad_(case["order"] == 2)
    how = {"create_graph": case["order"] == 2, "is_grads_batched": mode == "batched"}
    first = torch.autograd.grad(y, [*inputs.values()], gY, **how)
    found |= {f"g{name}": g.detach() for name, g in zip(inputs, first, strict=True)}
    if case["order"] == 2:
        inputs["gY"] = gY
        # Of positive numbers these are sums of positive numbers, which `size` below counts on.
        penalty = sum((g * t[name].detach()).sum() for name, g in zip(inputs, first, strict=False))
        if penalty.requires_grad or y.numel():  # without elements torch's own writes to views leave no graph
            second = torch.autograd.grad(penalty, [*inputs.values()], materialize_grads=True)
            found |= {f"second {name}": g for name, g in zip(inputs, second, strict=True)}
    return found


def may_be_refused(case: dict[str, Any]) -> bool:
    autocast_out = case["mode"] == "autocast" and case["out"] != "none"  # which is not in bf16
    not_rows = case["out"] == "sliced" and len(case["lead"]) > 1
    return OUTS[case["out"]] or not_rows or autocast_out or (case["mode"] == "batched" and KERNELS)


def copied(t: dict[str, Tensor], to) -> dict[str, Tensor]:
    return {name: to(a.detach().clone()).requires_grad_(a.requires_grad) for name, a in t.items()}


@fuzzing.cases(EXAMPLES)
@given(cases())
@pytest.mark.filterwarnings("ignore")
def test_right_or_refused(case):
    t = make(case)
    out = out_of(case["out"], t.pop("base"), t["x"])
    given_out = None if out is None else out.detach().clone()
    before = copied(t, lambda a: a)
    returned = []

    def call(*operands) -> Tensor:
        returned.append(ours(*operands))
        return returned[0]

    try:
        got = results(call, case, t, out)
    except (ValueError, TypeError, RuntimeError) as refusal:
        event("refused")
        assert may_be_refused(case), f"refused: {refusal}"
        assert "lora_xs" in str(refusal) or "out:" in str(refusal) or "x: got" in str(refusal), refusal
        assert returned or out is None or torch.equal(out, given_out), "out was written by a call that was refused"
        return
    event(case["mode"])
    kept = [name for name in t if not (name == "x" and case["out"] in ("x", "overlaps x"))]
    assert all(torch.equal(t[name], before[name]) for name in kept), "an operand was written"

    half = case["dtype"] if case["mode"] != "autocast" or case["dtype"] is torch.float64 else torch.bfloat16

    def expected(to) -> dict[str, Tensor]:
        return results(chain, case, copied(before, to), None if given_out is None else to(given_out))

    near, exact, size = (expected(to) for to in (lambda a: a, lambda a: a.double(), lambda a: a.double().abs()))
    for name, value in got.items():
        error, allowed = ((a.double() - exact[name].double()).norm() for a in (value, near[name]))
        floor = torch.finfo(half).eps * (8 if half is torch.float64 else 2)  # the oracle is fp64 and rounds as well
        allowed = 2 * allowed + floor * size[name].double().norm()
        assert value.shape == exact[name].shape, name
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"
