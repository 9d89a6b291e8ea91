"""What bandwidth and flops alone allow: the floor of each path, from counted bytes and flops.

Every step of a path (a kernel, or a library GEMM) takes at least the larger of bytes / bandwidth and flops / rate; a
path takes at least the sum over its steps.  Each operand is counted as read once and each result as written once, no
launch costs anything, and nothing stays in the cache between steps: a path may pass its floor only where its operands
fit there (small T).  Counted for W, A, B and x in a two-byte dtype; z and u are T x r and as good as free.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..backends.cuda.config import TOKENS, WIDEST_DECODE

DIRECTIONS = {"both": "forward + backward", "forward": "forward", "backward": "backward"}  # and in words


@dataclass(frozen=True)
class Ceilings:
    """How fast a machine moves and multiplies: bytes/s, flop/s in 16-bit with fp32 accumulation, flop/s in fp32."""

    name: str
    bandwidth: float
    half: float
    single: float
    source: str

    def seconds(self, bytes_moved: float, flops: float, single: bool = False) -> float:
        """The least time of one step."""
        return max(bytes_moved / self.bandwidth, flops / (self.single if single else self.half))


STEP = 64  # columns of u that the GEMM with a tail takes at a time, part or full: kTileK in csrc/gemm_tail.cuh
_DATASHEET = "vendor's datasheet: dense rates at boost clock, seldom reached"
# fp32 rates are those of the plain fp32 units, not TF32.
DATASHEETS = {
    name: Ceilings(name, bandwidth * 1e12, half * 1e12, single * 1e12, _DATASHEET)
    for name, bandwidth, half, single in (
        ("B200", 8.0, 2250, 75),
        ("H200", 4.8, 989, 67),
        ("H100-SXM", 3.35, 989, 67),
        ("A100-80GB", 2.039, 312, 19.5),
        ("L40S", 0.864, 362, 91.6),
        ("RTX-4090", 1.008, 165, 82.6),
    )
}


@dataclass(frozen=True)
class Step:
    """Bytes moved and flops done by one kernel; `single`: its flops are fp32."""

    bytes: float
    flops: float = 0.0
    single: bool = False


def _gemm(T: int, N: int, K: int, accumulate: bool = False, more: Step | None = None) -> Step:
    """x W^T (+ y when it accumulates), and what else the same kernel reads and does."""
    more = more or Step(0)
    return Step(2 * (T * K + N * K + T * N * (1 + accumulate)) + more.bytes, 2 * T * N * K + more.flops)


def _one_way(path: str, T: int, N: int, K: int, r: int, backward: bool) -> list[Step]:
    """The steps of one direction; for the backward pass N and K come exchanged, as in the primitive itself."""
    X, Y = T * K, T * N
    A, B = 2 * r * K, 2 * r * N
    shrink, expand = 2 * T * r * (K + r), 2 * T * r * N  # flops
    base = _gemm(T, N, K)
    if path == "reference-fp32":  # x and the adapters in fp32; the scale and the addition are passes of their own
        chain = [Step(4 * X + 2 * A, shrink, True), Step(4 * Y + 2 * B, expand, True)]
        if backward:  # gY to fp32; scale; shrink; expand; gX to two bytes; add
            return [base, Step(6 * X), Step(8 * X), *chain, Step(6 * Y), Step(6 * Y)]
        return [base, Step(6 * X), *chain, Step(8 * Y), Step(8 * Y)]  # x to fp32; shrink; expand; scale; y += delta
    if path == "reference":
        scale = Step(4 * (X if backward else Y))
        return [base, Step(2 * X + A, shrink), Step(2 * Y + B, expand), scale, Step(6 * Y)]
    if path == "addmm":
        return [base, Step(2 * X + A, shrink), Step(4 * Y + B, expand)]
    if path == "torch":  # u B^T written, then read and written again by the base GEMM
        return [Step(2 * X + A, shrink), Step(2 * Y + B, expand), _gemm(T, N, K, accumulate=True)]
    if path == "triton":  # the same bytes, in one kernel
        return [Step(2 * (X + Y) + A + B, shrink + expand), _gemm(T, N, K, accumulate=True)]
    if path == "cuda" and T <= TOKENS and r <= WIDEST_DECODE:  # the base, then the rest of it in one launch
        return [base, Step(2 * X + 4 * Y + A + B, shrink + expand)]
    if path == "cuda":  # a shrink reads x, then u and B ride in the base GEMM's K loop
        return [Step(2 * X + A, shrink), _gemm(T, N, K, more=Step(B, 2 * T * N * STEP * -(-r // STEP)))]
    if path == "one-pass":  # x read once, for W and A together
        return [_gemm(T, N, K, more=Step(A + B, shrink + expand))]
    if path == "frozen":
        return [base]
    raise KeyError(f"{path} has no floor: count its steps here")


# What each path with a floor is, in words.
PATHS = {
    "frozen": "frozen linear alone",
    "reference-fp32": "reference layer, adapters in fp32",
    "reference": "reference layer",
    "addmm": "addmm chain",
    "torch": "expand first, GEMM accumulates",
    "triton": "one kernel for A R B, GEMM accumulates",
    "cuda": "low-rank tail inside the GEMM",
    "one-pass": "one pass over x for W and A",
}


def floor(ceilings: Ceilings, path: str, T: int, N: int, K: int, r: int, direction: str = "both") -> float:
    """Seconds that `path` takes at least for x (T, K), W (N, K), rank r; "both" is forward and backward (gX, gR)."""
    steps: list[Step] = []
    if direction in ("both", "forward"):
        steps += _one_way(path, T, N, K, r, backward=False)
    if direction in ("both", "backward"):
        steps += _one_way(path, T, K, N, r, backward=True)
    return sum(ceilings.seconds(step.bytes, step.flops, step.single) for step in steps)
