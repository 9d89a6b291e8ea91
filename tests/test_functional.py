"""lora_xs_linear and lora_xs_delta against an fp64 oracle, in every dtype, shape and layout, and their contracts."""

from __future__ import annotations

import gc
import importlib
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import (
    DTYPES,
    EMULATED,
    INTERPRETED,
    LAYOUTS,
    SHAPES,
    Operands,
    assert_accurate,
    gradients,
    operands,
    oracle_gradients,
    unfused,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from loraxs_kernels import LoraXSLinear, backends, forward_together, functional, ops, reference, together
from loraxs_kernels.backends import torch as torch_backend
from loraxs_kernels.backends.device import _Runs
from loraxs_kernels.functional import lora_xs_delta, lora_xs_linear
from loraxs_kernels.indexed import RowIndex


def check_against_oracle(o: Operands, call=lora_xs_linear, bias: bool = True) -> None:
    dtype = o.x.dtype
    got, chain = gradients(o, call, bias), gradients(o, unfused, bias)
    oracle = oracle_gradients(o, bias)
    assert got[0].dtype == got[1].dtype == dtype and got[2].dtype == o.R.dtype
    for name, *three in zip(("y", "gX", "gR"), got, chain, oracle, strict=True):
        assert_accurate(*three, dtype, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_dtype(shape, dtype):
    check_against_oracle(operands(*shape, dtype), bias=shape[0] % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout(layout, dtype):
    check_against_oracle(operands(17, 33, 65, 12, dtype, layout))


@pytest.mark.parametrize("shape", [(64, 48, 96, 25), (300, 8, 1024, 64), (130, 8, 4100, 20)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_z_is_fp32_whatever_the_operands(shape, layout):
    """Not just by its dtype: small products and, past _LARGE, large ones have far more than bf16's 8 bits."""
    o = operands(*shape, torch.bfloat16, layout)
    for x, A in ((o.x, o.A), (o.gY, o.B.t())):
        z = torch_backend.shrink(x, A.t())
        assert z.dtype == torch.float32
        assert reference.relative_error(z, x.double() @ A.double().T) < 1e-5


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu(f"{name} backend")) for name in backends.NAMES])
def on_gpu(request):
    """Each backend that can run on this GPU, forced."""
    if reason := backends.unavailable(request.param):
        pytest.skip(f"{request.param} backend: {reason}")
    with backends.backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 1024, 4096, 64), (2100, 4096, 1024, 256)], ids=str)
