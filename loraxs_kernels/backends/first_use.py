"""A backend that was chosen, not asked for by name, is compared with the torch backend when a kernel is first used.

A case is all that makes another kernel run, or the same one in another way (`_case`).  The first call of a case runs
the backend twice on the operands of the call.  First with an R and an s for the test, by which the adapter's part of y
is as large as the rest: R starts at 1e-5, and beside x W^T a missing part that small would not be seen.  Then with the
R and s of the call; this result is the caller's, so the first call has the same bits as all later ones.  Both times y,
z and the gram must agree with the torch backend's.  Of y sums of 64 or more columns with random signs are compared,
with those of a problem that has so few columns: there is no second y.  A missing tile or term shows in them; one wrong
element among many can be too small to.  By count this takes, beside the call's own memory, about a fifth of y, a tenth
of W and 12 MB, and a copy of `out`, so that a wrong result is never in it.  What takes most time is to read W in fp32
(bench/results/cpu/2026-11-27-8db62fc-first-use.json).

If they disagree, or the backend raises an error, the torch backend computes that case in this process, beginning with
this call; the first such case of a backend and direction gives a warning that says why.  A call whose operands cannot
tell (NaN, infinity, only zeros, numbers near the smallest), or during whose check memory runs out, gets the torch
backend's result, and a later one is checked (see TRIES).  Rows of zeros, which gY has for padding and masked labels,
hide what is wrong with their tiles: where 16 in a row are zeros the comparison is made again, with random numbers in
their place.  Under a TorchDispatchMode (selective checkpointing) the first call of a case decides for good: a
recomputation must run what the forward ran.  While a CUDA graph is captured nothing can be compared: a case not checked
before is captured with the torch backend's kernels, so run a step before the capture, as torch asks for anyway.

LORAXS_CHECK is read at the first call: "once" is the default, "0" checks nothing, "always" checks every call outside
capture, also of a backend that is forced.  There are no locks: two threads may check a case at the same time, and
each returns a result that has been checked.
"""

from __future__ import annotations

import importlib
import math
import os
import warnings
from collections.abc import Hashable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad
from torch.utils import _python_dispatch

from ..padding import MULTIPLE, readable_columns
from . import torch as torch_backend
from .device import on, plain

SETTINGS = ("once", "0", "always")
GROUP, MOST_GROUPS = 64, 256  # columns of y in a sum, more where there would be more sums
CHUNK = 1 << 20  # elements of which the sums are made at a time
TRIES = 3  # to check a case at its first calls; then at the 10th, the 100th, and every 1000th
ALLOWED = 8  # roundings by which a sum may differ: both sides make up to three, some on larger parts of it
TF32 = 2.0**-10  # a rounding of TF32, in which either side may multiply fp32

# Modes that record what runs (selective checkpointing, make_fx) must not see the comparison.
_without_modes = getattr(_python_dispatch, "_disable_current_modes", lambda: lambda call: call)

Result = tuple[Tensor, Tensor, Tensor | None]


@cache
def setting() -> str:
    """LORAXS_CHECK, one of SETTINGS."""
    value = os.environ.get("LORAXS_CHECK") or "once"
    if value not in SETTINGS:
        raise ValueError(f"LORAXS_CHECK: got {value!r}, must be one of {', '.join(map(repr, SETTINGS))}")
    return value


def checked(name: str, direction: str) -> Checked:
    """The `lowrank_linear` of a backend, checked at the first use of each case; the same object every time."""
    return _checked.get((name, direction)) or _checked.setdefault((name, direction), Checked(name, direction))


