"""What truncated_svd costs a GPU, counted on a CPU: operators, synchronisations, memory; and weights in pieces."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraxs_kernels import rademacher, svd, svd_math, truncated_svd
from loraxs_kernels.svd import Group, plan
from loraxs_kernels.upload import InPieces, Upload

GPU = torch.device("cuda", 0)
MISTRAL_7B = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}  # (N, K): how many
NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "prim::")
SCALE = 8  # the weights are so many times smaller than they are counted as: operators do not depend on sizes


class Calls(TorchDispatchMode):
    """Counts the operators that launch something: all but views and memory without values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and not function._schema.name.startswith(NO_LAUNCH):
            self.names[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time, beside `own`."""

    def __init__(self, *own: Tensor) -> None:
        super().__init__()
        self.known, self.now, self.most = {t.untyped_storage()._cdata for t in own}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (key := t.untyped_storage()._cdata) not in self.known:
                self.known.add(key)
                self.now += t.untyped_storage().nbytes()
                weakref.finalize(t.untyped_storage(), self.freed, key, t.untyped_storage().nbytes())
        self.most = max(self.most, self.now)
        return out

    def freed(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.now -= nbytes


@pytest.fixture
def products_of_zeros(as_on_a_gpu, monkeypatch):
    """Each product with a weight is one operator and takes no time; so does each eigenproblem."""
    monkeypatch.setattr(svd_math, "mm_in_fp32", lambda X, W, out: out.zero_())
    monkeypatch.setattr(svd_math, "leading", lambda C, rank, dtype: (C.new_ones(rank), C[:, :rank]))


def test_operators_for_a_7b_model(products_of_zeros, monkeypatch):
    monkeypatch.setattr(svd_math, "GRAM_BYTES", svd_math.GRAM_BYTES // SCALE)
    total: Counter[str] = Counter()
    for shape, count in MISTRAL_7B.items():
        how = plan(64, shape)
        most = svd.group_size(shape, torch.bfloat16, GPU, how)
        weights = [torch.randn(shape[0] // SCALE, shape[1] // SCALE).bfloat16() for _ in range(most)]
        svd._Started(Group(weights[:1], 64, how, 0), None).triplets()  # the hashes are made once for each shape
        full, rest = divmod(count, most)
        for groups, size in ((full, most), (1, rest)):
            if not size:
                continue
            with Calls() as begun:
                started = svd._Started(Group(weights[:size], 64, how, 0), None)
            # Whatever asks for a value on the device would wait for it.
            assert not begun.names.keys() & {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
            with Calls() as made:
                started.triplets()
            for name, calls in (begun.names + made.names).items():
                total[name] += groups * calls
    # The host's own for each weight are among them: about 900.
    assert total["aten::zero_"] == 32 * 10 + 64 * 10 + 64 * 12 + 64 * 10  # one for each read of a weight but the first
    assert sum(total.values()) < 11_000


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape, rank, method",
    [
        ((512, 1792), 64, "krylov"),
        ((512, 512), 64, "krylov"),
        ((100, 2000), 64, "krylov"),
        ((128, 3584), 12, "krylov"),
        ((512, 512), 64, "subspace"),
        ((512, 1792), 100, "subspace"),
        ((128, 3584), 64, "subspace"),
    ],
    ids=str,
)
def test_a_group_stays_within_its_estimate(products_of_zeros, monkeypatch, dtype, shape, rank, method, count):
    for module in (svd, svd_math):
        monkeypatch.setattr(module, "GRAM_BYTES", 2**18)
    monkeypatch.setattr(rademacher, "ELEMENTS", 2**14)
    how = plan(rank, shape, method=method)
    weights = [torch.randn(shape).to(dtype) for _ in range(count)]
    estimate = count * svd.working_bytes(shape, dtype, how)
    with Live(*weights) as begun:
        started = svd._Started(Group(weights, rank, how, 0), None)
    kept = [started.Z, *([] if started.Q is None else [started.Q])]
    with Live(*weights, *kept) as made:
        results = started.triplets()
    ends = made.most + started.nbytes - sum(t.nbytes for t in results)
    assert estimate / 4 < max(begun.most, ends) <= estimate


@pytest.mark.parametrize("as_a_gpu_does", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape, method", [((300, 700), "krylov"), ((700, 300), "subspace")])
def test_weights_in_pieces(request, monkeypatch, shape, method, dtype, as_a_gpu_does):
    if as_a_gpu_does:
        request.getfixturevalue("as_on_a_gpu")
    W, how = torch.randn(shape).to(dtype), plan(12, shape, method=method)
    (whole,) = svd.decompose([Group([W], 12, how, 0)], W.device)
    pieces = InPieces(W, Upload(torch.device("cpu")), 100 * shape[1] * W.itemsize)
    assert len(pieces.slices) == -(-shape[0] // 100)
    (found,) = svd.decompose([Group([pieces], 12, how, 0)], W.device)
    torch.testing.assert_close(found[1], whole[1], rtol=1e-6, atol=0)
    low_rank, expected = ((U * S[:, None]) @ Vh for U, S, Vh in (found, whole))
    torch.testing.assert_close(low_rank, expected, rtol=0, atol=1e-5 * float(whole[1].max()))
    W[-1, -1] = torch.nan
    with pytest.raises(svd.NotFinite, match="must be finite"):
        list(svd.decompose([Group([pieces], 12, how, 0)], W.device))


def test_small_weights_take_one_thread(monkeypatch):
    """More save nothing there, and wait for one another where the machine has other work."""
    seen, products = [], svd_math.Products.__init__
    monkeypatch.setattr(svd, "Products", type("Seen", (svd_math.Products,), {"__init__": lambda *arguments: (
        seen.append(torch.get_num_threads()), products(*arguments))[1]}))  # fmt: skip
    torch.set_num_threads(2)
    for shape in ((512, 512), (512, 513)):
        truncated_svd(torch.randn(shape), 4)
        assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="must be finite"):
        truncated_svd(torch.full((4, 4), torch.nan), 2)
    assert torch.get_num_threads() == 2 and seen == [1, 2, 1]
