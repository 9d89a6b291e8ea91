"""Weights on their way from the host to a GPU, with streams and pinned memory that are threads and tensors of a CPU."""

from __future__ import annotations

import queue
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from loraxs_kernels.upload import InPieces, Upload

GPU = SimpleNamespace(type="cuda", index=0)


class Stream:
    """Does what it is given in a thread of its own, as late as it can: when something waits for it."""

    def __init__(self, device=None) -> None:
        self.work: queue.SimpleQueue = queue.SimpleQueue()

    def record_event(self) -> SimpleNamespace:
        done = threading.Event()
        self.work.put(done.set)

        def synchronize() -> None:
            while not done.is_set():
                self.work.get()()

        return SimpleNamespace(synchronize=synchronize)

    def wait_stream(self, other: Stream) -> None:
        self.work.put(other.record_event().synchronize)


class OnGPU(torch.Tensor):
    def record_stream(self, stream) -> None:
        pass


class Pinned(torch.Tensor):
    """Copies itself when its stream comes to it: what has been written over by then is seen."""

    def to(self, device, non_blocking):
        there = torch.full(self.shape, torch.nan).to(self.dtype).as_subclass(OnGPU)
        current[0].work.put(lambda: there.copy_(self.as_subclass(torch.Tensor)))
        return there


current = [Stream()]


@pytest.fixture
def cuda(monkeypatch):
    @contextmanager
    def stream(other):
        before, current[0] = current[0], other
        yield
        current[0] = before

    class Torch:
        cuda = SimpleNamespace(Stream=Stream, stream=stream, current_stream=lambda device: current[0])

        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *size, pin_memory=False, **options):
            made = torch.empty(*size, **options)
            return made.as_subclass(Pinned) if pin_memory else made

    monkeypatch.setattr("loraxs_kernels.upload.torch", Torch())


def uploads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("ThreadPoolExecutor")]


def test_weights_arrive_whole_and_in_order(cuda):
    weights = [
        torch.randn(i % 5 + 1, 7 * i + 1).to(dtype) for i in range(6) for dtype in (torch.bfloat16, torch.double)
    ]
    weights[3] = weights[3].mT  # read as it lies, and turned there
    weights[5] = weights[5][:, ::2]
    with Upload(GPU) as upload:
        for at in (2, 7, 8, 11):
            weights[at] = InPieces(torch.randn(40, 9), upload, 7 * 36)
        found = [list(each.parts()) if hasattr(each, "parts") else each for each in upload.each(iter(weights))]
    current[0].record_event().synchronize()
    for there, W in zip(found, weights, strict=True):
        if isinstance(W, torch.Tensor):
            assert there.shape == W.shape and torch.equal(there.as_subclass(torch.Tensor), W)
        else:
            assert [at for at, _ in there] == W.slices and len(there) == 6
            assert torch.equal(torch.cat([part.as_subclass(torch.Tensor) for _, part in there]), W.W)


@pytest.mark.parametrize("stop", range(5))
def test_nothing_stays_behind_when_it_ends_early(cuda, stop):
    before = uploads()

    def weights(fail):
        for i in range(8):
            if i == fail:
                raise KeyError("read")
            yield torch.randn(5, 5)

    with pytest.raises(KeyError, match="read"), Upload(GPU) as upload:
        list(upload.each(weights(stop)))
    with pytest.raises(ValueError, match="caller"), Upload(GPU) as upload:
        for i, _ in enumerate(upload.each(weights(None))):
            if i == stop:
                raise ValueError("caller")
    assert uploads() == before