class Checked:
    """A backend's primitive in one direction, and what is known of its cases."""

    def __init__(self, name: str, direction: str) -> None:
        self.name, self.direction, self.setting = name, direction, setting()
        self.backend = importlib.import_module(f"{__package__}.{name}")
        self.right: dict[tuple, bool] = {}  # for each case: whether the backend's results were right
        self.calls: dict[tuple, int] = {}  # for each case that no check has decided: its calls so far
        self.warned = False

    def __call__(
        self,
        x: Tensor,
        W: Tensor | None,
        A: Tensor,
        R: Tensor,
        B: Tensor,
        s: float,
        bias: Tensor | None = None,
        out: Tensor | None = None,
        other: Tensor | None = None,
    ) -> Result:
        """(y, z, gram), see backends/torch.py."""
        right = True
        if self.setting != "0" and (plan := self.backend.plan(x, A, B)) is not None:
            case = _case(plan, x, W, A, R, B, bias, out, other)
            right = self.right.get(case)
            if right is None or (right and self.setting == "always"):
                return self._check(case, x, W, A, R, B, s, bias, out, other)
        backend = self.backend if right else torch_backend
        return backend.lowrank_linear(x, W, A, R, B, s, bias, out, other)

    def _check(self, case: tuple | None, *operands: Any) -> Result:
        """The result of the call, and what it tells of the case."""
        x, W, A, R, B, s, bias, out, other = operands
        x, W, A, R, B, bias, other = plain(x, W, A, R, B, bias, other)  # or an error that is not the backend's
        operands = (x, W, A, R, B, s, bias, out, other)
        unchecked = case is None or torch.compiler.is_compiling() or _capturing(x)
        if not unchecked and self.setting == "once":
            calls = self.calls[case] = self.calls.get(case, 0) + 1
            unchecked = calls > TRIES and calls not in (10, 100) and calls % 1000 != 0
        if unchecked:
            backend = self.backend if self.right.get(case) else torch_backend
            return backend.lowrank_linear(*operands)
        result, sure = None, False
        try:
            result, sure = _compared(self.backend, *operands)
            if not sure:
                sure = _compared(self.backend, _without_zeros(x), *operands[1:])[1]
        except _Wrong as found:
            self._failed(case, self._report(str(found), *operands))
        except Exception:  # _Undecided, no memory, or an error of the comparison itself, which is not the backend's
            pass
        if sure:
            self.right.setdefault(case, True)
            self.calls.pop(case, None)
        if case[-1]:  # a mode sees this call: it decides for good, so that checkpointing finds the same operators again
            backend = self.backend if self.right.setdefault(case, False) else torch_backend
            return backend.lowrank_linear(*operands)
        if result is None or out is None:
            return result or torch_backend.lowrank_linear(*operands)
        out.detach().copy_(result[0])
        return out, *result[1:]

    def _failed(self, case: tuple, message: str) -> None:
        """Warn, once in a process, and record it: after Ctrl-C neither is done, where warnings are errors both are."""
        error = None
        if not self.warned:
            try:
                warnings.warn(message, stacklevel=2)
            except Warning as raised:
                error = raised
        self.right[case], self.warned = False, True
        if error is not None:
            raise error

    def _report(self, wrong: str, x: Tensor, W: Tensor | None, A: Tensor, R: Tensor, *more: Any) -> str:
        from ..info import environment  # it imports the backends

        names = ("x", "W", "A", "R", "B", "s", "bias", "out", "other")
        operands = {name: t for name, t in zip(names, (x, W, A, R, *more), strict=True) if isinstance(t, Tensor)}
        case = ", ".join(f"{name} {tuple(t.shape)} strides {t.stride()}" for name, t in operands.items())
        here = environment(x.device)
        versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
        return (
            f"the {self.name} backend failed its check at first use: {wrong}. In this process the torch backend "
            "computes this case in its place: results are right, but may take longer. Please report this message to "
            "the authors of loraxs_kernels. LORAXS_CHECK=0 turns the check off. "
            f"Case: {self.direction}, {x.dtype}, R {R.dtype}, {case}. "
            f"Device: {x.device}, {here['machine']}. Versions: {versions}"
        )


_checked: dict[tuple[str, str], Checked] = {}


class _Wrong(Exception):
    """The backend's result is not the torch backend's; says what differs, and by how much."""


class _Undecided(Exception):
    """What these operands cannot tell."""


def _capturing(x: Tensor) -> bool:
    """Whether work on x goes into a CUDA graph."""
    if not torch.cuda.is_initialized():
        return False
    with on(x.device):
        return torch.cuda.is_current_stream_capturing()