def test_every_shape_and_dtype_on_a_gpu(on_gpu, shape, dtype):
    check_against_oracle(operands(*shape, dtype, device="cuda"), bias=shape[0] % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout_on_a_gpu(on_gpu, layout, dtype):
    check_against_oracle(operands(17, 33, 65, 12, dtype, layout, "cuda"))


# Layers of Mistral-7B, Llama-3-8B and RoBERTa-large, the paper's ranks, few rows and many.
REAL = [
    (8192, 4096, 4096, 64),
    (4100, 1024, 4096, 25),
    (2048, 4096, 14336, 128),
    (512, 14336, 4096, 16),
    (77, 4096, 1024, 12),
    (1, 1024, 1024, 4),
]


@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_shapes_on_a_gpu(on_gpu, shape):
    check_against_oracle(operands(*shape, torch.bfloat16, device="cuda"), bias=shape[1] == 1024)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_fp32_on_a_gpu_follows_torchs_setting(on_gpu, precision):
    """The chain of the accuracy rule follows it too: "highest" leaves no room for TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    # Which products of the chain take TF32 is the library's to decide: allow what TF32 does.
    extra = 2**-10 if precision == "high" else 0.0
    try:
        for r in (16, 64):
            o = operands(300, 512, 1024, r, device="cuda")
            results = gradients(o, lora_xs_linear), gradients(o, unfused), gradients(o.to(torch.float64), unfused)
            for got, chain, oracle in zip(*results, strict=True):
                allowed = reference.allowed_error(chain, oracle, torch.float32) + extra
                assert reference.relative_error(got, oracle) <= allowed
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("T", [17, 9000])
def test_delta_into_out_on_a_gpu(on_gpu, T):
    check_delta(operands(T, 320, 640, 20, torch.bfloat16, device="cuda"))


def test_more_than_2_31_elements_on_a_gpu(on_gpu):
    """The last rows of x and gX, whose offsets need 64 bits."""
    T, o = 2**31 // 4096 + 64, operands(64, 64, 4096, 16, torch.bfloat16, device="cuda")
    x = torch.zeros(T, 4096, dtype=torch.bfloat16, device="cuda")
    x[-64:] = o.x
    gY = torch.zeros(T, 64, dtype=torch.bfloat16, device="cuda")
    gY[-64:] = o.gY
    R = o.R.requires_grad_()
    y = lora_xs_linear(x.requires_grad_(), o.W, o.A, R, o.B, o.s)
    gX, gR = torch.autograd.grad(y, (x, R), gY)
    oracle = gradients(o.to(torch.float64), unfused, bias=False)
    for got, chain, right in zip((y[-64:], gX[-64:], gR), gradients(o, unfused, bias=False), oracle, strict=True):
        assert_accurate(got.detach(), chain, right, torch.bfloat16)
    assert not y[:-64].any() and not gX[:-64].any()


def test_same_bits_on_a_gpu_in_a_graph_and_on_another_stream(on_gpu):
    o = operands(130, 257, 129, 20, torch.bfloat16, device="cuda")
    expected = gradients(o, lora_xs_linear)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        elsewhere = gradients(o, lora_xs_linear)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(o, lora_xs_linear)
    for t in captured:
        t.fill_(float("nan"))  # whatever is there afterwards, the replay has written
    graph.replay()
    for a, b, c in zip(expected, elsewhere, captured, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from(LAYOUTS))
def test_any_shape(T, N, K, r, layout):
    o = operands(T, N, K, r, torch.float64, layout)
    for got, expected in zip(gradients(o, lora_xs_linear), gradients(o, unfused), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
def test_leading_dimensions(lead):
    o = operands(1, 5, 7, 3)
    x = torch.randn(*lead, 7)
    y = lora_xs_linear(x, o.W, o.A, o.R, o.B, o.s, o.bias)
    assert y.shape == (*lead, 5)
    torch.testing.assert_close(y, unfused(x, o.W, o.A, o.R, o.B, o.s, o.bias))


@pytest.mark.parametrize("N", [0, 5])
@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 7), (2, 0, 0), (0,), (7,), (4, 7)], ids=str)
def test_features_that_are_none(shape, N):
    o = operands(1, N, shape[-1], 3)
    x, R = torch.randn(shape, requires_grad=True), o.R.requires_grad_()
    for W, out in ((o.W, None), (None, None), (None, torch.ones(*shape[:-1], N))):
        expected = unfused(x, W, o.A, R, o.B, o.s) + (0 if out is None else out)
        y = lora_xs_linear(x, W, o.A, R, o.B, o.s) if W is not None else lora_xs_delta(x, o.A, R, o.B, o.s, out=out)
        torch.testing.assert_close(y, expected)
        for got, right in zip(*(torch.autograd.grad(each.sum(), (x, R)) for each in (y, expected)), strict=True):
            torch.testing.assert_close(got, right)


def test_non_contiguous_3d_x_with_gradient():
    o = operands(1, 5, 7, 3)
    x = torch.randn(4, 7, 2).transpose(1, 2).requires_grad_()
    gX = torch.autograd.grad(lora_xs_linear(x, o.W, o.A, o.R, o.B, o.s).square().sum(), x)[0]
    expected = torch.autograd.grad(unfused(x, o.W, o.A, o.R, o.B, o.s).square().sum(), x)[0]
    torch.testing.assert_close(gX, expected)


@pytest.mark.parametrize("bias_trains", [False, True])
def test_gradcheck(bias_trains):
    o = operands(5, 4, 6, 3, torch.float64)
    inputs = [o.x.requires_grad_(), o.R.requires_grad_()] + [o.bias.requires_grad_()] * bias_trains
    assert torch.autograd.gradcheck(lambda x, R, b=o.bias: lora_xs_linear(x, o.W, o.A, R, o.B, o.s, b), inputs)


def test_gradcheck_of_the_delta_in_place():
    o = operands(5, 4, 6, 3, torch.float64)
    base = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, R, b: lora_xs_delta(x, o.A, R, o.B, o.s, out=b * 2),
        (o.x.requires_grad_(), o.R.requires_grad_(), base),
    )


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("base_grad", [False, True])
@pytest.mark.parametrize("view", [False, True])
def test_delta_adds_into_out_and_returns_it(shape, base_grad, view):
    o = operands(6, 5, 7, 3)
    x = o.x.view(*shape[:-1], 7)
    base = torch.randn(shape, requires_grad=base_grad)
    out = torch.cat([base, base], dim=-1)[..., :5] if view else base * 1
    y = lora_xs_delta(x, o.A, o.R.requires_grad_(), o.B, o.s, out=out)
    assert y is out
    expected = base + unfused(x, None, o.A, o.R, o.B, o.s)
    torch.testing.assert_close(y, expected)
    wanted = (o.R, base) if base_grad else (o.R,)
    for got, right in zip(
        torch.autograd.grad(y.square().sum(), wanted), torch.autograd.grad(expected.square().sum(), wanted), strict=True
    ):
        torch.testing.assert_close(got, right)


def check_delta(o: Operands) -> None:
    def into(x, W, A, R, B, s, bias):
        return lora_xs_delta(x, A, R, B, s, out=o.gY.clone())

    def added(o: Operands):
        return lambda x, W, A, R, B, s, bias: o.gY + unfused(x, None, A, R, B, s)

    exact = o.to(torch.float64)
    results = gradients(o, into), gradients(o, added(o)), gradients(exact, added(exact))
    for got, chain, oracle in zip(*results, strict=True):
        assert_accurate(got, chain, oracle, o.x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_delta_into_out(dtype):
    check_delta(operands(17, 33, 65, 12, dtype))


def test_delta_alone_matches_the_primitive_without_W():
    o = operands(17, 33, 65, 12)
    call = lambda x, W, A, R, B, s, b: lora_xs_delta(x, A, R, B, s)  # noqa: E731
    got = gradients(o, call)
    expected = gradients(o, lambda x, W, A, R, B, s, b: unfused(x, None, A, R, B, s))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


def saved_tensors(fn) -> list[torch.Tensor]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fn()
    return saved


def test_only_z_is_kept_for_backward_besides_references():
    o = operands(50, 33, 65, 4)
    x, R = o.x.requires_grad_(), o.R.requires_grad_()
    frozen = {t.data_ptr() for t in (o.W, o.A, R, o.B)}
    own = [t for t in saved_tensors(lambda: lora_xs_linear(x, o.W, o.A, R, o.B, o.s)) if t.data_ptr() not in frozen]
    assert [(tuple(t.shape), t.dtype) for t in own] == [((50, 4), torch.float32)]
    own = [t for t in saved_tensors(lambda: lora_xs_linear(x, o.W, o.A, R.detach(), o.B, o.s))]
    assert {t.data_ptr() for t in own} <= frozen  # a frozen R needs no z


@pytest.mark.parametrize("how", ["checkpoint", "save_on_cpu"])
def test_no_copy_of_a_weight_outlives_the_forward_where_hooks_take_it(how):
    """autocast makes one of each; the library itself holds on to none."""
    o, copies = operands(17, 33, 65, 12), []
    x, R = o.x.requires_grad_(), o.R.requires_grad_()

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and out.shape in (o.W.shape, o.A.shape, o.B.shape):
                copies.append(StorageWeakRef(out.untyped_storage()))
            return out

    def call(x):
        return lora_xs_linear(x, o.W, o.A, R, o.B, o.s)

    with torch.autocast("cpu", torch.bfloat16), Casts():
        if how == "checkpoint":
            y = checkpoint(call, x, use_reentrant=False)
        else:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.shape, torch.zeros):
                y = call(x)
    gc.collect()  # the cycles of Triton's interpreter
    assert y.requires_grad and len(copies) == 3 and all(copy.expired() for copy in copies)


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the matrix products by the shape of their result."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "mm" in func.__name__:
            self.products.append(tuple(out.shape))
        return out


def test_needs_input_grad_is_honoured():
    o = operands(50, 33, 65, 4)
    R = o.R.requires_grad_()
    y = lora_xs_linear(o.x, o.W, o.A, R, o.B, o.s)  # x needs no gradient
    with Counting() as counting:
        y.backward(o.gY)
    assert sorted(counting.products) == [(4, 4), (50, 4)]  # gR and v = gY B, and no gX
    y = lora_xs_linear(o.x.requires_grad_(), o.W, o.A, R.detach(), o.B, o.s)  # R is frozen
    with Counting() as counting:
        y.backward(o.gY)
    assert (4, 4) not in counting.products


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """The operators that are dispatched, in order, views among them."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten" and func is not torch.ops.aten.detach.default:
            self.names.append(func.__name__.removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def test_a_step_of_a_layer_dispatches_no_operator_too_many():
    """Each costs the host a microsecond or more: the time of a small layer."""
    o = operands(3, 5, 7, 2)
    call, x, R = layer_of(o), o.x.requires_grad_(), o.R.requires_grad_()
    with backends.backend("torch"), Operators() as forward:
        y = call(x, R)
    assert forward.names == ["t"] * 4 + ["mm", "addmm", "addmm", "addmm_"]
    with Operators() as backward:
        torch.autograd.grad(y, (x, R), o.gY)
    assert backward.names == ["mm", "addmm", "mm", "addmm_", "t", "addmm"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_how_many_kernels_the_torch_backend_launches_on_a_gpu(dtype):
    """Beside the base GEMM 3 in the forward and 4 in the backward; in 16 bits u is cast by one more.  No GPU needed."""
    half = dtype == torch.bfloat16
    if half and torch.__version__ < (2, 10):
        pytest.skip("this torch cannot trace torch.mm(out_dtype=)")
    with FakeTensorMode():
        o = operands(3, 5, 7, 2, dtype).to(dtype)
        x, W, A, B, gY = (torch.empty_like(t, device="cuda:0") for t in (o.x, o.W, o.A, o.B, o.gY))
        R = torch.empty(2, 2, device="cuda:0")
        with Operators() as forward:
            _, z, _ = torch_backend.lowrank_linear(x, W, A, R, B, o.s)
        with Operators() as backward:
            torch_backend.products(gY, W, B, R, A, o.s, other=z)
    kernels = ["mm.dtype", "addmm", "_to_copy", "mm", "addmm_"] if half else ["mm", "addmm", "mm", "addmm_"]
    assert [name for name in forward.names if name != "t"] == kernels
    assert [name for name in backward.names if name != "t"] == [*kernels, "addmm"]


def test_saved_and_incoming_tensors_are_never_written():
    o = operands(17, 33, 65, 12)
    before = o.to(torch.float32)
    x, R = o.x.requires_grad_(), o.R.requires_grad_()
    y = lora_xs_linear(x, o.W, o.A, R, o.B, o.s, o.bias)
    first = torch.autograd.grad(y, (x, R), o.gY, retain_graph=True)
    second = torch.autograd.grad(y, (x, R), o.gY)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for name in ("x", "W", "A", "R", "B", "bias", "gY"):
        assert torch.equal(getattr(o, name), getattr(before, name)), name


def test_R_changed_between_forward_and_backward_is_an_error():
    o = operands(17, 33, 65, 12)
    R = o.R.requires_grad_()
    y = lora_xs_linear(o.x.requires_grad_(), o.W, o.A, R, o.B, o.s)
    with torch.no_grad():
        R.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def second_gradients(o: Operands, call) -> tuple[torch.Tensor, ...]:
    """The gradients of <gX, p> + <gR, q> for gY, x and R, with p and q of order 1."""
    x, R, gY = (t.detach().requires_grad_() for t in (o.x, o.R, o.gY))
    gX, gR = torch.autograd.grad(call(x, o.W, o.A, R, o.B, o.s, None), (x, R), gY, create_graph=True)
    return torch.autograd.grad((gX * o.x.flip(0)).sum() + (gR * o.R.t().flip(0)).sum(), (gY, x, R))


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_derivatives(shape, dtype, delta):
    o = operands(*shape, dtype)

    def alone(call):
        return lambda x, W, A, R, B, s, bias: call(x, A, R, B, s)

    calls = (lora_xs_linear, unfused)
    if delta:
        calls = alone(lora_xs_delta), lambda x, W, A, R, B, s, bias: unfused(x, None, A, R, B, s)
    got, chain, oracle = second_gradients(o, calls[0]), second_gradients(o, calls[1]), None
    oracle = second_gradients(o.to(torch.float64), calls[1])
    for name, *three in zip(("of gY", "of x", "of R"), got, chain, oracle, strict=True):
        assert_accurate(*three, dtype, name)


def test_derivatives_of_every_order_also_into_a_view():
    o = operands(5, 4, 6, 3, torch.float64)
    base = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    inputs = o.x.requires_grad_(), o.R.requires_grad_(), o.bias.requires_grad_()

    def gradient_of_a_penalty(x, R, bias):
        y = lora_xs_linear(x, o.W, o.A, R, o.B, o.s, bias).tanh()
        return sum(g.square().sum() for g in torch.autograd.grad(y.sum(), (x, R), create_graph=True))

    assert torch.autograd.gradgradcheck(gradient_of_a_penalty, inputs)

    def into(x, R, base):
        return lora_xs_delta(x, o.A, R, o.B, o.s, out=(base * 2)[:, 2:6]).tanh()

    assert torch.autograd.gradgradcheck(into, (*inputs[:2], base))


def test_curvature_and_gradient_penalties_as_people_ask_for_them():
    """In all of these autograd follows only the paths to R, so that nothing that hangs elsewhere would be noticed."""
    o = operands(5, 4, 6, 3, torch.float64)
    loss = {call: lambda R, call=call: call(o.x, o.W, o.A, R, o.B, o.s, o.bias).tanh().square().sum()
            for call in (lora_xs_linear, unfused)}  # fmt: skip

    def penalty(call):
        x, R = o.x.detach().requires_grad_(), o.R.detach().requires_grad_()
        (gX,) = torch.autograd.grad(call(x, o.W, o.A, R, o.B, o.s, o.bias).sum(), x, create_graph=True)
        gX.square().sum().backward(inputs=[R])
        return R.grad

    def penalty_of_the_jacobian(call):
        R = o.R.detach().requires_grad_()

        def of(x):
            return call(x, o.W, o.A, R, o.B, o.s).tanh()

        J = torch.autograd.functional.jacobian(of, o.x, create_graph=True, vectorize=True)
        (of(o.x).sum() + J.square().sum()).backward()
        return R.grad

    asked = {
        "hvp": lambda call: torch.autograd.functional.hvp(loss[call], o.R, o.R.t())[1],
        "vhp": lambda call: torch.autograd.functional.vhp(loss[call], o.R, o.R.t())[1],
        "hessian": lambda call: torch.autograd.functional.hessian(loss[call], o.R),
        "vectorized hessian": lambda call: torch.autograd.functional.hessian(loss[call], o.R, vectorize=True),
        "penalty": penalty,
        "penalty of the Jacobian": penalty_of_the_jacobian,
    }
    for name, of in asked.items():
        assert of(unfused).norm() > 1, name
        torch.testing.assert_close(of(lora_xs_linear), of(unfused), msg=lambda text, name=name: f"{name}: {text}")


def test_exported_code_is_differentiable_again():
    o = operands(6, 5, 7, 3, torch.float64)

    class Layer(torch.nn.Module):
        def forward(self, x, R):
            return lora_xs_linear(x, o.W, o.A, R, o.B, o.s, o.bias)

    exported = torch.export.export(Layer(), (o.x, o.R)).module()
    results = second_gradients(o, lambda x, W, A, R, *_: exported(x, R) - o.bias), second_gradients(o, unfused)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["A", "R", "B", "weight"])
def test_inference_tensors_are_named(name):
    o = operands(6, 8, 8, 8)
    given = dict(A=o.A, R=o.R, B=o.B, weight=o.W)
    with torch.inference_mode():
        given[name] = given[name].clone()
    with pytest.raises(ValueError, match=f"{name}: got an inference tensor"):
        lora_xs_linear(o.x.requires_grad_(), scale=o.s, **given)
    lora_xs_linear(o.x.detach(), scale=o.s, **given)
    del given["weight"]
    if name != "weight":
        out = torch.ones(6, 8)
        with pytest.raises(ValueError, match=f"{name}: got an inference tensor"):
            lora_xs_delta(o.x, scale=o.s, out=out, **given)
        assert (out == 1).all()


def test_nothing_is_recorded_in_inference_mode_whatever_grad_mode_says():
    o = operands(6, 8, 8, 8)
    R, out = o.R.requires_grad_(), torch.ones(6, 8)
    with torch.inference_mode(), torch.enable_grad():
        y, into_out = lora_xs_linear(o.x, o.W, o.A, R, o.B, o.s), into(o, out, R=R)
    assert not y.requires_grad and into_out is out and not out.requires_grad
    torch.testing.assert_close(out, 1 + unfused(o.x, None, o.A, o.R.detach(), o.B, o.s))


def test_a_graph_that_kept_out_notices_that_it_was_written():
    o = operands(6, 8, 8, 8)
    out = torch.ones(6, 8)
    loss = (out * torch.ones(6, 8, requires_grad=True)).sum()
    with torch.no_grad():
        into(o, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_ops_on_the_output_keep_gradients_right():
    o = operands(6, 5, 7, 3)
    for shape in ((6, 7), (2, 3, 7)):
        R = o.R.detach().requires_grad_()
        x = o.x.view(shape)
        lora_xs_linear(x, o.W, o.A, R, o.B, o.s).mul_(2).sum().backward()
        expected = torch.autograd.grad(unfused(x, o.W, o.A, R, o.B, o.s).mul(2).sum(), R)[0]
        torch.testing.assert_close(R.grad, expected)


def test_same_inputs_same_bits():
    o = operands(130, 257, 129, 20, torch.bfloat16)
    first, second = gradients(o, lora_xs_linear), gradients(o, lora_xs_linear)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_computes_in_its_dtype_and_keeps_z_in_fp32():
    o = operands(17, 33, 65, 12)
    half = Operands(*(getattr(o, k).bfloat16() for k in ("x", "W", "A")), o.R, o.B.bfloat16(), o.bias.bfloat16(), o.gY)

    def under_autocast(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            y = lora_xs_linear(*arguments)
            assert y.dtype == torch.bfloat16
            y.float().backward(o.gY, inputs=[arguments[3]], retain_graph=True)  # inside the block, as some trainers do
        return y

    x, R = o.x.requires_grad_(), o.R.requires_grad_()
    y = under_autocast(x, o.W, o.A, R, o.B, o.s, o.bias)
    got = R.grad.clone()
    hR = half.R.detach().requires_grad_()
    expected = lora_xs_linear(half.x.detach().requires_grad_(), half.W, half.A, hR, half.B, o.s, half.bias)
    assert torch.equal(y, expected)
    expected.float().backward(o.gY)
    torch.testing.assert_close(got, hR.grad, rtol=1e-5, atol=1e-5)
    (kept,) = (
        t for t in saved_tensors(lambda: under_autocast(x, o.W, o.A, R, o.B, o.s, o.bias)) if t.shape == (17, 12)
    )
    assert kept.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    o = operands(17, 33, 65, 12)
    call = lambda x, R: lora_xs_linear(x, o.W, o.A, R, o.B, o.s, o.bias)  # noqa: E731
    x, R = o.x.requires_grad_(), o.R.requires_grad_()
    expected = torch.autograd.grad(call(x, R), (x, R), o.gY)
    checkpoint(call, x, R, use_reentrant=reentrant).backward(o.gY)
    assert torch.equal(x.grad, expected[0]) and torch.equal(R.grad, expected[1])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_sees_no_break(dynamic):
    o = operands(17, 33, 65, 12)

    def step(x, R):
        y = lora_xs_linear(x.relu(), o.W, o.A, R, o.B, o.s, o.bias)
        return lora_xs_delta(x, o.A, R, o.B, o.s, out=y * 2)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (17, 9):
        x, R = o.x[:T].detach().requires_grad_(), o.R.detach().requires_grad_()
        expected = torch.autograd.grad(step(x, R), (x, R), o.gY[:T])
        got = torch.autograd.grad(compiled(x, R), (x, R), o.gY[:T])
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e)


@pytest.mark.parametrize("x_trains", [False, True])
def test_compile_under_autocast_keeps_gR_in_fp32(x_trains):
    """The compiled backward is traced inside the autocast block, which must not round v^T z to bf16."""
    o = operands(17, 33, 65, 12)

    def gR(call) -> torch.Tensor:
        R = o.R.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = call(o.x.detach().requires_grad_(x_trains), o.W, o.A, R, o.B, o.s, o.bias)
        y.float().backward(o.gY)
        return R.grad

    compiled = torch.compile(lora_xs_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gR(compiled), gR(lora_xs_linear), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("T", [17, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_with_inductor(dtype, T):
    torch._dynamo.reset()
    compiled = torch.compile(lora_xs_linear, fullgraph=True)
    check_against_oracle(operands(T, 33, 65, 12, dtype), compiled)


class Graphs:
    """A backend of torch.compile that runs what AOTAutograd makes as it is, and keeps it."""

    def __init__(self):
        torch._dynamo.reset()
        self.forward, self.backward = [], []
        self.compile = aot_autograd(fw_compiler=self.kept(self.forward), bw_compiler=self.kept(self.backward))

    @staticmethod
    def kept(graphs):
        return lambda graph, _: graphs.append(graph) or make_boxed_func(graph.forward)

    def opaque(self) -> list[int]:
        """How many nodes of each graph are the library's own."""
        return [sum("loraxs" in str(n.target) for n in g.graph.nodes) for g in (*self.forward, *self.backward)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["few", "many", "dynamic", "autocast", "no_grad", "R alone", "x alone", "forced"])
def test_what_compiled_code_consists_of(how, dtype):
    """At few rows plain operators, at many or symbolically many the operator; as exact as eager code."""
    graphs, T = Graphs(), 70 if how == "many" else 17
    compiled = torch.compile(lora_xs_linear, fullgraph=True, dynamic=how == "dynamic", backend=graphs.compile)
    o = operands(T, 33, 65, 12, dtype)
    whole = INTERPRETED or EMULATED or how in ("many", "dynamic")
    if how in ("few", "many", "dynamic", "forced"):
        with backends.backend("torch") if how == "forced" else nullcontext():
            check_against_oracle(o, compiled)
            whole = whole and how != "forced"
            check_against_oracle(operands(23 if how == "dynamic" else T, 33, 65, 12, dtype, seed=1), compiled)
        assert graphs.opaque() == [whole] * 2  # one graph for all, forward and backward
        return
    x, R = o.x.requires_grad_(how != "R alone"), o.R.requires_grad_(how != "x alone")
    wanted = [t for t in (x, R) if t.requires_grad]

    def results(call) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"), torch.set_grad_enabled(how != "no_grad"):
            y = call(x, o.W, o.A, R, o.B, o.s, o.bias)
        return [y.detach(), *(torch.autograd.grad(y, wanted, o.gY.to(y.dtype)) if how != "no_grad" else ())]

    for got, expected in zip(results(compiled), results(lora_xs_linear), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-6 if got.dtype == torch.float32 else 2**-8, atol=1e-6)
    forward, *backward = graphs.opaque()
    assert forward == whole and set(backward) <= {whole and how != "R alone"}  # gR alone is two products of torch's


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_few_rows_and_of_any_number(strict):
    o = operands(6, 5, 7, 3)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return lora_xs_linear(x, o.W, o.A, o.R, o.B, o.s, o.bias)

    T = torch.export.Dim("T", min=2, max=900)
    for shapes in (None, {"x": {0: T}}):
        exported = torch.export.export(Layer(), (o.x,), dynamic_shapes=shapes, strict=strict).module()
        for x in (o.x, o.x[:3]) if shapes else (o.x,):
            expected = Layer()(x)
            torch.testing.assert_close(exported(x), expected)
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(exported(x), expected)  # as it was exported


@pytest.mark.gpu("torch backend")
@pytest.mark.parametrize("T", [8, 300])
@pytest.mark.parametrize("forced", [None, "torch"])
def test_compile_with_cuda_graphs_of_its_own(T, forced):
    torch._dynamo.reset()
    compiled = torch.compile(lora_xs_linear, fullgraph=True, mode="reduce-overhead")
    with backends.backend(forced):
        for seed in range(4):  # warm-up, capture, replays with other numbers
            torch.compiler.cudagraph_mark_step_begin()
            check_against_oracle(operands(T, 320, 640, 20, torch.bfloat16, device="cuda", seed=seed), compiled)


def test_compiled_code_knows_which_code_it_was_made_of(tmp_path):
    """torch keeps graphs on disk by the calls that dynamo records, which therefore name what they are traced to."""
    names = []
    for added in ("", "# another version"):
        package = tmp_path / f"v{len(names)}"
        shutil.copytree(Path(functional.__file__).parent, package / "loraxs_kernels")
        with open(package / "loraxs_kernels/backends/torch.py", "a") as file:
            file.write(added)
        command = [sys.executable, "-c", "from loraxs_kernels import ops; print(ops.CODE)"]
        names.append(subprocess.run(command, cwd=package, capture_output=True, text=True, check=True).stdout)
    assert len(set(names)) == 2
    o, graphs = operands(5, 4, 6, 3), []
    torch._dynamo.reset()
    torch.compile(lora_xs_linear, backend=lambda graph, _: graphs.append(graph) or graph)(o.x, o.W, o.A, o.R, o.B, o.s)
    assert [n.args[-1] for n in graphs[0].graph.nodes if "loraxs" in str(n.target)] == [ops.CODE]


def test_the_library_can_be_imported_again(monkeypatch):
    """Graphs from before, which hold the operators, then run the new code."""
    # dynamo keeps the modules that it imported first, of any package: with them it would compile the new code with
    # guards on the old modules, and torch 2.14 then fails (pytorch's pull request 197046).
    monkeypatch.setattr(torch._dynamo.symbolic_convert, "_import_module", importlib.import_module, raising=False)
    o = operands(70, 4, 6, 3)
    expected = lora_xs_linear(o.x, o.W, o.A, o.R, o.B, o.s)
    compiled = torch.compile(lora_xs_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(o.x, o.W, o.A, o.R, o.B, o.s), expected)
    held, before = ops.operator, {name: m for name, m in sys.modules.items() if name.split(".")[0] == "loraxs_kernels"}
    try:
        for name in before:
            del sys.modules[name]
        again = importlib.import_module("loraxs_kernels.functional").lora_xs_linear
        for call in (again, torch.compile(again, fullgraph=True, backend="aot_eager"), compiled):
            torch.testing.assert_close(call(o.x, o.W, o.A, o.R, o.B, o.s), expected)
        y, _, _ = held(o.x, o.W, o.A, o.R, o.B, o.s, None, None, "forward", "")
        torch.testing.assert_close(y, expected)
    finally:
        sys.modules.update(before)
        importlib.reload(ops)
    torch.testing.assert_close(compiled(o.x, o.W, o.A, o.R, o.B, o.s), expected)


def test_programs_exported_by_earlier_versions_find_their_operator():
    o = operands(5, 4, 6, 3)
    x, R = o.x.requires_grad_(), o.R.requires_grad_()
    y, _, _ = torch.ops.loraxs.lowrank_linear(x, o.W, o.A, R, o.B, o.s, o.bias, None, "torch")
    expected = lora_xs_linear(x, o.W, o.A, R, o.B, o.s, o.bias)
    torch.testing.assert_close(y, expected)
    for got, right in zip(*(torch.autograd.grad(each.sum(), (x, R)) for each in (y, expected)), strict=True):
        torch.testing.assert_close(got, right)


def test_operator_is_well_formed():
    o = operands(5, 4, 6, 3)
    arguments = (o.x.requires_grad_(), o.W, o.A, o.R.requires_grad_(), o.B, o.s, o.bias, None, "forward", "torch")
    torch.library.opcheck(ops.operator, arguments)


def test_meta_tensors_give_shapes():
    o = operands(5, 4, 6, 3, torch.bfloat16)
    x, W, A, R, B = (t.to("meta") for t in (o.x, o.W, o.A, o.R, o.B))
    y = lora_xs_linear(x, W, A, R, B, 1.0)
    assert y.shape == (5, 4) and y.dtype == torch.bfloat16 and y.is_meta


def test_training_follows_the_reference_formula():
    """The same seeds give the same losses, fused and unfused, over a short run of AdamW."""
    o = operands(64, 48, 96, 8)

    def losses(call) -> list[float]:
        R = torch.nn.Parameter(o.R * 1e-5)
        optimizer = torch.optim.AdamW([R], lr=1e-2)
        history = []
        for _ in range(30):
            loss = (call(o.x, o.W, o.A, R, o.B, o.s, o.bias) - o.gY).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        return history

    fused, separate = losses(lora_xs_linear), losses(unfused)
    assert fused[-1] < fused[0] - 1e-3
    assert max(abs(a - b) for a, b in zip(fused, separate, strict=True)) < 1e-5


BAD = {
    "x is no tensor": (dict(x=[1.0]), TypeError, "x: got list"),
    "x is an integer": (dict(x=torch.ones(3, 6, dtype=torch.int64)), TypeError, "x: got dtype torch.int64"),
    "x is complex": (dict(x=torch.ones(3, 6, dtype=torch.complex64)), TypeError, "x: got dtype torch.complex64"),
    "x has other features": (dict(x=torch.ones(3, 5)), ValueError, r"x: got shape \(3, 5\), must be \(\.\.\., 6\)"),
    "x is a scalar": (dict(x=torch.tensor(1.0)), ValueError, r"x: got shape \(\)"),
    "x is elsewhere": (dict(x=torch.ones(3, 6, device="meta")), ValueError, "A: got device cpu, must be meta like x"),
    "no weight": (dict(weight=None), TypeError, "weight: got NoneType, .* lora_xs_delta"),
    "weight in another dtype": (dict(weight=torch.ones(4, 6).half()), TypeError, "weight: got dtype torch.float16"),
    "weight in another shape": (dict(weight=torch.ones(6, 4)), ValueError, r"weight: got shape \(6, 4\)"),
    "weight trains": (dict(weight=torch.ones(4, 6, requires_grad=True)), ValueError, "weight: got requires_grad=True"),
    "A trains": (dict(A=torch.ones(3, 6, requires_grad=True)), ValueError, "A: got requires_grad=True"),
    "A has one dimension": (dict(A=torch.ones(6)), ValueError, r"A: got shape \(6,\), must have 2 dimensions"),
    "rank zero": (dict(A=torch.ones(0, 6), R=torch.ones(0, 0), B=torch.ones(4, 0)), ValueError, "A: .*rank >= 1"),
    "R is not square": (dict(R=torch.ones(3, 2)), ValueError, r"R: got shape \(3, 2\), must be \(3, 3\)"),
    "B has another rank": (dict(B=torch.ones(4, 2)), ValueError, r"B: got shape \(4, 2\), must be \(4, 3\)"),
    "bias in another shape": (dict(bias=torch.ones(3)), ValueError, r"bias: got shape \(3,\), must be \(4,\)"),
    "scale is a tensor": (dict(scale=torch.tensor(1.0)), TypeError, "scale: got Tensor"),
    "scale is no number": (dict(scale=float("nan")), ValueError, "scale: got nan, must be finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_operands_are_named(case):
    change, error, message = BAD[case]
    good = dict(x=torch.ones(3, 6), weight=torch.ones(4, 6), A=torch.ones(3, 6), R=torch.ones(3, 3), B=torch.ones(4, 3))
    with pytest.raises(error, match=message):
        lora_xs_linear(**(good | dict(scale=1.0) | change))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float64])
def test_autocast_makes_floating_point_numbers_of_nothing_else(dtype):
    x, layer = torch.ones(3, 6, dtype=dtype), LoraXSLinear.from_linear(torch.nn.Linear(6, 4), 2, init="random")
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=f"x: got shape .* and {dtype} for linear, must be"):
            layer(x)
        with pytest.raises(TypeError, match="dtype"):
            lora_xs_delta(x, layer.A, layer.R, layer.B, 1.0)


def test_autocast_takes_A_and_B_in_fp64_too():
    layer = LoraXSLinear.from_linear(torch.nn.Linear(6, 4), 2, init="random", dtype="float64")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(3, 6)).dtype == torch.bfloat16


def test_out_must_be_writable_in_place():
    o = operands(6, 5, 7, 3)
    with pytest.raises(ValueError, match=r"out: got shape \(6, 4\), must be \(6, 5\)"):
        lora_xs_delta(o.x, o.A, o.R, o.B, o.s, out=torch.ones(6, 4))
    with pytest.raises(ValueError, match=r"out: .* must be viewable"):
        lora_xs_delta(o.x.view(2, 3, 7), o.A, o.R, o.B, o.s, out=torch.ones(3, 2, 5).transpose(0, 1))


def negated(t: torch.Tensor) -> torch.Tensor:
    """t, as a view of -t whose neg bit is set."""
    return torch._neg_view(-t)


NAMES = ("x", "W", "A", "R", "B", "bias", "gY")
MANY_AND_FEW = [(70, 24, 304, 12), (4, 24, 304, 12)]  # rows: kernels of their own on the cuda backend


@pytest.mark.parametrize("shape", MANY_AND_FEW, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_negated_views(name, shape):
    """Their memory holds the numbers with the other sign."""
    o = operands(*shape, torch.bfloat16)
    check_against_oracle(replace(o, **{name: negated(getattr(o, name))}))


def test_imaginary_parts_of_conjugates():
    """Where negated views come from; theirs lie in every other element, too."""
    o = operands(70, 24, 304, 12, torch.float16)
    changed = {name: torch.complex(o.gY[:1, :1], -getattr(o, name)).conj().imag for name in ("x", "A", "B")}
    assert all(t.is_neg() for t in changed.values())
    check_against_oracle(replace(o, **changed))


@pytest.mark.parametrize("shape", MANY_AND_FEW, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_zero_tensors(name, shape):
    """Zeros without memory, which autograd may hand over as gY."""
    o = operands(*shape, torch.bfloat16)
    t = getattr(o, name)
    nothing = torch._efficientzerotensor(t.shape, dtype=t.dtype)
    assert nothing._is_zerotensor()
    check_against_oracle(replace(o, **{name: nothing}))


def into(o: Operands, out: torch.Tensor, **changed) -> torch.Tensor:
    return lora_xs_delta(**(dict(x=o.x, A=o.A, R=o.R, B=o.B, scale=o.s) | changed), out=out)


def refused_outs(o: Operands) -> dict:
    """What `out` may not be, with the operands that it is given with: T = 6, N = K = 8, r = 8."""
    shared = torch.ones(20, 8, dtype=o.x.dtype)
    return {
        "one row for all": (
            shared[:1].expand(6, 8),
            {},
            r"out: got shape \(6, 8\) with strides \(0, 1\), must have memory",
        ),
        "one element for a row": (shared[:6, :1].expand(6, 8), {}, "must have memory of its own for each element"),
        "rows that overlap": (shared.as_strided((6, 8), (4, 1)), {}, "must have memory of its own for each element"),
        "steps that meet": (shared.as_strided((6, 8), (3, 2)), {}, "must have memory of its own for each element"),
        "x, a row further": (
            shared[1:7],
            dict(x=shared[:6]),
            "out: got a tensor that overlaps x in memory, .* x itself",
        ),
        "x, a row before": (shared[:6], dict(x=shared[1:7]), "overlaps x in memory"),
        "x, transposed": (shared[:8].t()[:6], dict(x=shared[:6]), "overlaps x in memory"),
        "all of x, transposed": (shared[:8].t(), dict(x=shared[:8]), "overlaps x in memory"),
        "columns of A": (shared.view(10, 16)[:6, 4:12], dict(A=shared.view(10, 16)[:8, :8]), "overlaps A in memory"),
        "R": (shared[:6], dict(R=shared[4:12]), "overlaps R in memory"),
        "B itself": (shared[:6], dict(B=shared[:8]), "overlaps B in memory, must share none with it$"),
        "a negated view": (negated(shared)[:6], {}, "out: got a negated view"),
        "a zero tensor": (torch._efficientzerotensor((6, 8), dtype=o.x.dtype), {}, "out: got a zero tensor"),
    }


@pytest.mark.parametrize("case", refused_outs(operands(6, 8, 8, 8)))
@pytest.mark.parametrize("trains", [False, True])
def test_out_that_cannot_be_written_in_place_is_refused(case, trains):
    o = operands(6, 8, 8, 8, torch.bfloat16)
    out, changed, message = refused_outs(o)[case]
    R = changed.get("R", o.R).detach().requires_grad_(trains)
    with pytest.raises(ValueError, match=message):
        into(o, out, **changed | dict(R=R))
    assert (out == (case != "a zero tensor")).all()


def outs_for_autograd() -> dict:
    """`out` of every kind that autograd tells apart, all ones, and whether a gradient comes from it."""

    def ones(**options):
        return torch.ones(6, 8, **options)

    leaf, made = ones(requires_grad=True), ones(requires_grad=True) * 1
    with torch.no_grad():
        hidden = made.view(6, 8)
    with torch.inference_mode():
        inference = ones()
    return {
        "plain": ones(),
        "made": made,
        "a slice of one": torch.ones(9, 8, requires_grad=True).mul(1)[2:8],
        "a slice of a plain one": torch.ones(9, 8)[2:8],
        "a leaf": leaf,
        "a slice of a leaf": torch.ones(9, 8, requires_grad=True)[2:8],
        "one of two": torch.ones(12, 8, requires_grad=True).mul(1).chunk(2)[0],
        "one of two plain ones": torch.ones(12, 8).chunk(2)[0],
        "a view made under no_grad": hidden,
        "detached": made.detach(),
        "an inference tensor": inference,
    }


@pytest.mark.parametrize("mode", ["trains", "does not", "no_grad"])
@pytest.mark.parametrize("kind", outs_for_autograd())
def test_out_is_refused_where_torch_refuses_it_and_then_not_written(kind, mode):
    o = operands(6, 8, 8, 8)
    R, mine, torchs = o.R.requires_grad_(mode == "trains"), *(outs_for_autograd()[kind] for _ in range(2))
    with torch.no_grad() if mode == "no_grad" else nullcontext():
        delta = lora_xs_delta(o.x, o.A, R, o.B, o.s)
        try:
            torchs.add_(delta)
        except RuntimeError:
            with pytest.raises(ValueError, match=r"out: got .*, must be"):
                into(o, mine, R=R)
            assert (mine == 1).all()
        else:
            torch.testing.assert_close(into(o, mine, R=R), torchs)
            assert mine.requires_grad == torchs.requires_grad


@pytest.mark.parametrize(
    "place",
    [
        lambda t: (t[:6], t[6:12]),
        lambda t: (t[::2][:6], t[1::2][:6]),
        lambda t: (t.view(10, 16)[:6, :8], t.view(10, 16)[:6, 8:]),
        lambda t: (t.view(10, 16)[1:7, 8:], t.view(10, 16)[:6, :8]),
        lambda t: (t.view(10, 16)[:6, ::2], t.view(10, 16)[:6, 1::2]),
        lambda t: (t[:6], t[:6]),
        lambda t: (t.view(10, 16)[:6, ::2], t.view(10, 16)[:6, ::2]),
    ],
    ids=["rows", "every other row", "columns", "columns, a row further", "every other column", "x", "x, a view"],
)
def test_out_may_lie_beside_x_or_be_x(place):
    o = operands(6, 8, 8, 8, torch.bfloat16)
    out, x = place(torch.empty(20, 8, dtype=torch.bfloat16))
    x.copy_(o.x)
    before = x.clone() if out.data_ptr() == x.data_ptr() else out.fill_(1).clone()
    into(o, out, x=x)
    expected = [before.to(dtype) + unfused(o.to(dtype).x, None, *(t.to(dtype) for t in (o.A, o.R, o.B)), o.s)
                for dtype in (torch.bfloat16, torch.float64)]  # fmt: skip
    assert_accurate(out, *expected, torch.bfloat16)


PLACES = st.tuples(
    st.integers(0, 12),
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8, 12])), min_size=1, max_size=3),
)


@settings(max_examples=300, deadline=None)
@given(PLACES, PLACES)
def test_which_elements_meet(mine, theirs):
    """Against the set of all addresses: what is said to be apart is, and what shares memory is said to."""
    memory = torch.arange(128, dtype=torch.int16)
    views = [memory.as_strided(*zip(*dims, strict=True), offset) for offset, dims in (mine, theirs)]
    a, b = (view.reshape(-1).tolist() for view in views)
    first, second = map(_Runs.of, views)
    if set(a) & set(b):
        assert not first.apart(second) and not second.apart(first)
    assert first.shared or len(set(a)) == len(a)


ADVICE = r"use loraxs_kernels\.reference\.lowrank_linear"


def tangent(call, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Of call(x), by the two ways to forward-mode AD, which agree."""
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(call(forward_ad.make_dual(x, t))).tangent
    assert torch.equal(torch.func.jvp(call, (x,), (t,))[1], found)
    return found


def batched(call, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.func.vmap(call)(torch.stack([x, t]))


def linearized(call, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.func.linearize(call, x)[1](t.to(x.dtype))


def under_grad(call, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda x: call(x).float().square().sum())(x)


TRANSFORMED = {
    "lora_xs_linear": lambda o: lambda x, R: lora_xs_linear(x, o.W, o.A, R, o.B, o.s, o.bias),
    "lora_xs_delta": lambda o: lambda x, R: lora_xs_delta(x, o.A, R, o.B, o.s),
    "lora_xs_delta into out": lambda o: lambda x, R: lora_xs_delta(x, o.A, R, o.B, o.s, out=torch.zeros_like(o.gY)),
    "together": lambda o: lambda x, R: torch.cat(together.outputs(x, [(o.W, o.A, R, o.B, o.s, o.bias, "")] * 2)),
    "LoraXSLinear": lambda o: layer_of(o),
    "forward_together": lambda o: layer_of(o, twice=True),
}


def layer_of(o: Operands, twice: bool = False):
    """The operands as a layer, called with x and an R in place of its parameter; twice: by forward_together."""
    linear = torch.nn.Linear(o.W.shape[1], o.W.shape[0])
    linear.weight, linear.bias = torch.nn.Parameter(o.W), torch.nn.Parameter(o.bias)
    layer = LoraXSLinear.from_linear(linear, len(o.R), alpha=o.s * len(o.R), init=(o.A, o.B))
    del layer.R

    def call(x: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
        layer.R = R
        return torch.cat(forward_together(x, layer, layer)) if twice else layer(x)

    return call


def untransformed(name: str, o: Operands):
    """What `TRANSFORMED` computes, in torch's own operations."""

    def call(x: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
        if "delta" in name:
            return unfused(x, None, o.A, R, o.B, o.s)
        y = unfused(x, o.W, o.A, R, o.B, o.s, o.bias)
        return torch.cat([y, y]) if "together" in name else y

    return call


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("how", [tangent, batched, linearized])
@pytest.mark.parametrize("of", ["x", "R"])
@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")
def test_what_is_frozen_is_transformed(name, how, of, no_grad):
    """By torch's own operators on every backend: kernels would drop the tangents."""
    o = operands(70, 24, 304, 12, torch.bfloat16)
    t = torch.randn_like(getattr(o, of))

    def transform(call, o: Operands, t: torch.Tensor) -> torch.Tensor:
        return how(lambda v: call(*((v, o.R) if of == "x" else (o.x, v))), getattr(o, of), t)

    with torch.no_grad() if no_grad else nullcontext():
        if how is batched and "out" in name:
            with pytest.raises(RuntimeError, match="broadcast"):  # what is not batched cannot be written batched
                transform(TRANSFORMED[name](o), o, t)
            return
        got = transform(TRANSFORMED[name](o), o, t)
        expected = [transform(untransformed(name, each), each, t.to(each.x.dtype)) for each in (o, o.to(torch.float64))]
    assert_accurate(got, *expected, torch.bfloat16)


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("how", [tangent, batched, under_grad])
def test_what_trains_is_transformed(name, how):
    """By torch's own operators on every backend, since torch cannot look into a Function's backward pass."""
    o = operands(70, 24, 304, 12, torch.bfloat16)
    t = torch.randn_like(o.x)

    def found(make, o: Operands) -> torch.Tensor:
        call, R = make(o), o.R.requires_grad_()
        return how(lambda x: call(x, R), o.x, t.to(o.x.dtype)).detach()

    if how is batched and "out" in name:
        with pytest.raises(RuntimeError, match="broadcast"):  # what is not batched cannot be written batched
            found(TRANSFORMED[name], o)
        return
    expected = [found(lambda o: untransformed(name, o), each) for each in (o, o.to(torch.float64))]
    assert_accurate(found(TRANSFORMED[name], o), *expected, torch.bfloat16)


@pytest.mark.parametrize("how", [tangent, batched, linearized, under_grad])
@pytest.mark.parametrize("of", ["x", "R"])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")
def test_an_index_is_transformed(how, of, trains):
    o, rows = operands(6, 24, 30, 4), torch.tensor([2, 2, -1, -1, 0, 0])
    index, R = RowIndex([2, -1, 0], 3, o.x.device), torch.randn(3, 4, 4).requires_grad_(trains)

    def ours(x, R):
        return lora_xs_linear(x, o.W, o.A, R, o.B, o.s, o.bias, index=index)

    def by_reference(x, R):
        return reference.lowrank_linear(x, o.W, o.A, R, o.B, o.s, o.bias, rows)[0]

    # What the index keeps from here serves elsewhere.
    under_grad(lambda x: under_grad(lambda x: ours(x, R), x, x), o.x, o.x)
    v = {"x": o.x, "R": R}[of].detach()
    found, expected = (
        how(lambda v, call=call: call(*((v, R) if of == "x" else (o.x, v))), v, v.flip(0))
        for call in (ours, by_reference)
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours(o.x, R), by_reference(o.x, R))


def test_a_row_without_R_may_overflow_under_a_transform():
    x, A, B = (torch.tensor(t).half() for t in ([[6e4], [1e2]], [[1e2]], [[1.0]]))  # z of the first row is infinite
    R, index = torch.full((1, 1, 1), 0.1), torch.tensor([-1, 0])  # whose numbers torch 2.6 reads only outside of one
    found = torch.func.jvp(lambda R: lora_xs_delta(x, A, R, B, 1.0, index=index), (R,), (R,))
    assert [t.flatten().tolist() for t in found] == [[0, 1000]] * 2


def test_gR_under_a_transform_has_the_range_of_fp32():
    o = operands(70, 24, 304, 12, torch.float16)
    call = lambda R: (lora_xs_linear(o.x, o.W, o.A, R, o.B, o.s).float() * o.gY * 3000).sum()  # noqa: E731
    expected = torch.autograd.grad(call(o.R.requires_grad_()), o.R)[0]
    assert expected.abs().max() > torch.finfo(torch.float16).max
    torch.testing.assert_close(torch.func.grad(call)(o.R.detach()), expected, rtol=1e-2, atol=expected.norm() * 1e-3)


@pytest.mark.parametrize("strict", [False, True])
def test_the_operator_is_taken_apart_for_exporters(monkeypatch, strict):
    module, x = LoraXSLinear.from_linear(torch.nn.Linear(24, 304), 4, init_std=0.3), torch.randn(70, 24)
    rows = torch.export.Dim("rows", min=2, max=900)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: rows},), strict=strict)
    assert all(node.args[1] is not None for node in program.graph.nodes if "loraxs" in str(node.target))  # W is in it
    # What torch's inductor finds there may be no operator that it calls, if the environment has CI set.
    assert not torch._decomp.get_decompositions([ops.operator])
    by_hand = program.run_decompositions({ops.operator: ops.plain})
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)  # as in torch.onnx.export(..., dynamo=True)
    for plain in (by_hand, torch.export.export(module, (x,), dynamic_shapes=({0: rows},), strict=strict)):
        assert not any("loraxs" in str(node.target) for node in plain.graph.nodes)
        for each in (x, torch.randn(3, 24)):
            torch.testing.assert_close(plain.module()(each), module(each))


