"""A backend that was chosen, not asked for by name, is compared with the torch backend when a kernel is first used.

A case is all that makes another kernel run, or the same one in another way (`_case`).  The first call of a case runs
the backend twice on the operands of the call.  First with an R and an s for the test, by which the adapter's part of y
is as large as the rest: R starts at 1e-5, and beside x W^T a missing part that small would not be seen.  Then with the
R and s of the call; this result is the caller's, so the first call has the same bits as all later ones.  Both times y,
z and the gram must agree with the torch backend's.  Of y sums of 64 columns with random signs are compared, which the
torch backend computes as a problem with so few columns: every element takes part, and there is no second y, only sums
that together take about an eighth of its memory.  A call with `out` needs a copy of it, so that a wrong result is never
in `out` itself.

If they disagree, or the backend raises an error, the torch backend computes that case in this process, beginning with
this call, and one warning says why.  A call whose operands cannot tell (NaN, infinity, only zeros), or during whose
check memory runs out, gets the torch backend's result, and the next call is checked.  While a CUDA graph is captured
nothing can be compared: a case not checked before is captured with the torch backend's kernels, so run a step before
the capture, as torch asks for anyway.

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

from ..padding import MULTIPLE, readable_columns
from . import torch as torch_backend
from .device import on, plain

SETTINGS = ("once", "0", "always")
GROUP, MOST_GROUPS = 64, 256  # columns of y in a sum, more where there would be more sums
ALLOWED = 8  # roundings by which a sum may differ: both sides make up to three, some on larger parts of it
TF32 = 2.0**-10  # a rounding of TF32, in which either side may multiply fp32

Result = tuple[Tensor, Tensor, Tensor | None]


@cache
def setting() -> str:
    """LORAXS_CHECK, one of SETTINGS."""
    value = os.environ.get("LORAXS_CHECK", "once")
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
        self.right: dict[tuple, bool] = {}  # by case: whether the backend's results were
        self.warned: dict[tuple, object] = {}

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

    def _check(
        self,
        case: tuple | None,
        x: Tensor,
        W: Tensor | None,
        A: Tensor,
        R: Tensor,
        B: Tensor,
        s: float,
        bias: Tensor | None,
        out: Tensor | None,
        other: Tensor | None,
    ) -> Result:
        """The result of the call, and what it tells of the case."""
        x, W, A, R, B, bias, other = plain(x, W, A, R, B, bias, other)  # or an error that is not the backend's
        operands = (x, W, A, R, B, s, bias, out, other)
        if case is None or torch.compiler.is_compiling() or _capturing(x):
            backend = self.backend if self.right.get(case) else torch_backend
            return backend.lowrank_linear(*operands)
        wrong = None
        try:
            result = _compared(self.backend, *operands)
            self.right.setdefault(case, True)
            return result
        except (_Undecided, torch.OutOfMemoryError, MemoryError):
            pass
        except _Wrong as found:
            wrong = str(found)
        except Exception as error:
            wrong = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if wrong is not None:
            self.right[case] = False
            mark = object()
            if self.warned.setdefault(case, mark) is mark:
                warnings.warn(self._report(wrong, *operands), stacklevel=3)
        return torch_backend.lowrank_linear(*operands)

    def _report(self, wrong: str, x: Tensor, W: Tensor | None, A: Tensor, R: Tensor, *more: Any) -> str:
        from ..info import environment  # which imports the backends

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

    Of T its octave, by which a program goes on to further tiles, and how much of the last tile is used.
    None: these are tensors without memory (FakeTensor, those of torch.func).
    """
    if isinstance(x, FakeTensor):
        return None
    T = len(x)
    try:
        return (
            plan,
            x.device,
            x.dtype,
            T.bit_length(),
            T & -T & 127,
            A.shape,
            B.shape,
            R.dtype,
            A.shape[0] % MULTIPLE and (readable_columns(B), readable_columns(A.t())),
            out is not None and out.data_ptr() == x.data_ptr(),
            _lies(x),
            A.stride(),
            R.stride(),
            B.stride(),
            W if W is None else (W.stride(), W.data_ptr() & 15),
            (A.data_ptr() & 15, R.data_ptr() & 15, B.data_ptr() & 15),
            out if out is None else _lies(out),
            other if other is None else _lies(other),
            bias if bias is None else (bias.stride(), bias.data_ptr() & 15),
        )
    except RuntimeError:
        return None


def _lies(t: Tensor) -> tuple[bool, bool, int, int]:
    """Whether columns or rows of a matrix are contiguous, and how far from multiples of 16 they and it begin."""
    rows, columns = t.stride()
    pitch = rows * columns
    return rows == 1, columns == 1, pitch & -pitch & 15, t.data_ptr() & 15


