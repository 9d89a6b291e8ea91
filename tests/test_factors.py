"""The factors of many layers: the same as of each alone, whatever shares their way, and nothing lost when one fails."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from loraxs_kernels import attach, factors, svd, svd_math, truncated_svd
from loraxs_kernels.factors import Job, compute_devices, factor
from loraxs_kernels.recipe import Recipe
from loraxs_kernels.svd import Group, plan
from loraxs_kernels.upload import InPieces
from loraxs_kernels.weights import weight_of

CPU = torch.device("cpu")
TWO = [torch.device("cpu", 0), torch.device("cpu", 1)]  # two devices as far as torch.device knows
SHAPES = [(40, 300), (300, 40), (40, 300), (128, 96), (40, 300), (300, 40), (128, 96), (40, 300)]


def make_jobs(dtype=torch.float32, rank=4) -> list[Job]:
    torch.manual_seed(0)
    linears = [nn.Linear(K, N, bias=False, dtype=dtype) for N, K in SHAPES]
    weights = [weight_of(linear) for linear in linears]
    return [Job(f"module '{i}'", W, rank, Recipe().pinned(rank, W.shape)) for i, W in enumerate(weights)]


def made(jobs: list[Job], **options) -> list[tuple]:
    results = {}

    def keep(i, A, B):
        assert i not in results
        results[i] = A, B

    factor(jobs, keep, progress=False, **options)
    return [results[i] for i in range(len(jobs))]


def test_every_layer_gets_the_bits_it_gets_alone():
    for dtype in (torch.float32, torch.bfloat16):
        jobs = make_jobs(dtype)
        for job, (A, B) in zip(jobs, made(jobs), strict=True):
            U, S, Vh = truncated_svd(job.weight.read(), job.rank)
            assert torch.equal(B, U) and torch.equal(A, S[:, None] * Vh)


def test_devices_share_the_layers(monkeypatch):
    jobs = make_jobs()
    threads = set()
    both, made_by_one = threading.Barrier(2, timeout=60), factors._made

    def made_by_both(*arguments):
        both.wait()  # or a thread could be done before there is another, and take its part too
        yield from made_by_one(*arguments)

    def keep(i, A, B):
        threads.add(threading.current_thread())
        results[i] = A, B

    results = {}
    with monkeypatch.context() as patched:
        patched.setattr(factors, "_made", made_by_both)
        factor(jobs, keep, devices=TWO, progress=False)
    assert len(threads) == 2 and threading.main_thread() not in threads
    for i, (A, B) in enumerate(made(jobs)):
        assert torch.equal(results[i][0], A) and torch.equal(results[i][1], B)


@pytest.mark.parametrize("devices", [None, [CPU], TWO], ids=["where they are", "one", "two"])
def test_a_weight_that_is_not_finite_is_named(devices):
    jobs = make_jobs()
    with torch.no_grad():
        jobs[5].weight.read()[3, 7] = float("inf")
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")
    with pytest.raises(ValueError, match=r"module '5': W: has a largest magnitude of inf, must be finite"):
        made(jobs, devices=devices)
    assert before == (torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"))


@pytest.mark.parametrize("given", [False, True])
def test_factors_past_the_range_of_fp16_are_refused(given):
    """A has singular values, which a weight's dtype need not hold although it holds the weight."""
    model = nn.Sequential(nn.Linear(48, 32, bias=False)).half()
    nn.init.constant_(model[0].weight, 3e4)
    init = {"0": (torch.full((4, 48), 1e5), torch.ones(32, 4))} if given else "svd"
    with pytest.raises(ValueError, match=r"dtype: got float16 for A and B of module '0', .* 65504; must be"):
        attach(model, 4, init=init)
    assert type(model[0]) is nn.Linear
    assert attach(model, 4, init=init, dtype="float32")[0].A.isfinite().all()


def test_what_the_caller_raises_comes_through():
    for devices in (None, TWO):
        with pytest.raises(KeyError, match="full"):
            factor(make_jobs(), lambda i, A, B: {}["full"], devices=devices, progress=False)


@pytest.fixture
def four_places(monkeypatch):
    """Groups of up to four, as on a GPU."""
    for module in (svd, factors):
        monkeypatch.setattr(module, "group_size", lambda *_: 4)