def test_what_the_operator_is_taken_apart_into_returns_the_same():
    o, other = operands(70, 24, 304, 12, torch.bfloat16), torch.randn(70, 12)
    args = (o.x, o.W, o.A, o.R, o.B, o.s, o.bias, other, "forward", "torch")
    for found, expected in zip(ops.plain(*args), ops.operator(*args), strict=True):
        assert found.dtype == expected.dtype and reference.relative_error(found, expected) < 2e-2


@pytest.mark.parametrize("shape", MANY_AND_FEW, ids=str)
def test_gradients_of_a_batch_of_gY(shape):
    o = operands(*shape, torch.bfloat16)
    x, R, gYs = o.x.requires_grad_(), o.R.requires_grad_(), torch.stack([o.gY, o.gY * 2])
    y = lora_xs_linear(x, o.W, o.A, R, o.B, o.s, o.bias)
    if INTERPRETED or EMULATED:
        with pytest.raises(RuntimeError, match=f"batched .* {ADVICE}"):
            torch.autograd.grad(y, (x, R), gYs, is_grads_batched=True)
        return
    expected = torch.autograd.grad(y, (x, R), o.gY, retain_graph=True)
    for got, one in zip(torch.autograd.grad(y, (x, R), gYs, is_grads_batched=True), expected, strict=True):
        torch.testing.assert_close(got, torch.stack([one, one * 2]))


