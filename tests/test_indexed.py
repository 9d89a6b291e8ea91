"""The primitive with an index: every mix of adapters against the fp64 oracle, and what keeps samples apart."""

from __future__ import annotations

import pytest
import torch
from helpers import LAYOUTS, assert_accurate, operands
from torch import Tensor

from loraxs_kernels import indexed, reference
from loraxs_kernels.functional import lora_xs_delta, lora_xs_linear
from loraxs_kernels.indexed import FEW, RowIndex, gram

MIXES = {
    "one sample": [2],
    "all different": [0, 1, 2, 3, 4, 5],
    "some without": [-1, 3, -1, 0, 0, -1],
    "none with": [-1, -1, -1],
    "all alike": [1] * 8,
    "runs": [0] * 4 + [5] * 4 + [-1] * 4,
    "skewed": [4] * 61 + [0, 1, -1] + [4] * 9,
    "shuffled": [i % 3 for i in range(50)] + [5] * FEW,
}


def stacked(r: int, n: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    """A table as a bank has it: each R contiguous, with other modules' between one and the next."""
    memory = torch.randn(n, r * r + 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return memory[:, : r * r].unflatten(1, (r, r))


def results(o, R: Tensor, call, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    x, R = o.x.detach().requires_grad_(), R.detach().requires_grad_()
    y = call(x, o.W, o.A, R, o.B, o.s, bias)
    return y.detach(), *torch.autograd.grad(y, (x, R), o.gY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("each", "r"), [(1, 20), (3, 1), (3, 12)])
@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_against_the_oracle(mix, each, r, dtype):
    index = MIXES[mix]
    T = len(index) * each
    o, R = operands(T, 33, 29, r, dtype), stacked(r, dtype=torch.promote_types(dtype, torch.float32))
    rows = torch.tensor(index).repeat_interleave(each)

    def chain(x, W, A, R, B, s, bias):
        return reference.lowrank_linear(x, W, A, R.to(x.dtype), B, s, bias, rows)[0]

    got = results(o, R, lambda *operands: lora_xs_linear(*operands, index=index_of(index, R)), o.bias)
    expected = results(o, R, chain, o.bias)
    o.x, o.W, o.A, o.B, o.bias, o.gY = (getattr(o, name).double() for name in ("x", "W", "A", "B", "bias", "gY"))
    oracle = results(o, R.double(), chain, o.bias)
    for name, *three in zip(("y", "gX", "gR"), got, expected, oracle, strict=True):
        assert_accurate(*three, dtype, name)


@pytest.mark.parametrize("mix", MIXES)
def test_gradients_in_fp64(mix):
    o, R = operands(len(MIXES[mix]), 3, 5, 2, torch.float64), stacked(2, dtype=torch.float64)
    index = index_of(MIXES[mix], R)
    arguments = (o.x.requires_grad_(), R.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, R: lora_xs_linear(x, o.W, o.A, R, o.B, o.s, index=index), arguments)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("each", [1, 3])
def test_layers_side_by_side_are_mixed_as_each_alone(mix, each):
    z, R = torch.randn(len(MIXES[mix]) * each, 3, 4), torch.randn(6, 3, 4, 4)
    blocks = RowIndex(MIXES[mix], len(R), z.device).blocks(len(z))
    alone = [indexed.mix(z[:, layer].contiguous(), R[:, layer], blocks, 0.5) for layer in range(3)]
    together = indexed.mix(z.flatten(1), R, blocks, 0.5)
    torch.testing.assert_close(together, torch.cat(alone, 1))
    assert together.any() == (mix != "none with")


def index_of(index: list[int], R: Tensor) -> RowIndex:
    return RowIndex(index, len(R), R.device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_delta_is_added_to_what_is_there(layout):
    o, R = operands(6, 33, 29, 4, layout=layout), stacked(4)
    x, index = o.x.requires_grad_(), [0, 1, 2]
    before = torch.randn(3, 2, 33)
    y = lora_xs_delta(
        x.unflatten(0, (3, 2)), o.A, R.requires_grad_(), o.B, o.s, out=(out := before.clone()), index=index
    )
    rows = torch.tensor(index).repeat_interleave(2)
    expected = before + reference.lowrank_linear(x, None, o.A, R, o.B, o.s, index=rows)[0].view(3, 2, 33)
    assert y is out and torch.allclose(y, expected, atol=1e-6)
    for got, should in zip(*(torch.autograd.grad(each.sum(), (x, R)) for each in (y, expected)), strict=True):
        assert torch.allclose(got, should, atol=1e-5)


@pytest.mark.parametrize("mix", ["all different", "some without", "skewed"])
@pytest.mark.parametrize("bad", ["R", "x"])
def test_what_is_not_finite_stays_with_its_samples(mix, bad):
    index = torch.tensor(MIXES[mix])
    o, R = operands(len(index), 16, 16, 4), stacked(4)
    whose = index == 0
    clean = results(o, R, lambda *operands: lora_xs_linear(*operands, index=index), None)
    if bad == "R":
        R = R.clone()
        R[0] = float("nan")
    else:
        o.x = torch.where(whose[:, None], float("inf"), o.x)
    y, gX, gR = results(o, R, lambda *operands: lora_xs_linear(*operands, index=index), None)
    assert not torch.isfinite(y[whose]).any() and torch.equal(y[~whose], clean[0][~whose])
    assert torch.equal(gX[~whose], clean[1][~whose]) and torch.equal(gR[1:], clean[2][1:])


def test_rows_without_an_adapter_are_the_frozen_layer_s_even_where_x_is_infinite():
    o, R = operands(4, 16, 16, 4), stacked(4)
    o.x[1, 3] = float("inf")
    y = lora_xs_linear(o.x, o.W, o.A, R, o.B, o.s, o.bias, index=[-1, -1, 0, -1])
    expected = torch.nn.functional.linear(o.x, o.W, o.bias)
    assert torch.allclose(y[[0, 3]], expected[[0, 3]], atol=1e-6)
    assert torch.equal(y[1].isnan(), expected[1].isnan())


def test_gradients_come_compact_and_always_with_the_same_bits():
    index = RowIndex([5, 2, 5, -1, 2, 0] * 7, 100_000, torch.device("cpu"))
    v, z = torch.randn(42, 8), torch.randn(42, 8)
    blocks = index.blocks(42)
    total = gram(v, z, blocks, 0.5)
    assert blocks.members.tolist() == [0, 2, 5] and total.shape == (3, 8, 8)
    assert all(torch.equal(total, gram(v, z, blocks, 0.5)) for _ in range(3))


def test_a_fixed_index_changes_in_place():
    o, R = operands(8, 16, 12, 4), stacked(4)
    fixed = RowIndex([0, -1, 3, 3], len(R), R.device, fixed=True)
    lora_xs_linear(o.x, o.W, o.A, R, o.B, o.s, index=fixed)
    held = [id(getattr(fixed.blocks(8), part)) for part in ("owner", "idle", "places")] + [id(fixed.rows(8))]
    fixed.change([5, 5, -1, 2])
    assert held == [id(getattr(fixed.blocks(8), part)) for part in ("owner", "idle", "places")] + [id(fixed.rows(8))]
    expected = index_of([5, 5, -1, 2], R)
    assert torch.equal(fixed.rows(8), expected.rows(8))
    got, should = (
        results(o, R, lambda *operands, index=each: lora_xs_linear(*operands, index=index), o.bias)
        for each in (fixed, expected)
    )
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, should, strict=True))
    with pytest.raises(ValueError, match="got 3 samples, must be 4"):
        fixed.change([0, 1, 2])
    with pytest.raises(ValueError, match="must be made with fixed=True"):
        expected.change([0, 1, 2, 3])


def test_autocast_and_a_bias_that_trains():
    o, R, bias = operands(6, 16, 12, 4), stacked(4).requires_grad_(), torch.randn(16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_xs_linear(o.x.view(2, 3, 12), o.W, o.A, R, o.B, o.s, bias, index=[0, 1])
    half = (t.bfloat16() for t in (o.x.view(2, 3, 12), o.W, o.A))
    expected = lora_xs_linear(*half, R, o.B.bfloat16(), o.s, index=[0, 1]) + bias.bfloat16()
    assert y.dtype == torch.bfloat16 and torch.allclose(y, expected.to(y), atol=0.02)
    with pytest.raises(RuntimeError, match="cannot be differentiated again: got create_graph=True"):
        torch.autograd.grad(y.square().sum(), (R, bias), create_graph=True)  # and not the derivative by bias alone
    y.sum().backward()
    assert bias.grad is not None


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([0, 6], ValueError, "index: got 6 at position 1, must be -1 .* to 5"),
        ([0, -2], ValueError, "index: got -2 at position 1"),
        ([0, True], TypeError, "index: got True at position 1"),
        ([0.0, 1], TypeError, "index: got 0.0 at position 0"),
        (torch.tensor([0.0, 1.0]), TypeError, "index: got torch.float32, must be integers"),
        ([], ValueError, "index: is empty"),
        ([0, 1, 2], ValueError, "index: got 3 numbers, must be one for each of 2 samples or 4 rows"),
        (RowIndex([0, 0], 5, "cpu"), ValueError, r"R: got shape \(6, 4, 4\), must be \(5, 4, 4\)"),
        (RowIndex([0, 0], 6, torch.device("meta")), ValueError, "index: was made for device meta, must be cpu"),
        (RowIndex([0, 0, 0], 6, torch.device("cpu")), ValueError, "x: got 4 rows for an index of 3 samples"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(index, error, message):
    o, R = operands(4, 16, 12, 4), stacked(4)
    with pytest.raises(error, match=message):
        lora_xs_linear(o.x.view(2, 2, 12), o.W, o.A, R, o.B, o.s, index=index)


def test_an_index_for_a_single_row():
    """x (K,) is one sample, and one row."""
    o, R = operands(4, 16, 12, 4), stacked(4)
    with pytest.raises(ValueError, match="index: got 2 numbers, must be one for each of 1 samples or 1 rows"):
        lora_xs_linear(o.x[0], o.W, o.A, R, o.B, o.s, index=[0, 1])
    with pytest.raises(ValueError, match=r"x: got shape \(\)"):
        lora_xs_linear(o.x[0, 0], o.W, o.A, R, o.B, o.s, index=[0])


def test_a_stack_without_an_index_and_an_index_without_a_stack_are_refused():
    o, R = operands(4, 16, 12, 4), stacked(4)
    with pytest.raises(ValueError, match=r"R: got shape \(6, 4, 4\), must have 2 dimensions"):
        lora_xs_linear(o.x, o.W, o.A, R, o.B, o.s)
    with pytest.raises(ValueError, match=r"R: got \(4, 4\), must be a stack"):
        lora_xs_linear(o.x, o.W, o.A, o.R, o.B, o.s, index=[0, 0, 0, 0])