@pytest.mark.parametrize("gram", [False, True], ids=["reflections", "gram"])
@pytest.mark.parametrize("method", ["krylov", "subspace"])
def test_the_others_in_a_group_change_rounding_alone(request, method, gram):
    if gram:
        request.getfixturevalue("as_on_a_gpu")
    weights = list(torch.randn(7, 60, 200))
    weights[2] = weights[2][:, :1] @ torch.ones(1, 200)  # of rank 1
    weights[4] = weights[4] * 1e-20
    weights[5] = weights[5] * 0
    how = plan(4, (60, 200), method=method, n_iter=2, block=8)
    alone = [[t[0] for t in next(svd.decompose([Group([W], 4, how, 0)], CPU))] for W in weights]
    groups = [weights[:4], weights[4:]], [weights[6:], weights[2:6], weights[:2]]
    orders = [0, 1, 2, 3, 4, 5, 6], [6, 2, 3, 4, 5, 0, 1]
    for grouping, order in zip(groups, orders, strict=True):
        made = svd.decompose((Group(each, 4, how, 0) for each in grouping), CPU)
        found = [triplet for group in made for triplet in zip(*group, strict=True)]
        for (U, S, Vh), i in zip(found, order, strict=True):
            expected = alone[i]
            torch.testing.assert_close(S, expected[1], rtol=1e-6, atol=0)
            low_rank = (expected[0] * expected[1]) @ expected[2]
            assert ((U * S) @ Vh - low_rank).norm() <= 1e-6 * low_rank.norm(), i


def test_lapack_gets_nothing_that_is_not_finite(monkeypatch):
    """It may not end then."""
    finite, leading = [], svd_math.leading
    monkeypatch.setattr(
        svd_math, "leading", lambda C, *how: finite.append(bool(C.isfinite().all())) or leading(C, *how)
    )
    weights = [torch.randn(60, 200), torch.full((60, 200), torch.nan)]
    with ThreadPoolExecutor(2) as pool, pytest.raises(svd.NotFinite, match="largest magnitude of nan"):
        svd._Started(Group(weights, 4, plan(4, (60, 200)), 0), pool).triplets()
    assert finite == [True]


def test_groups_agree_with_single_weights(four_places):
    jobs = make_jobs()
    grouped = made(jobs)
    for job, (A, B) in zip(jobs, grouped, strict=True):
        U, S, Vh = torch.linalg.svd(job.weight.read().double(), full_matrices=False)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        W = job.weight.read().double()
        assert (W - B.double() @ A.double()).norm() <= (W - best).norm() * (1 + 1e-3)
        torch.testing.assert_close(A.double().norm(dim=1), S[:4], rtol=1e-3, atol=0)


def test_weights_are_read_when_their_turn_comes_and_not_kept():
    """A model larger than memory: one weight for each thread is there, and what was made of it."""
    alive, most = weakref.WeakSet(), 0
    jobs = []
    for i, job in enumerate(make_jobs()):
        W = job.weight.read().clone()

        def read(W=W):
            nonlocal most
            copy = W.clone()
            alive.add(copy)
            most = max(most, len(alive))
            return copy

        weight = factors.Weight(job.weight.shape, torch.float32, CPU, True, read)
        jobs.append(Job(f"module '{i}'", weight, 4, job.recipe))
    made(jobs)
    assert most <= torch.get_num_threads()


def test_the_workspace_is_bounded_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(factors, "can_sum_in_fp32", lambda device: True)  # as torch 2.8 and later on NVIDIA's GPUs
    gpu = torch.device("cuda", 0)
    weight = factors.Weight((8192, 28672), torch.bfloat16, CPU, True, lambda: pytest.fail("was read"))
    recipe = Recipe().pinned(64, weight.shape)
    with pytest.raises(
        ValueError, match=r"workspace_gib: got 9.3\S+, must be at least [\d.]+ for module 'up' of shape 8192"
    ):
        factor([Job("module 'up'", weight, 64, recipe)], pytest.fail, devices=[gpu], workspace=1000, progress=False)
    # The largest weight of Llama 3 70B fits the default workspace, which leaves a card of 24 GB most of its memory.
    job = Job("module 'up'", weight, 64, recipe)
    assert factors._weights_at_once(job, gpu, factors.WORKSPACE) == 2
    assert not factors._in_pieces(weight, gpu, factors.WORKSPACE, torch.bfloat16)
    # Those of Llama 3 405B go in pieces, unless they are on the GPU already.
    for device, pieces in ((CPU, True), (gpu, False)):
        large = replace(weight, shape=(53248, 16384), device=device, copies=False)
        small = Job("module 'up'", large, 4, Recipe().pinned(4, large.shape))
        assert (factors._weights_at_once(small, gpu, factors.WORKSPACE) == 1) == pieces
        assert factors._weights_at_once(replace(job, weight=large), gpu, factors.WORKSPACE) == 1
        assert factors._in_pieces(large, gpu, factors.WORKSPACE, torch.bfloat16) == pieces