def _case(
    plan: Hashable,
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    other: Tensor | None,
) -> tuple | None:
    """All that decides which kernels run and how: the plan, sizes, dtypes, which operands there are and how they lie.

    Of T its octave, by which a program goes on to further tiles, how many units of 16 rows of the last 128 are used,
    and whether the last unit is full.  Last, whether a TorchDispatchMode is active, see `_check`.
    None: these are tensors without memory (FakeTensor, those of torch.func).
    """
    if isinstance(x, FakeTensor):
        return None
    (N, r), T, x_lies = B.shape, x.shape[0], _lies(x)
    try:
        rows = (T.bit_length(), (-T & 127) >> 4, T & 15 == 0)
        past = (T * max(N, *x_lies) >> 29).bit_length()  # offsets that leave 32 bits
        zeros = r % MULTIPLE and (readable_columns(B), readable_columns(A.t()))
        address, ends = x.data_ptr(), (A.data_ptr() & 15, R.data_ptr() & 15, B.data_ptr() & 15)
        strides = (x_lies, A.stride(), R.stride(), B.stride())
        base = W if W is None else (W.data_ptr() & 15, W.stride())
        shift = bias if bias is None else (bias.data_ptr() & 15, bias.stride())
        into = out if out is None else (out.data_ptr() & 15, out.data_ptr() == address, _lies(out))
        gram = other if other is None else (other.data_ptr() & 15, _lies(other))
        common = (plan, N, A.shape, x.dtype, R.dtype, x.device, rows, past, zeros, address & 15, ends, strides)
        return common, base, shift, into, gram, torch._C._len_torch_dispatch_stack() > 0
    except RuntimeError:
        return None


def _lies(t: Tensor) -> tuple[int, ...]:
    """The strides of a matrix; of a transposed one, whose pitch grows with T, the pitch in its last 4 bits."""
    rows, columns = strides = t.stride()
    return strides if rows != 1 or columns == 1 else (rows, columns & 15, columns < t.shape[0])


