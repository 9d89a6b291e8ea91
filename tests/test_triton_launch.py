"""What Triton's own runtime launches, on a stub of NVIDIA's driver: kernels, grids, the operands' real addresses."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import ANY

import helpers
import pytest
import stubdriver
import torch

from loraxs_kernels.padding import padded_rows, readable_columns

if reason := stubdriver.unavailable():
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl

CAPABILITIES = [(8, 0), (9, 0), (10, 0), (12, 0)]


@triton.jit
def tiny(x, n, m, factor, nothing, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    if nothing is None:
        tl.store(y + at, tl.load(x + at, mask=at < n) * factor + m, mask=at < n)


@pytest.fixture
def backend(monkeypatch):
    """The triton backend, imported anew: nothing that it keeps is another test's, or is left to one."""
    name = "loraxs_kernels.backends.triton"
    parent = importlib.import_module("loraxs_kernels.backends")
    for each in ("triton", "triton_indexed"):
        monkeypatch.setattr(parent, each, None, raising=False)
    before = {each: module for each, module in sys.modules.items() if each.startswith(name)}
    for each in before:
        del sys.modules[each]
    yield importlib.import_module(name)
    for each in [each for each in sys.modules if each.startswith(name)]:
        del sys.modules[each]
    sys.modules.update(before)


