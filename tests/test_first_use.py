"""The check of a backend that was chosen: a right one passes once, a wrong one never gives a result away."""

from __future__ import annotations

import functools
import itertools
import os
import re
import sys
import threading
import types
import warnings
from importlib.metadata import version

import pytest
import torch
from helpers import EMULATED, INTERPRETED, Operands, assert_accurate, interrupted_at, operands
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import loraxs_kernels as lx
from loraxs_kernels import backends
from loraxs_kernels.backends import first_use
from loraxs_kernels.backends import torch as torch_backend
from loraxs_kernels.backends.cuda.config import TOKENS, Rows
from loraxs_kernels.functional import lora_xs_delta, lora_xs_linear

ON_CPU = "triton" if INTERPRETED else "cuda" if EMULATED else None  # whose kernels run without a GPU here


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """As in a new process, where nothing is forced."""
    monkeypatch.delenv("LORAXS_CHECK", raising=False)
    monkeypatch.setattr(first_use, "_checked", {})
    first_use.setting.cache_clear()
    with lx.backend(None):
        yield
    first_use.setting.cache_clear()


@pytest.fixture
def chosen(monkeypatch):
    """`chosen(name)`: `choose` names this backend."""
    return lambda name: monkeypatch.setattr(backends, "choose", lambda *_, **__: name)


@pytest.fixture
def plugged_in(monkeypatch, chosen):
    """`plugged_in(primitive)`: a backend of this primitive, which is chosen; its calls are counted in `.calls`."""

    def plug(primitive=torch_backend.lowrank_linear):
        module = types.ModuleType(f"{backends.__name__}.triton")
        module.calls, module.primitive = [], primitive

        def lowrank_linear(x, W, A, R, B, s, bias=None, out=None, other=None):
            module.calls.append("backward" if other is not None else "forward")
            return module.primitive(x, W, A, R, B, s, bias, out, other)

        module.lowrank_linear = lowrank_linear
        module.plan = lambda x, A, B: "plan"
        module.unavailable = lambda: None
        monkeypatch.setitem(sys.modules, module.__name__, module)
        chosen("triton")
        return module

    return plug


def problem(T=70, N=200, K=96, r=8, dtype=torch.float32, **more) -> Operands:
    """With R as it is when a training starts."""
    o = operands(T, N, K, r, dtype, **more)
    o.R *= 1e-5
    return o


def step(o: Operands, call=lora_xs_linear, **more) -> tuple[torch.Tensor, ...]:
    """y, gX, gR."""
    x, R = o.x.detach().requires_grad_(), o.R.detach().requires_grad_()
    y = call(x, o.W, o.A, R, o.B, o.s, o.bias, **more)
    return y.detach(), *torch.autograd.grad(y, (x, R), o.gY)


def by_torch(call, *args, **more):
    with lx.backend("torch"):
        return call(*args, **more)