def test_tensors_that_outlived_a_transform_are_what_they_wrap():
    o, kept = operands(17, 33, 65, 12), []
    o.R.requires_grad_()
    torch.func.grad(lambda x: (kept.append(x * 1) or x).sum())(o.x)
    expected = gradients(o, lora_xs_linear)
    y = lora_xs_linear(kept[0], o.W, o.A, o.R, o.B, o.s, o.bias)
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(torch.autograd.grad(y, o.R, o.gY)[0], expected[2])


def test_forward_mode_elsewhere_changes_nothing():
    """Kernels refuse tangents, not the place where there might be some."""
    o = operands(70, 24, 304, 12, torch.bfloat16)
    expected = gradients(o, lora_xs_linear)
    with forward_ad.dual_level():
        got = gradients(o, lora_xs_linear)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("T", [17, 70])
@pytest.mark.parametrize("before", [False, True])
def test_compiled_code_drops_no_tangents(T, before):
    """torch would run the operator, and code compiled before there were any, without them: refused, or right."""
    o = operands(T, 33, 65, 12)
    call = torch.compile(lambda x: lora_xs_linear(x, o.W, o.A, o.R, o.B, o.s), fullgraph=True, backend="aot_eager")
    if before:
        call(o.x)
    with forward_ad.dual_level():
        try:
            y, tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(o.x, o.x)))
        except Exception as error:  # torch 2.14 also has words of its own
            assert re.search(f"{ADVICE}|dual tensor input", str(error))
        else:  # torch 2.14 takes code that was compiled without tangents no more
            torch.testing.assert_close(tangent, y)
    assert torch.equal(call(o.x), lora_xs_linear(o.x, o.W, o.A, o.R, o.B, o.s))