@torch.no_grad()
@_without_modes()
def _compared(
    backend: ModuleType,
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    s: float,
    bias: Tensor | None,
    out: Tensor | None,
    other: Tensor | None,
) -> tuple[Result, bool]:
    """The backend's (y, z, gram), where y is not yet in `out`, and if that is enough to trust it; _Wrong or _Undecided.

    Sizes are root mean squares, which are what sums of terms with random signs have: their squares add up.
    """
    (T, K), (N, r) = x.shape, B.shape
    wide, limits = torch.promote_types(x.dtype, torch.float32), torch.finfo(x.dtype)
    small = limits.smallest_normal  # a number below it keeps fewer digits
    random = torch.Generator().manual_seed(0)
    width = max(GROUP, -(-N // MOST_GROUPS))
    groups = -(-N // width)
    # A sum over a group is as large as one element, if its terms have random signs.
    signs = torch.randint(2, (groups, width), generator=random, device="cpu") * 2 - 1
    signs = signs.to(x.device, wide) * width**-0.5

    def folded(t: Tensor) -> tuple[Tensor, Tensor]:
        """(M, N) -> (M, groups): the sums of each group with its signs, and its mean squares."""
        parts = []
        for rows in t.split(max(1, CHUNK // N)):
            rows = pad(rows.to(wide), (0, groups * width - N)).unflatten(1, (groups, width))
            parts.append(((rows * signs).sum(2), rows.square().mean(2)))
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def squares(t: Tensor) -> Tensor:
        rows = t.split(max(1, CHUNK // t.shape[1]))
        return torch.cat([torch.linalg.vector_norm(some, dim=1, dtype=wide) for some in rows]).square_()

    z, x_squares = torch_backend.shrink(x, A.t()), squares(x)
    B_few, B_squares = folded(B.t())
    B_squares = B_squares.mean(0)
    rest_few, rest_squares = x_squares.new_zeros(T, groups), x_squares.new_zeros(T, groups)  # not the adapter's part
    if W is not None:
        W_few, W_squares = folded(W.t())
        if wide is not x.dtype:  # in two parts: the second has the digits that the first rounds off
            W_few = torch.cat([high := W_few.to(x.dtype), (W_few - high).to(x.dtype)], 1)
        products = torch_backend.shrink(x, W_few).split(groups, 1)
        rest_few, rest_squares = sum(products), torch.outer(x_squares, W_squares.mean(0))
    for t in (bias if bias is None else bias[None], out):
        if t is not None:
            t_few, t_squares = folded(t)
            rest_few, rest_squares = rest_few + t_few, rest_squares + t_squares

    test_R = _twin(R).copy_(torch.randn(r, r, generator=random, dtype=torch.float32, device="cpu"))
    u = z @ test_R.to(z.dtype).t()
    sizes = torch.stack(
        [rest_squares.mean(), rest_squares.amax(), squares(u).mean() * B_squares.mean(), u.abs().amax()]
    )
    rest, most, delta, largest = sizes.tolist()
    if W is None and bias is None and out is None:
        rest = 1.0
    if not (0 < delta < math.inf and small**2 < rest and most < math.inf):
        raise _Undecided
    test_s = min(math.sqrt(rest / delta), limits.max / 16 / largest)
    if test_s**2 * delta < rest / 16:
        raise _Undecided
    scratch = None if out is None else _twin(out)

    def run(R: Tensor, s: float) -> Result:
        x_read = x
        if out is not None:
            scratch.copy_(out)
            x_read = scratch if x.data_ptr() == out.data_ptr() else x
        try:
            y, z_found, gram = backend.lowrank_linear(x_read, W, A, R, B, s, bias, scratch, other)
        except (torch.OutOfMemoryError, MemoryError):
            raise _Undecided from None
        except Exception as error:
            raise _Wrong(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
        R = R.to(z.dtype)
        _agree("z", z_found, z, torch.outer(x_squares, squares(A) / K).sqrt_(), TF32)
        if other is not None:
            size = (z.square().t() @ other.square()).sqrt_() * max(abs(s), small)
            _agree("gram", gram, torch_backend.scaled_mm(z.t(), other, s, R), size, TF32)
        _alike("y", y, (T, N), x.dtype)
        u = torch_backend.scaled_mm(z, R.t(), s, z)
        y_few = torch.addmm(rest_few, u, B_few)
        y_found, y_squares = folded(y)
        lost = (y_few.isfinite() & ~y_found.isfinite()).any(1).nonzero()[:16, 0]
        if len(lost):  # an element can be too large for its dtype where the sums are not
            of_out = None if out is None else out[lost]
            if torch_backend.lowrank_linear(x[lost], W, A, R, B, s, bias, of_out)[0].isfinite().all():
                raise _Wrong("its y has NaN or infinity where the torch backend's has numbers")
            raise _Undecided
        # Terms round where they cancel each other, and a sum of terms with one sign is larger than they are.
        size = torch.addr(rest_squares + y_squares, squares(u) + r * small**2, B_squares).sqrt_().add_(small)
        _agree("y", y_found, y_few, size, max(limits.eps, TF32))
        return y, z_found, gram

    run(test_R, test_s)
    result = run(R, s)
    return result, pad(x_squares, (0, -T % 16)).view(-1, 16).any(1).all().item()


@torch.no_grad()
@_without_modes()
def _without_zeros(x: Tensor) -> Tensor:
    """A copy of x (T, K), which lies as x does, with random numbers of the size of x's in place of rows of zeros."""
    numbers = torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(0), dtype=x.dtype, device=x.device)
    filled = x.any(1, keepdim=True)
    size = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)) / x.shape[1] ** 0.5
    numbers *= (size / filled.sum() ** 0.5).to(x.dtype)
    return _twin(x).copy_(torch.where(filled, x, numbers))


def _alike(name: str, found: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if found is None or found.shape != shape or found.dtype != dtype:
        got = "missing" if found is None else f"{tuple(found.shape)} of {found.dtype}"
        raise _Wrong(f"its {name} is {got}, must be {tuple(shape)} of {dtype}")


def _agree(name: str, found: Tensor | None, right: Tensor, size: Tensor, rounding: float) -> None:
    """Raise _Wrong where they differ by more than ALLOWED roundings of `right` and of its terms, which have `size`."""
    _alike(name, found, right.shape, right.dtype)
    whole = size + right.abs()
    error = (found - right).abs() / whole.clamp(min=torch.finfo(whole.dtype).tiny)
    error = error.where(whole.isfinite() & ~error.isnan(), math.inf).amax()  # y, and so its size, can be infinite
    known, something, error = torch.stack([right.isfinite().all(), whole.any(), error]).tolist()
    if not (known and something):
        raise _Undecided
    if error > ALLOWED * rounding:
        raise _Wrong(
            f"its {name} differs from the torch backend's by {error:.2g} of the size of {name}, "
            f"at most {ALLOWED * rounding:.2g} is allowed"
        )


def _twin(t: Tensor) -> Tensor:
    """Memory for a matrix like t, that lies and is aligned as t does."""
    if 0 in t.stride():
        return torch.empty_like(t)
    start = t.data_ptr() % 16 // t.element_size()
    extent = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1
    return t.new_empty(start + extent).as_strided(t.shape, t.stride(), start)