def test_groups_keep_their_bound_wherever_the_weights_are(monkeypatch):
    """Some of one shape on the GPU, others on the host, where fewer may go together."""
    gpu = torch.device("cuda", 0)
    here = factors.Weight((4096, 14336), torch.bfloat16, CPU, False, lambda: pytest.fail("was read"))
    recipe = Recipe().pinned(64, here.shape)
    jobs = [Job("module", replace(here, device=gpu if i < 11 else CPU), 64, recipe) for i in range(32)]
    monkeypatch.setattr(factors, "_brought", lambda jobs, order, *_: iter([torch.empty(0).bfloat16()] * len(order)))
    most = [factors._weights_at_once(job, gpu, 2 * 2**30) for job in (jobs[0], jobs[-1])]
    groups = [len(group.weights) for group in factors._groups(jobs, range(32), gpu, 2 * 2**30, deque())]
    assert most[0] > most[1] and sum(groups) == 32 and max(groups) <= most[0] and set(groups[2:-1]) == {most[1]}


def test_a_small_workspace_gets_the_large_weights_in_pieces(monkeypatch):
    def too_large(weight, device, workspace, dtype):  # as for a GPU
        return weight.shape[0] * weight.shape[1] * dtype.itemsize > workspace // 4

    pieces, parts = [], InPieces.parts
    monkeypatch.setattr(factors, "_in_pieces", too_large)
    monkeypatch.setattr(InPieces, "parts", lambda self: pieces.append(len(self.slices)) or parts(self))
    jobs = make_jobs()
    expected = [truncated_svd(job.weight.read(), 4) for job in jobs]
    for (A, B), (U, S, Vh) in zip(made(jobs, workspace=4 * 48_500), expected, strict=True):
        torch.testing.assert_close(B @ A, (U * S) @ Vh, rtol=0, atol=1e-5)
    assert set(pieces) == {5}  # those of 128 x 96, for the largest magnitude and for each product