@pytest.mark.parametrize("dynamic", [False, True])
def test_code_that_is_compiled_with_its_derivative_drops_no_tangents(dynamic):
    """Symbolic shapes are found by other ways than fixed ones."""
    o = operands(70, 33, 65, 12)

    def tangent(x: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(lambda x: lora_xs_linear(x, o.W, o.A, o.R, o.B, o.s), (x,), (x,))[1]

    with pytest.raises(Exception, match=f"{ADVICE}|Observed exception"):  # as torch 2.14 says
        torch.compile(tangent, fullgraph=True, dynamic=dynamic, backend="aot_eager")(o.x)


def test_reference_is_its_formula():
    """The specification itself, against the formula written out in another way."""
    o = operands(5, 4, 6, 3, torch.float64)
    y, z = reference.lowrank_linear(o.x, o.W, o.A, o.R, o.B, o.s, o.bias)
    delta = o.s * torch.einsum("nr,rq,qk->nk", o.B, o.R, o.A)
    torch.testing.assert_close(y, torch.einsum("tk,nk->tn", o.x, o.W + delta) + o.bias)
    torch.testing.assert_close(z, torch.einsum("tk,rk->tr", o.x, o.A))
    assert functional.lora_xs_linear.__doc__ and "arXiv 2405.17604" in functional.lora_xs_linear.__doc__