@torch.no_grad()
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
) -> Result:
    """The backend's (y, z, gram); or _Wrong or _Undecided, with `out` as it was.

    Sizes are root mean squares, which are what sums of terms with random signs have: their squares add up.
    """
    (T, K), (N, r) = x.shape, B.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    small = torch.finfo(x.dtype).smallest_normal  # a number below it keeps fewer digits
    random = torch.Generator().manual_seed(0)
    width = max(GROUP, -(-N // MOST_GROUPS))
    groups = -(-N // width)

    def squares(t: Tensor) -> Tensor:
        return torch.linalg.vector_norm(t, dim=-1, dtype=wide).square_()

    def grouped(t: Tensor) -> Tensor:
        """Mean squares of (..., N) over each group."""
        full = N // width * width
        parts = [squares(t[..., :full].unflatten(-1, (-1, width)))] if full else []
        return torch.cat([*parts, squares(t[..., None, full:])] if full < N else parts, dim=-1) / width

    # (groups, N): a sum over a group is as large as one element, if its terms have random signs.
    signs = (torch.randint(2, (N,), generator=random, device="cpu") * 2 - 1).to(x.device, x.dtype) * width**-0.5
    group = torch.arange(groups, device=x.device)[:, None]
    fold = signs * (group == torch.arange(N, device=x.device) // width)
    few = [t if t is None else fold @ t for t in (W, B, bias)]

    z = torch_backend.shrink(x, A.t())
    x_squares, B_squares = squares(x), grouped(squares(B).sqrt_()) / r
    test_R = _twin(R).copy_(torch.randn(r, r, generator=random, dtype=torch.float32, device="cpu"))
    u = z @ test_R.to(z.dtype).t()
    rest = x_squares.new_zeros(())
    if W is not None:
        rest += x_squares.mean() * squares(W).mean() / K
    if out is not None:
        rest += squares(out).mean() / N
    elif bias is not None:
        rest += squares(bias) / N
    rest, delta, largest = torch.stack([rest, squares(u).mean() * B_squares.mean(), u.abs().amax()]).tolist()
    if not (0 < delta < math.inf and rest < math.inf):
        raise _Undecided
    test_s = min(math.sqrt((rest or 1.0) / delta), 4096 / largest)  # u is within the range of fp16
    scratch = None if out is None else _twin(out)

    def run(R: Tensor, s: float) -> Result:
        x_read = x
        if out is not None:
            scratch.copy_(out)
            x_read = scratch if x.data_ptr() == out.data_ptr() else x
        y, z_found, gram = backend.lowrank_linear(x_read, W, A, R, B, s, bias, scratch, other)
        few_out = None if out is None else out @ fold.t()
        y_few, _, gram_right = torch_backend.lowrank_linear(x, few[0], A, R, few[1], s, few[2], few_out, other)
        _agree("z", z_found, z, torch.outer(x_squares, squares(A) / K).sqrt_(), TF32)
        if other is not None:
            size = (z.square().t() @ other.square()).sqrt_() * max(abs(s), small)
            _agree("gram", gram, gram_right, size, TF32)
        _alike("y", y, (T, N), x.dtype)
        y_found = y @ fold.t()
        lost = (y_few.isfinite() & ~y_found.isfinite()).any(1).nonzero()[:16, 0]
        if len(lost):  # an element can be too large for its dtype where the sums are not
            of_out = None if out is None else out[lost]
            if torch_backend.lowrank_linear(x[lost], W, A, R, B, s, bias, of_out)[0].isfinite().all():
                raise _Wrong("its y has NaN or infinity where the torch backend's has numbers")
            raise _Undecided
        u_squares = squares(torch_backend.scaled_mm(z, R.to(z.dtype).t(), s, z)) + r * small**2
        size = torch.addr(grouped(y), u_squares, B_squares).sqrt_().add_(small)
        _agree("y", y_found, y_few, size, max(torch.finfo(x.dtype).eps, TF32))
        return y, z_found, gram

    run(test_R, test_s)
    y, z_found, gram = run(R, s)
    return y if out is None else out.copy_(y), z_found, gram


def _alike(name: str, found: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if found is None or found.shape != shape or found.dtype != dtype:
        got = "missing" if found is None else f"{tuple(found.shape)} of {found.dtype}"
        raise _Wrong(f"its {name} is {got}, must be {tuple(shape)} of {dtype}")


def _agree(name: str, found: Tensor | None, right: Tensor, size: Tensor, rounding: float) -> None:
    """Raise _Wrong where they differ by more than ALLOWED roundings of `right` and of its terms, which have `size`."""
    _alike(name, found, right.shape, right.dtype)
    whole = size + right.abs()
    error = (found - right).abs() / whole.clamp(min=torch.finfo(whole.dtype).tiny)
    error = error.where(
        whole.isfinite() & ~error.isnan(), math.inf
    ).amax()  # y can be so wrong that its size is infinite
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