def equal(some, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def rounded_once(x, W, A, R, B, s, bias=None, out=None, other=None):
    """A right backend with other bits than the torch backend's."""
    full = [None if t is None else t.double() for t in (x, W, A, R, B, bias)]
    y, z, gram = torch_backend.lowrank_linear(*full[:5], s, full[5], None, None if other is None else other.double())
    y = y.to(x.dtype) if out is None else out.copy_(y + out)
    return y, z.float(), None if gram is None else gram.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("shape", [(1, 64, 32, 4), (70, 200, 96, 8), (20, 20000, 40, 12)], ids=str)
def test_a_right_backend_is_checked_once(plugged_in, shape, layout, dtype):
    o, module = problem(*shape, dtype, layout=layout), plugged_in(rounded_once)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = step(o)
        assert module.calls == ["forward"] * 2 + ["backward"] * 2
        assert equal(step(o), first)
        assert module.calls[4:] == ["forward", "backward"]
        outs = [lora_xs_delta(o.x, o.A, o.R, o.B, o.s, out=o.gY.clone()) for _ in range(2)]
    assert len(module.calls) == 6 + 3 and torch.equal(*outs)


@pytest.mark.parametrize("value", [3, 3e3, 1e-3])
def test_operands_of_any_size(plugged_in, recwarn, value):
    """Features and rows far larger than the rest, rows of zeros, terms of one sign."""
    module, o = plugged_in(rounded_once), problem(T=64, N=256, dtype=torch.bfloat16)
    o.x[:, 3] *= value
    o.x[5] *= value
    o.W[7] *= value
    o.W[100:], o.B[100:], o.x[20:] = 0, 0, 0
    step(o)
    o.W, o.x = o.W.abs(), o.x.abs()
    o.x = torch.cat([o.x, o.x])
    o.gY = torch.cat([o.gY, o.gY])
    step(o)
    assert len(module.calls) == 12 and not recwarn.list  # each forward with and without its rows of zeros


def delta_left_out(x, W, A, R, B, s, *more):
    return torch_backend.lowrank_linear(x, W, A, R * 0, B, s, *more)


def R_turned(x, W, A, R, B, s, *more):
    return torch_backend.lowrank_linear(x, W, A, R.t(), B, s, *more)


def W_left_out(x, W, A, R, B, s, *more):
    return torch_backend.lowrank_linear(x, None, A, R, B, s, *more)


def bias_left_out(x, W, A, R, B, s, bias, *more):
    return torch_backend.lowrank_linear(x, W, A, R, B, s, None, *more)


def spoiled(index, value):
    def primitive(*operands):
        y, z, gram = torch_backend.lowrank_linear(*operands)
        if value is None:
            y[index] = y[index].flip(0)
        else:
            y[index] = value
        return y, z, gram

    return primitive


def with_gram(change):
    def primitive(*operands):
        y, z, gram = torch_backend.lowrank_linear(*operands)
        return y, z, gram if gram is None else change(gram)

    return primitive


def in_backward(wrong):
    return lambda *o: (torch_backend.lowrank_linear if o[-1] is None else wrong)(*o)


def raising(*_):
    raise RuntimeError("out of resources: shared memory\nand more")


def z_shifted(*operands):
    y, z, gram = torch_backend.lowrank_linear(*operands)
    return y, z + z.mean() + 1, gram


def y_in_fp64(*operands):
    y, z, gram = torch_backend.lowrank_linear(*operands)
    return y.double(), z, gram


TILE = (slice(32, 48), slice(64, 80))
BOTH, FORWARD, BACKWARD = ("forward", "backward"), ("forward",), ("backward",)
WRONG = {  # what is wrong, in which directions the check fails, and what the warning says
    "delta": (delta_left_out, BOTH, "its y differs from the torch backend's by "),
    "delta in the backward": (in_backward(delta_left_out), BACKWARD, "its y differs from the torch backend's by "),
    "R": (R_turned, BOTH, "its y differs"),
    "W": (W_left_out, BOTH, "its y differs"),
    "bias": (bias_left_out, FORWARD, "its y differs"),
    "tile": (spoiled(TILE, 0), BOTH, "its y differs"),
    "huge": (spoiled(TILE, 1e30), BOTH, "its y differs"),
    "rows": (spoiled(TILE, None), BOTH, "its y differs"),
    "one NaN": (spoiled((3, 7), torch.nan), BOTH, "its y has NaN or infinity where the torch backend's has numbers"),
    "one infinity": (spoiled((3, 7), torch.inf), BOTH, "its y has NaN or infinity"),
    "z": (z_shifted, BOTH, "its z differs"),
    "gram": (with_gram(lambda gram: gram.t().contiguous()), BACKWARD, "its gram differs"),
    "gram NaN": (
        with_gram(lambda gram: gram * torch.nan),
        BACKWARD,
        "its gram differs from the torch backend's by inf",
    ),
    "no gram": (with_gram(lambda gram: None), BACKWARD, "its gram is missing, must be (8, 8) of torch.float32"),
    "dtype": (y_in_fp64, BOTH, "of torch.float64, must be "),
    "error": (raising, BOTH, "RuntimeError: out of resources: shared memory. In this process"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_backend_never_gives_a_result_away(plugged_in, fault, dtype):
    o, (primitive, directions, message) = problem(dtype=dtype), WRONG[fault]
    module, right = plugged_in(primitive), by_torch(step, o)
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        assert equal(step(o), right)
    assert len(caught) == len(directions)
    for each, direction in zip(caught, directions, strict=True):
        for part in (
            "the triton backend failed",
            direction,
            "R (8, 8)",
            f"torch {version('torch')}",  # which a build for CUDA says without its "+cu130"
            "'device': 'cpu'",
        ):
            assert part in str(each.message)
    module.calls.clear()
    assert equal(step(o), right)  # and the torch backend computes the rest, too
    assert module.calls == [direction for direction in BOTH if direction not in directions]


@pytest.mark.parametrize("itself", [False, True])
def test_out_is_never_written_by_a_wrong_backend(plugged_in, itself):
    def unless_out(*operands):
        y, z, gram = torch_backend.lowrank_linear(*operands)
        return (y if operands[-2] is None else y.mul_(2)), z, gram

    o = problem(N=96)
    module = plugged_in(unless_out)

    def delta(into):
        return lora_xs_delta(into if itself else o.x, o.A, o.R, o.B, o.s, out=into)

    memory = torch.randn(70, 3 * 96)
    outs = [memory.clone()[:, 96:192] for _ in range(3)]
    right = by_torch(delta, outs[0])
    with pytest.warns(UserWarning, match="its y differs") as caught:
        got = delta(outs[1])
    assert got is outs[1] and torch.equal(got, right) and len(caught) == 1
    assert torch.equal(delta(outs[2]), right) and len(module.calls) == 1
    assert equal([outs[1]._base[:, :96], outs[1]._base[:, 192:]], [memory[:, :96], memory[:, 192:]])
    lora_xs_delta(o.x, o.A, o.R, o.B, o.s)
    assert len(module.calls) == 3  # without `out` it is right


def test_out_keeps_its_own_gradient(plugged_in):
    o = problem()
    plugged_in(rounded_once)
    leaf = o.gY.clone().requires_grad_()
    for _ in range(2):
        out = lora_xs_delta(o.x, o.A, o.R, o.B, o.s, out=leaf * 3)
        assert torch.equal(*torch.autograd.grad(out.sum(), leaf), torch.full_like(leaf, 3))


def test_out_itself_as_x(plugged_in):
    o, module = problem(N=96), plugged_in(rounded_once)
    outs = [o.x.clone() for _ in range(2)]
    for out in outs:
        lora_xs_delta(out, o.A, o.R, o.B, o.s, out=out)
    assert torch.equal(*outs) and len(module.calls) == 3


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_operands_that_cannot_tell(plugged_in, recwarn, value):
    """The torch backend computes the call; the next one that can tell is checked."""
    o, module, strange = problem(), plugged_in(rounded_once), problem()
    strange.x[3 if value else 0 :] = value  # and so is z, which the gram is made of
    for _ in range(2):
        got, right = step(strange), by_torch(step, strange)
        assert equal([t.nan_to_num() for t in got], [t.nan_to_num() for t in right])
        assert all(t.isfinite().all() for t in got) == (value == 0)
    assert not any(first_use.checked("triton", direction).right for direction in BOTH) and not recwarn.list
    module.calls.clear()
    first = step(o)
    assert equal(step(o), first) and module.calls.count("forward") == 3 and not recwarn.list


def test_later_tries(plugged_in):
    """What cannot tell is not tried at each call."""
    o, module = problem(), plugged_in(rounded_once)
    o.x[:], tries = 0, []
    compared = first_use._compared
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(first_use, "_compared", lambda *operands: tries.append(call) or compared(*operands))
        for call in range(1, 102):  # noqa: B007
            lora_xs_linear(o.x, o.W, o.A, o.R, o.B, o.s)
    assert tries == [1, 2, 3, 10, 100] and not module.calls
    assert first_use.checked("triton", "forward").right == {}


def test_rows_of_zeros(plugged_in):
    """The gradient of a loss on one token says nothing of the other tiles."""

    def first_tile_only(*operands):
        y, z, gram = torch_backend.lowrank_linear(*operands)
        if operands[-1] is not None:
            y[64:] = 0
        return y, z, gram

    o, module = problem(), plugged_in(first_tile_only)
    full, o.gY = o.gY, torch.zeros_like(o.gY)
    o.gY[3] = full[3]
    with pytest.warns(UserWarning, match="its y differs"):
        assert equal(step(o), by_torch(step, o))
    o.gY, module.calls[:] = full, []
    assert equal(step(o), by_torch(step, o)) and "backward" not in module.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_padding_does_not_keep_a_right_backend_away(plugged_in, recwarn, dtype):
    """Its rows of gY are zeros in every step."""
    o, module = problem(dtype=dtype), plugged_in(rounded_once)
    o.gY[20:] = 0
    step(o)
    module.calls.clear()
    step(o)
    assert module.calls == ["forward", "backward"] and not recwarn.list


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("primitive", [rounded_once, torch_backend.lowrank_linear])
def test_terms_that_cancel(plugged_in, recwarn, primitive, dtype):
    """A bias that takes x W^T away, and rows of W whose sums are zero beside a large mean of x."""
    o = problem(K=512, dtype=dtype)
    away = torch.randn(512)
    x, W, bias = o.x, o.W, o.bias
    for mean in (30, 300):
        plugged_in(primitive)
        o.x, o.bias = (x + mean * away).to(dtype), (-mean * W.float() @ away).to(dtype)
        step(o)
        o.W, o.x, o.bias = (W.float() - W.float().mean(1, keepdim=True)).to(dtype), x + mean, bias
        step(o)
        o.W = W
    assert not recwarn.list


@pytest.mark.parametrize("dtype,scale", [(torch.bfloat16, 1e4), (torch.float16, 1e-3), (torch.float16, 1e-7)], ids=str)
def test_a_missing_delta_at_any_size(plugged_in, dtype, scale):
    """It is found, or the case is left undecided."""
    o = problem(64, 1024, 1024, 16, dtype)
    o.B, o.x = torch.linalg.qr(o.B.float())[0].to(dtype).contiguous(), o.x * scale
    plugged_in(delta_left_out)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        lora_xs_linear(o.x, o.W, o.A, o.R, o.B, o.s)
    assert list(first_use.checked("triton", "forward").right.values()) == ([] if scale == 1e-7 else [False])


def test_errors_of_others(plugged_in, monkeypatch, recwarn):
    """Only an error inside the backend is held against it."""

    def refused(*_):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    o, module = problem(), plugged_in(rounded_once)
    with monkeypatch.context() as other:
        other.setattr(torch.Tensor, "tolist", refused)
        assert equal(step(o), by_torch(step, o))
    step(o)
    assert module.calls == ["forward"] * 2 + ["backward"] * 2 and not recwarn.list


def in_numpy(x, W, A, R, B, s, bias=None, out=None, other=None):
    """As a kernel is: none of its work is seen by torch."""
    n = [None if t is None else t.detach().numpy() for t in (x, W, A, R, B)]
    z = n[0] @ n[2].T
    y = n[0] @ n[1].T + s * z @ n[3].T @ n[4].T
    return torch.from_numpy(y), torch.from_numpy(z), None if other is None else torch.from_numpy(s * z.T) @ other


@pytest.mark.parametrize("fault,op", [(None, "mm"), (None, "addmm"), ("undecided", "addmm"), ("wrong", "addmm")])
def test_selective_checkpointing(plugged_in, op, fault):
    """Forward and recomputation run the same operators, of which none is the check's."""
    o = problem(64, 96, 96)
    o.R *= 1e5
    again, silu = torch.randn(96, 96) / 10, torch.nn.functional.silu

    def layers(x, R, first=1.0):
        h = lora_xs_linear(silu(x @ again) * first, o.W, o.A, R, o.B, o.s)
        return lora_xs_linear(silu(silu(h) @ again), o.W, o.A, R, o.B, o.s)

    def gradients(run=layers):
        x, R = o.x.detach().requires_grad_(), o.R.detach().requires_grad_()
        return torch.autograd.grad(run(x, R, 0.0 if fault == "undecided" else 1.0), (x, R), o.gY)

    def checkpointed(*operands):
        contexts = functools.partial(
            checkpoint.create_selective_checkpoint_contexts, [getattr(torch.ops.aten, op).default]
        )
        return checkpoint.checkpoint(layers, *operands, use_reentrant=False, context_fn=contexts)

    right = by_torch(gradients)
    plugged_in(delta_left_out if fault == "wrong" else in_numpy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            for a, b in zip(gradients(checkpointed), right, strict=True):
                torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_a_mode_sees_what_it_sees_later(plugged_in):
    o, seen = problem(), []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    plugged_in(in_numpy)
    with Mode():
        lora_xs_linear(o.x, o.W, o.A, o.R, o.B, o.s)
        first = len(seen)
        lora_xs_linear(o.x, o.W, o.A, o.R, o.B, o.s)
    assert seen[:first] == seen[first:] and list(first_use.checked("triton", "forward").right.values()) == [True]


def test_memory_of_the_check(plugged_in):
    """No matrix of signs beside y: a few MB, whatever N is."""
    o = problem(1, 60000, 32, 8, torch.bfloat16)
    plugged_in()
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            largest.append(max((t.nbytes for t in tree_leaves(result) if isinstance(t, torch.Tensor)), default=0))
            return result

    compared = first_use._compared.__wrapped__.__wrapped__  # which modes see
    with Sizes():
        compared(backends.load("triton"), o.x, o.W, o.A, o.R, o.B, o.s, None, None, None)
    assert max(largest) <= 5 << 20


def test_one_warning(plugged_in):
    """Not one a case; Ctrl-C loses neither the warning nor what was found."""
    o = problem(T=600)
    plugged_in(delta_left_out)
    with pytest.warns(UserWarning, match="failed its check") as caught:
        for T in (600, 300, 100, 7):
            lora_xs_linear(o.x[:T], o.W, o.A, o.R, o.B, o.s)
    assert len(caught) == 1
    known = first_use.checked("triton", "forward").right
    assert list(known.values()) == [False] * 4
    for k in itertools.count(1):
        first_use._checked.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            interrupted = interrupted_at(k, lambda: lora_xs_delta(o.x[:3], o.A, o.R, o.B, o.s))
            lora_xs_delta(o.x[:3], o.A, o.R, o.B, o.s)
        assert caught and list(first_use.checked("triton", "forward").right.values()) == [False]
        if not interrupted:
            break


def test_overflow_is_not_a_fault(plugged_in, recwarn):
    """In fp16 y can be infinite where x is not, as while a GradScaler looks for its scale."""
    o, module = problem(dtype=torch.float16), plugged_in(rounded_once)
    large = problem(dtype=torch.float16)
    large.x *= 5000
    large.W *= 10
    o.B *= 100
    assert lora_xs_linear(large.x, large.W, o.A, o.R, o.B, o.s).isinf().any()
    assert not first_use.checked("triton", "forward").right and module.calls
    lora_xs_linear(o.x, o.W, o.A, o.R, o.B, o.s)
    assert list(first_use.checked("triton", "forward").right.values()) == [True] and not recwarn.list


def test_what_is_another_case(plugged_in):
    """Whatever lets another kernel run, and not the numbers."""
    module, o = plugged_in(), problem()

    def calls(x=o.x, W=o.W, A=o.A, R=o.R, B=o.B, s=o.s, bias=None):
        module.calls.clear()
        lora_xs_linear(x, W, A, R, B, s, bias)
        return len(module.calls)

    assert calls() == 2 and calls(o.x + 1, R=o.R + 1, s=2.0) == 1
    assert calls(torch.randn(74, 96)) == 1  # of 65 to 79 rows
    turned = [t.t().contiguous().t() for t in (o.x, o.W, o.A, o.R, o.B)]
    unaligned = torch.randn(70 * 96 + 1)[1:].view(70, 96)
    for other in (
        dict(x=torch.randn(80, 96)), dict(x=torch.randn(97, 96)), dict(x=torch.randn(134, 96)), dict(x=unaligned),
        dict(x=torch.randn(70, 192)[:, :96]), dict(x=torch.randn(1, 96).expand(70, 96)),
        dict(x=torch.randn(70 * 96).as_strided((70, 96), (16, 1))),
        dict(bias=o.bias), dict(R=o.R.double()),
        *(dict([each]) for each in zip("xWARB", turned, strict=True)),
    ):  # fmt: skip
        assert (calls(**other), calls(**other)) == (2, 1), other.keys()
    module.plan = lambda x, A, B: "another plan"
    assert (calls(), calls()) == (2, 1)
    module.plan = lambda x, A, B: None  # the backend hands such calls to the torch backend itself
    assert calls() == 1


def test_threads_at_once(plugged_in):
    """No thread gets an unchecked or a wrong result; only threads that fail at the same time warn more than once."""
    o, right, results = problem(), by_torch(step, problem()), []
    gate = threading.Barrier(4)

    def primitive(*operands):
        return delta_left_out(*operands)

    plugged_in(primitive)

    def work():
        gate.wait()
        for _ in range(3):
            results.append(step(o))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=work) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert len(results) == 12 and all(equal(each, right) for each in results)
    assert 2 <= len(caught) <= 8  # of the forward and of the backward


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_during_a_check(plugged_in):
    o, children = problem(), []

    def primitive(*operands):
        if not children:
            children.append(os.fork())
            if children == [0]:  # forward alone: torch's builds for CUDA allow no backward after a fork
                try:
                    torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork: more would wait for ever
                    os._exit(lora_xs_linear(o.x, o.W, o.A, o.R, o.B, o.s).shape != (70, 200))
                finally:
                    os._exit(1)  # and never on with pytest
        return torch_backend.lowrank_linear(*operands)

    plugged_in(primitive)
    step(o)
    assert os.waitpid(children[0], 0)[1] == 0


def test_interrupted_at_every_line(plugged_in):
    o = problem(T=3)
    right = by_torch(lora_xs_delta, o.x, o.A, o.R, o.B, o.s, out=o.gY.clone())
    module = plugged_in()
    for k in itertools.count(1):
        first_use._checked.clear()
        out = o.gY.clone()
        ended = not interrupted_at(k, lambda out=out: lora_xs_delta(o.x, o.A, o.R, o.B, o.s, out=out))
        assert torch.equal(out, right) or (not ended and torch.equal(out, o.gY))
        assert all(each.right in ({}, dict.fromkeys(each.right, True)) for each in first_use._checked.values())
        if ended:
            break
    assert k > 50 and module.calls


def test_no_memory_for_the_check(plugged_in, recwarn):
    def primitive(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    o, module = problem(), plugged_in(primitive)
    assert equal(step(o), by_torch(step, o)) and not recwarn.list
    module.primitive = torch_backend.lowrank_linear
    module.calls.clear()
    step(o)
    assert module.calls == ["forward"] * 2 + ["backward"] * 2


@pytest.mark.parametrize("wrong", [False, True])
def test_compiled(plugged_in, recwarn, wrong):
    o, module = problem(), plugged_in(delta_left_out if wrong else rounded_once)
    call = torch.compile(lora_xs_linear, fullgraph=True, backend="aot_eager")
    first = step(o, call)
    assert len(module.calls) == (2 if wrong else 4)
    assert equal(step(o, call), first) and len(module.calls) == (2 if wrong else 6)
    assert equal(first, by_torch(step, o)) == wrong
    assert sum("failed its check" in str(each.message) for each in recwarn.list) == 2 * wrong


def test_captured(plugged_in, monkeypatch, recwarn):
    """During a capture nothing is compared: what has not been checked is the torch backend's."""
    o, module = problem(), plugged_in(rounded_once)
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert equal(step(o), by_torch(step, o)) and not module.calls
    capturing[0] = False
    first = step(o)
    capturing[0] = True
    module.calls.clear()
    assert equal(step(o), first) and module.calls == ["forward", "backward"] and not recwarn.list


def test_without_memory(plugged_in):
    """Under FakeTensorMode no kernel runs."""
    module = plugged_in()
    with FakeTensorMode():
        o = [torch.empty(shape) for shape in ((70, 96), (200, 96), (8, 96), (8, 8), (200, 8))]
        assert lora_xs_linear(*o, 1.0).shape == (70, 200)
    assert not module.calls and not first_use.checked("triton", "forward").right


def test_a_call_that_is_transformed_runs_no_kernel(plugged_in):
    module, o = plugged_in(), problem()
    call = lambda x: lora_xs_linear(x, o.W, o.A, o.R, o.B, o.s)  # noqa: E731
    found = torch.func.vmap(call)(o.x[None])
    assert not module.calls
    torch.testing.assert_close(found[0], call(o.x))


def test_setting_0(plugged_in, monkeypatch, recwarn):
    monkeypatch.setenv("LORAXS_CHECK", "0")
    o, module = problem(), plugged_in(delta_left_out)
    step(o)
    assert module.calls == ["forward", "backward"] and not recwarn.list


@pytest.mark.parametrize("name", [None, "triton"])
def test_setting_always(plugged_in, monkeypatch, name):
    """Every call is checked, of a forced backend, too."""
    monkeypatch.setenv("LORAXS_CHECK", "always")
    o, module = problem(), plugged_in()
    with lx.backend(name):
        for _ in range(2):
            step(o)
        assert module.calls == (["forward"] * 2 + ["backward"] * 2) * 2
        module.primitive = delta_left_out
        with pytest.warns(UserWarning, match="its y differs"):
            assert equal(step(o), by_torch(step, o))


def test_an_empty_setting_is_the_default(monkeypatch):
    monkeypatch.setenv("LORAXS_CHECK", "")
    assert first_use.setting() == "once"


def test_a_setting_that_is_none(plugged_in, monkeypatch):
    monkeypatch.setenv("LORAXS_CHECK", "yes")
    plugged_in()
    for _ in range(2):
        with pytest.raises(ValueError, match="LORAXS_CHECK: got 'yes', must be one of 'once', '0', 'always'"):
            step(problem())


def test_a_forced_backend_is_not_checked(plugged_in, recwarn):
    o, module = problem(), plugged_in(delta_left_out)
    with lx.backend("triton"):
        step(o)
    assert module.calls == ["forward", "backward"] and not recwarn.list


def test_random_numbers_go_on_as_they_were(plugged_in):
    plugged_in()
    before = torch.get_rng_state()
    step(problem())
    assert torch.equal(torch.get_rng_state(), before)


def test_as_an_error(plugged_in):
    """Where warnings are errors the first call raises one, with `out` as it was, and the next one is right."""
    o = problem()
    plugged_in(delta_left_out)
    out = o.gY.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="failed its check"):
            lora_xs_delta(o.x, o.A, o.R, o.B, o.s, out=out)
        assert torch.equal(out, o.gY)
        right = by_torch(lora_xs_delta, o.x, o.A, o.R, o.B, o.s, out=o.gY.clone())
        assert torch.equal(lora_xs_delta(o.x, o.A, o.R, o.B, o.s, out=out), right)


def kernels_pass_and_a_fault_does_not(monkeypatch, name, o, W):
    """That `o` runs on the backend's own kernels, agrees in both directions, and does not with another R."""
    backend = backends.load(name)
    own = backend.lowrank_linear

    def call(x, R):
        if W:
            return lora_xs_linear(x, o.W, o.A, R, o.B, o.s, o.bias)
        return lora_xs_delta(x, o.A, R, o.B, o.s)

    def gradients():
        x, R = o.x.detach().requires_grad_(), o.R.detach().requires_grad_()
        return torch.autograd.grad(call(x, R), (x, R), o.gY)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* failed its check")
        first = gradients()
        assert equal(gradients(), first)
    for direction in BOTH:
        assert list(first_use.checked(name, direction).right.values()) == [True]
    first_use._checked.clear()
    monkeypatch.setattr(
        backend, "lowrank_linear", lambda x, W, A, R, *more, **named: own(x, W, A, R * 1.5, *more, **named)
    )
    with pytest.warns(UserWarning, match=f"the {name} backend failed its check at first use: its y differs") as caught:
        assert equal(gradients(), by_torch(gradients))
    assert sum("failed its check" in str(each.message) for each in caught) == 2


@pytest.mark.skipif(ON_CPU is None, reason="runs with TRITON_INTERPRET=1 or LORAXS_EMULATED=1")
@pytest.mark.parametrize("W", [True, False])
@pytest.mark.parametrize("shape", [(5, 72, 104, 12), (300, 264, 136, 16)], ids=str)
def test_kernels_on_a_cpu(monkeypatch, chosen, shape, W):
    chosen(ON_CPU)
    if ON_CPU == "cuda" and shape[0] > TOKENS:  # so few rows would be left to the torch backend
        monkeypatch.setattr(backends.load("cuda"), "pick", lambda *_: Rows(1, 1, True))
    kernels_pass_and_a_fault_does_not(monkeypatch, ON_CPU, problem(*shape, torch.bfloat16), W)


@pytest.mark.parametrize("W", [True, False])
@pytest.mark.parametrize("r", [16, 64])
@pytest.mark.parametrize("T", [64, 512, 4096])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.gpu(f"{n} backend")) for n in ("triton", "cuda")])
def test_kernels_on_a_gpu(monkeypatch, chosen, name, T, r, W):
    if reason := backends.unavailable(name):
        pytest.skip(f"{name} backend: {reason}")
    chosen(name)
    o = problem(T, 4096, 4096, r, torch.bfloat16, device="cuda")
    if backends.load(name).plan(o.x, o.A, o.B) is None:
        pytest.skip("the torch backend computes it")
    kernels_pass_and_a_fault_does_not(monkeypatch, name, o, W)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.gpu(f"{n} backend")) for n in ("triton", "cuda")])
def test_captured_on_a_gpu(monkeypatch, chosen, name):
    if reason := backends.unavailable(name):
        pytest.skip(f"{name} backend: {reason}")
    chosen(name)
    o = problem(64, 4096, 4096, 16, torch.bfloat16, device="cuda")
    backend, calls = backends.load(name), []
    own = backend.lowrank_linear
    monkeypatch.setattr(backend, "lowrank_linear", lambda *args, **named: calls.append(1) or own(*args, **named))

    def captured():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = lora_xs_linear(o.x, o.W, o.A, o.R, o.B, o.s)
        graph.replay()
        return y

    right = by_torch(lora_xs_linear, o.x, o.W, o.A, o.R, o.B, o.s)
    torch.cuda.synchronize()
    assert_accurate(captured(), right, right.double(), torch.bfloat16)
    assert not calls and not first_use.checked(name, "forward").right
    lora_xs_linear(o.x, o.W, o.A, o.R, o.B, o.s)
    assert len(calls) == 2
    assert_accurate(captured(), right, right.double(), torch.bfloat16)
    assert len(calls) == 3