def test_a_read_in_another_dtype_than_announced_goes_apart():
    """4-bit weights are announced in the dtype they compute in and read in fp32."""
    jobs = make_jobs(torch.bfloat16)
    wide = []
    for job in jobs:
        weight = replace(job.weight, copies=True, read=lambda job=job: job.weight.read().float())
        wide.append(replace(job, weight=weight))
    mixed = [job for pair in zip(jobs, wide, strict=True) for job in pair]
    found, expected = made(mixed), made(jobs)
    for i, (A, B) in enumerate(found):  # on a CPU bf16 is upcast, so that they are the same
        assert torch.equal(A, expected[i // 2][0]) and torch.equal(B, expected[i // 2][1])


def test_a_weight_elsewhere_is_refused():
    job = make_jobs()[0]
    job = replace(job, weight=replace(job.weight, device=torch.device("mps", 0)))
    with pytest.raises(ValueError, match=r"module '0': got a weight on 'mps:0', must be on a CPU or a CUDA device"):
        made([job])


KILLED_CHILD = """
import os, signal
import torch
from tqdm import tqdm
import loraxs_kernels as lx

lock = tqdm.get_lock()  # made before the fork, as by any bar of the user's
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    lock.acquire()
    os.write(writer, b".")
    signal.pause()
os.read(reader, 1)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
for progress in (False, True):
    lx.attach(torch.nn.Sequential(torch.nn.Linear(8, 8)), 2, target_modules="all-linear", progress=progress)
assert tqdm.get_lock() is lock
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_killed_child_that_held_tqdms_lock_stops_no_attach():
    subprocess.run([sys.executable, "-c", KILLED_CHILD], check=True, timeout=120)


def test_the_hosts_threads_leave_the_callers_setting_alone(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")  # torchrun's: each process still has a thread
    torch.set_num_threads(2)  # not the pool's 1, whatever OMP_NUM_THREADS says
    with svd.host_pool(torch.device("cuda", 0), 1) as pool:
        assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {1}
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 2


def test_threads_of_a_cpu_take_a_weight_each(monkeypatch):
    seen, products = [], svd.Products
    monkeypatch.setattr(
        svd, "Products", lambda W: seen.append((threading.get_ident(), torch.get_num_threads())) or products(W)
    )
    monkeypatch.setattr(svd, "AMONG_OTHERS", 128 * 96 - 1)  # the two of that size take all threads, one after another
    jobs = make_jobs()
    torch.set_num_threads(1)
    expected = made(jobs)
    assert set(seen) == {(threading.get_ident(), 1)}
    seen.clear()
    torch.set_num_threads(2)
    for (A, B), (A1, B1) in zip(made(jobs), expected, strict=True):
        torch.testing.assert_close(B @ A, B1 @ A1, rtol=0, atol=1e-5)
    assert torch.get_num_threads() == 2
    assert [each for each in seen if each[0] == threading.get_ident()] == [(threading.get_ident(), 1)] * 2
    assert len({thread for thread, _ in seen}) <= 3 and {threads for _, threads in seen} == {1}


@pytest.mark.parametrize("keep, most", [(10**9, 5), (7, 1), (24, 3), (1, 1)])
def test_groups_on_a_gpu_wait_for_the_host_while_the_next_ones_begin(monkeypatch, keep, most):
    """Up to 16 matrices may wait, or `keep` bytes, one group in any case; they come out in order."""
    log = []

    class Started:
        def __init__(self, group, pool):
            self.count, self.nbytes, self.name = len(group.weights), 8, group.seed
            log.append(("begun", self.name))

        def triplets(self):
            log.append(("made", self.name))
            return self.name

    monkeypatch.setattr(svd, "_Started", Started)
    on_gpu = [SimpleNamespace(device=torch.device("cuda", 0))] * 4
    groups = (Group(on_gpu, 4, plan(4, (40, 300)), i) for i in range(9))
    assert list(svd.decompose(groups, on_gpu[0].device, keep=keep)) == list(range(9))
    waiting = [sum(1 if what == "begun" else -1 for what, _ in log[:i]) for i in range(len(log))]
    assert max(waiting) == most + (keep < 10**9)  # and the one that was begun last


def test_devices_are_checked():
    assert compute_devices("cpu") == [CPU]
    for bad, message in (
        ([], "got no device"),
        ("meta", "must be the CPU or CUDA devices"),
        ("cuda:99", "torch sees"),
        ("gpu", "Expected one of"),
        (0.5, "not iterable"),
    ):
        with pytest.raises(ValueError, match=f"device: {message}|device: got .*{message}"):
            compute_devices(bad)


@pytest.mark.gpu("truncated_svd")
def test_a_gpu_streams_weights_from_the_host_within_its_workspace():
    linears = [nn.Linear(4096, 1024, bias=False, dtype=torch.bfloat16) for _ in range(20)]
    weights = [weight_of(linear) for linear in linears]
    jobs = [Job(f"module '{i}'", W, 16, Recipe().pinned(16, W.shape)) for i, W in enumerate(weights)]
    gpu = compute_devices("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    workspace = 800 * 2**20
    host = {}
    factor(jobs, lambda i, A, B: host.update({i: (A.cpu(), B.cpu())}), devices=gpu, workspace=workspace)
    assert torch.cuda.max_memory_allocated() - before <= workspace + 16 * 5120 * 16 * 4 * 2
    for i in (0, 7, 19):
        U, S, Vh = (t.cpu() for t in truncated_svd(linears[i].weight.detach().cuda(), 16))
        A, B = host[i]
        assert (B @ A - (U * S) @ Vh).norm() <= 1e-5 * S.norm()


@pytest.mark.gpu("truncated_svd")
def test_a_gpu_takes_large_weights_in_pieces():
    linears = [nn.Linear(14336, 4096, bias=False, dtype=torch.bfloat16) for _ in range(2)]
    jobs = [Job("module", W, 16, Recipe().pinned(16, W.shape)) for W in map(weight_of, linears)]
    gpu = compute_devices("cuda")
    workspace = 4 * svd.working_bytes((4096, 14336), torch.bfloat16, jobs[0].recipe.plan(16, (4096, 14336)))
    assert factors._in_pieces(jobs[0].weight, gpu[0], workspace, torch.bfloat16)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, found = torch.cuda.memory_reserved(), {}
    factor(jobs, lambda i, A, B: found.update({i: (A, B)}), devices=gpu, workspace=workspace)
    assert torch.cuda.max_memory_reserved() - before <= 2 * workspace
    for i, linear in enumerate(linears):
        U, S, Vh = (t.cpu() for t in truncated_svd(linear.weight.detach().cuda(), 16))
        A, B = found[i]
        assert (B @ A - (U * S) @ Vh).norm() <= 1e-5 * S.norm()