class Case:
    """One call of low_rank with what it must launch."""

    def __init__(self, backend, o, blocks, split=(1, 1), out=False, other=False, copied=(), warps=4, stages=2):
        """copied: names of operands that are read from a copy, as they do not lie as a kernel reads them."""
        self.backend, self.o, self.copied = backend, o, copied
        self.config = backend.Config(*blocks, num_warps=warps, num_stages=stages, split_k=split[0], split_n=split[1])
        (self.T, self.K), (self.N, self.r) = o.x.shape, o.B.shape
        self.out = torch.empty(self.T, self.N, dtype=o.x.dtype) if out else None
        self.other = torch.empty(self.T, self.r) if other else None

    def call(self):
        o = self.o
        return self.backend.low_rank(self.config, o.x, o.A, o.R, o.B, o.s, o.bias, self.out, self.other)

    def check(self, launches, results):
        """Kernels, grids and arguments, and that no kernel was compiled for other operands."""
        o, config, (y, z, gram) = self.o, self.config, results
        blocks = -(-self.T // config.block_t)
        if config.one_launch:
            assert [(each.kernel, each.grid) for each in launches] == [("chain_kernel", (blocks, 1, 1))]
        else:
            assert [(each.kernel, each.grid) for each in launches] == [
                ("shrink_kernel", (blocks, config.split_k, 1)),
                ("expand_kernel", (blocks, config.split_n, 1)),
            ]
            assert launches[0].arguments["parts"] == launches[1].arguments["parts"] != 0
        tensors = dict(x=o.x, A=o.A, R=o.R, B=o.B, bias=o.bias, other=self.other, y=y, z_out=z)
        expected = {name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
        expected |= dict(T=self.T, N=self.N, K=self.K, r=self.r, s=o.s, shares=config.split_k, parts=ANY)
        expected |= dict(gram=None if self.other is None else gram.data_ptr() if blocks == 1 else ANY)
        expected |= {name: ANY for name in self.copied}
        A_turned, B_turned = (t.stride(1) != 1 for t in (o.A, o.B))
        along = [t for t, there in ((o.A.t(), A_turned), (o.B, not B_turned)) if there]
        expected |= dict(A_TURNED=A_turned, R_TURNED=A_turned, B_TURNED=B_turned, x_t=o.x.stride(0), y_t=y.stride(0))
        expected |= dict(A_pitch=o.A.stride(int(A_turned)), B_pitch=o.B.stride(int(B_turned)))
        expected |= dict(width=min(map(readable_columns, along), default=self.r))
        if "x" in self.copied:
            expected |= dict(x_t=self.K)
        half, mixed = self.backend.dot_precision(self.backend.precision(o.x.dtype))
        expected |= dict(BLOCK_T=config.block_t, BLOCK_K=config.block_k, BLOCK_N=config.block_n, PRECISION=half)
        expected |= dict(ADD=self.out is not None, RANK=self.backend.padded(self.r), R_PRECISION=mixed)
        for each in launches:
            assert each.threads == (32 * config.num_warps, 1, 1) and each.stream == stubdriver.STREAM
            given = each.constants | each.arguments
            assert given == {name: expected[name] for name in given}
            assert not [name for name in each.aligned if given[name] % 16], each


def kept(backend):
    """What launcher.py keeps of each kernel."""
    return sys.modules[f"{backend.__name__}.launcher"].loaded


def padded(o):
    return dataclasses.replace(o, B=padded_rows(o.B))


def test_the_stub_writes_down_what_a_kernel_is_given(gpu_stub):
    stub = gpu_stub((9, 0))
    x, y = torch.empty(64), torch.empty(64)
    for first, n, m in ((0, 3, 7), (1, 16, 7), (4, 1, 1 << 40), (0, 3, -7)):
        tiny[(3, 2)](x[first:], n, m, 0.5, None, y, SIZE=64)
        (launch,) = stub.launches()
        assert launch[:8] == ("tiny", (3, 2, 1), (128, 1, 1), 0, stubdriver.STREAM, 1, False, False)
        assert launch.rest in ([0], [0, 0])
        values = dict(x=x[first:].data_ptr(), n=n, m=m, factor=0.5, y=y.data_ptr())
        assert launch.arguments == {name: value for name, value in values.items() if value != 1}
        assert launch.constants == dict(nothing=None, SIZE=64) | (dict(n=1) if n == 1 else {})
        assert launch.aligned == [name for name in ("x", "n", "m", "y") if values[name] % 16 == 0]
    assert stub.loaded == ["tiny"] * 3


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_kernel_is_compiled_for_the_gpu_that_is_not_there(gpu_stub, capability):
    stub = gpu_stub(capability)
    x = torch.empty(64)
    compiled = tiny[(1,)](x, 64, 2, 0.5, None, x, SIZE=64, num_warps=2)
    assert compiled.metadata.target.arch == capability[0] * 10 + capability[1]
    assert [(each.kernel, each.threads) for each in stub.launches()] == [("tiny", (64, 1, 1))]


def test_the_stub_fails_where_it_is_told_to(gpu_stub):
    stub = gpu_stub()
    x = torch.empty(64)

    def launch():
        tiny[(1,)](x, 64, 2, 0.5, None, x, SIZE=64)

    launch()
    stub.fail("launch")
    with pytest.raises(RuntimeError, match="the stub was told to fail"):
        launch()
    stub.fail("pointer")
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        launch()
    stub.fail("")
    launch()
    assert len(stub.launches()) == 3
    stub.record(False)
    launch()
    assert stub.launches() == []


def test_nothing_is_left_behind(gpu_stub, monkeypatch):
    with monkeypatch.context() as patch:
        stubdriver.activate(patch, gpu_stub.args[1])
        assert triton.runtime.driver.active.get_current_target().arch == 90
    assert not torch.cuda.is_available()
    with pytest.raises(RuntimeError, match="0 active drivers"):
        triton.runtime.driver.active.get_current_target()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("split", [(1, 1), (3, 2)], ids=["one launch", "two launches"])
def test_both_directions(gpu_stub, backend, capability, split):
    """As autograd calls them: forward with a bias, backward with views of the same tensors and the gram."""
    stub = gpu_stub(capability)
    o = padded(helpers.operands(70, 48, 96, 12, torch.bfloat16))
    forward = Case(backend, o, (32, 32, 16), split)
    backward = Case(backend, helpers.backward(o), (32, 16, 32), split, other=True)
    for case in (forward, backward):
        results = case.call()
        case.check(stub.launches(), results)


@pytest.mark.parametrize("split", [(1, 1), (3, 2)], ids=["one launch", "two launches"])
def test_one_call_after_another(gpu_stub, backend, split):
    """Calls that differ in one respect: none takes the other's kernel or arguments, at first or again."""
    stub = gpu_stub()
    first = helpers.operands(64, 48, 96, 16, torch.bfloat16)
    blocks = (32, 32, 16)

    def but(**tensors):
        return dataclasses.replace(first, **tensors)

    kinds = dict(
        first=Case(backend, first, blocks, split),
        other_rows=Case(backend, helpers.operands(7, 48, 96, 16, torch.bfloat16), blocks, split),
        one_row=Case(backend, helpers.operands(1, 48, 96, 16, torch.bfloat16), blocks, split),
        bias=Case(backend, but(bias=None), blocks, split),
        x_not_aligned=Case(
            backend, but(x=torch.empty(64 * 96 + 1, dtype=torch.bfloat16)[1:].view(64, 96)), blocks, split
        ),
        x_half_aligned=Case(
            backend, but(x=torch.empty(64 * 96 + 4, dtype=torch.bfloat16)[4:].view(64, 96)), blocks, split
        ),
        R_not_aligned=Case(backend, but(R=torch.empty(16 * 16 + 1)[1:].view(16, 16)), blocks, split),
        R_turned=Case(backend, but(R=first.R.t()), blocks, split, copied=["R"]),
        x_turned=Case(backend, but(x=first.x.t().contiguous().t()), blocks, split, copied=["x"]),
        x_spread=Case(backend, but(x=torch.empty(1, 96, dtype=torch.bfloat16).expand(64, 96)), blocks, split),
        R_half=Case(backend, but(R=first.R.bfloat16()), blocks, split),
        scale=Case(backend, dataclasses.replace(first, s=1.0), blocks, split),
        features=Case(backend, helpers.operands(64, 37, 91, 16, torch.bfloat16), blocks, split),
        rank=Case(backend, helpers.operands(64, 48, 96, 11, torch.bfloat16), blocks, split),
        rank_padded=Case(backend, padded(helpers.operands(64, 48, 96, 11, torch.bfloat16)), blocks, split),
        rank_1=Case(backend, helpers.operands(64, 48, 96, 1, torch.bfloat16), blocks, split),
        fp16=Case(backend, helpers.operands(64, 48, 96, 16, torch.float16), blocks, split),
        out=Case(backend, first, blocks, split, out=True),
        other=Case(backend, first, blocks, split, other=True),
        blocks=Case(backend, first, (16, 32, 32), split),
        warps=Case(backend, first, blocks, split, warps=8),
        stages=Case(backend, first, blocks, split, stages=3),
    )
    for again in (False, True):
        stub.loaded.clear()
        for name, case in kinds.items():
            compiled = len(stub.loaded)
            results = case.call()
            case.check(stub.launches(), results)
            if name in ("other_rows", "one_row", "scale"):
                assert len(stub.loaded) == compiled, name
            if name in ("warps", "stages") and not again:
                assert len(stub.loaded) > compiled, name
        assert not (again and stub.loaded)
    assert kept(backend).cache_info().hits > 0


@pytest.mark.parametrize("split", [(1, 1), (3, 2)], ids=["one launch", "three launches"])
def test_with_an_index(gpu_stub, backend, split):
    """Both directions on a table whose matrices lie apart; another number of rows or index compiles nothing anew."""
    stub, indexed = gpu_stub(), importlib.import_module(f"{backend.__name__}_indexed")
    config = backend.Config(32, 32, 16, num_warps=4, num_stages=2, split_k=split[0], split_n=split[1])
    o, R = padded(helpers.operands(1100, 48, 96, 12, torch.bfloat16)), torch.empty(5, 3, 12, 12)[:, 1]
    for each, R_, R_turned in ((o, R, False), (helpers.backward(o), R.mT, True)):
        for T in (1100, 700):
            index = torch.empty(T, dtype=torch.int32)
            y, z = indexed.low_rank(config, each.x[:T], each.A, R_, each.B, o.s, index, each.bias, None)
            launches = stub.launches()
            kernels = {launch.kernel: launch.grid for launch in launches}
            blocks, programs = -(-T // 32), -(-T // 16)
            assert kernels == (
                {"chain_indexed_kernel": (blocks, 1, 1)}
                if config.one_launch
                else {
                    "shrink_kernel": (blocks, 3, 1),
                    "mix_kernel": (programs, 1, 1),
                    "expand_mixed_kernel": (blocks, 2, 1),
                }
            )
            given = {
                name: value for launch in launches for name, value in (launch.constants | launch.arguments).items()
            }
            expected = dict(R=R.data_ptr(), index=index.data_ptr(), y=y.data_ptr(), z_out=z.data_ptr(), T=T, s=o.s)
            expected |= dict(r=12, R_next=432, R_TURNED=R_turned, A_TURNED=R_turned, x_t=each.x.stride(0), width=16)
            assert {name: given[name] for name in expected} == expected
            if not config.one_launch:
                shrink, mix, expand = (launch.arguments for launch in launches)
                assert shrink["parts"] == mix["parts"] and mix["u_out"] == expand["u"] and mix["shares"] == 3
        assert stub.loaded == [*kernels] * (1 + R_turned)


def test_more_rows_than_32_bits_count(gpu_stub, backend, monkeypatch):
    """The rows take no memory here: each is the same one."""

    def rows(like, shape, dtype):
        return torch.empty(shape[-1], dtype=dtype).expand(shape)

    monkeypatch.setattr(backend, "empty", rows)
    stub = gpu_stub()
    few = helpers.operands(4, 48, 96, 12, torch.bfloat16, layout="expanded")
    many = dataclasses.replace(few, x=few.x[:1].expand((1 << 31) + 7, 96))
    for o in (few, many, few, many):
        case = Case(backend, o, (32, 32, 16))
        results = case.call()
        case.check(stub.launches(), results)


def test_the_gram_of_a_wide_rank_is_left_to_the_library(gpu_stub, backend):
    stub = gpu_stub()
    case = Case(backend, helpers.backward(helpers.operands(70, 48, 96, 100, torch.bfloat16)), (32, 16, 32), other=True)
    _, _, gram = case.call()
    (chain,) = stub.launches()
    assert (chain.kernel, chain.constants["other"], chain.constants["gram"]) == ("chain_kernel", None, None)
    assert gram.shape == (100, 100)


def test_a_profiler_sees_every_launch(gpu_stub, backend, monkeypatch):
    """By Triton's own hooks, which are called with the name of the kernel."""
    stub, seen = gpu_stub(), []
    case = Case(backend, helpers.operands(64, 48, 96, 16, torch.bfloat16), (32, 32, 16))
    case.call()
    hooks = sys.modules[f"{backend.__name__}.launcher"]._hooks
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    if hasattr(hooks.launch_enter_hook, "add"):
        hooks.launch_enter_hook.add(hook)
    else:
        monkeypatch.setattr(hooks, "launch_enter_hook", hook)
    try:
        results = case.call()
    finally:
        if hasattr(hooks.launch_enter_hook, "remove"):
            hooks.launch_enter_hook.remove(hook)
    assert seen == ["chain_kernel"]
    first, second = stub.launches()
    case.check([second], results)
    assert second._replace(arguments=None) == first._replace(arguments=None)


@pytest.mark.parametrize("call", ["load", "launch"])
def test_what_fails_says_so_and_works_afterwards(gpu_stub, backend, call):
    stub = gpu_stub()
    case = Case(backend, helpers.operands(70, 48, 96, 12, torch.bfloat16), (32, 32, 16))
    for attempt in range(2):
        stub.fail(call)
        if call == "launch" or attempt == 0:  # a kernel is loaded once
            with pytest.raises(RuntimeError, match="the stub was told to fail"):
                case.call()
        stub.fail("")
        stub.launches()
        results = case.call()
        case.check(stub.launches(), results)


def test_each_device_has_its_own_kernels(gpu_stub, backend):
    case = Case(backend, helpers.operands(64, 48, 96, 16, torch.bfloat16), (32, 32, 16))
    for capability in ((8, 0), (9, 0)):
        stub = gpu_stub(capability)
        results = case.call()
        case.check(stub.launches(), results)
        assert stub.loaded == ["chain_kernel"]


def test_two_threads_may_be_first(gpu_stub, backend, monkeypatch):
    """One waits while the other's kernel is loaded, which lets others run."""
    gpu_stub()
    case = Case(backend, helpers.operands(64, 48, 96, 16, torch.bfloat16), (32, 32, 16))
    utils, begun = triton.runtime.driver.active.utils, threading.Event()
    own = utils.load_binary

    def slow(*args):
        begun.set()
        time.sleep(0.2)
        return own(*args)

    monkeypatch.setattr(utils, "load_binary", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(case.call)
        begun.wait()
        second = pool.submit(case.call)
        assert first.result() and second.result()
    case.call()
