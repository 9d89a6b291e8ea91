"""Weights on their way to the device that factors them: one after another, and large ones in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

import torch
from torch import Tensor


class Upload:
    """Brings tensors to a device.

    To a GPU: a thread copies what is on the host into one of two pinned buffers, while the caller uses the one before,
    and a stream of its own copies it on.  The current stream waits for it, the host does not.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> Upload:
        if self.device.type == "cuda":
            self.stream, self.stager = torch.cuda.Stream(self.device), ThreadPoolExecutor(1)
            self.buffers = SimpleQueue()
            for _ in range(2):
                self.buffers.put((torch.empty(0, dtype=torch.uint8, device="cpu"), None))
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.stager.shutdown()

    def each(self, weights: Iterable[Tensor | InPieces]) -> Iterator[Tensor | InPieces]:
        """Each on the device, in order, unless it goes there in pieces; the next one is read and staged by then.

        Before one in pieces is given out all others are, so that both buffers are its own.
        """
        if self.device.type == "cpu":
            yield from map(lambda W: W.to(self.device) if isinstance(W, Tensor) else W, weights)  # holds none of them
            return
        coming = None  # staged or being so
        for W in weights:
            next_one = None
            if isinstance(W, Tensor) and W.device.type == "cpu":
                turned = not W.is_contiguous() and W.mT.is_contiguous()
                next_one = self.stager.submit(self._stage, W.mT if turned else W), turned
            if coming is not None:
                yield self._send(*coming)
            coming = next_one
            if coming is None:
                yield W.to(self.device, non_blocking=True) if isinstance(W, Tensor) else W
            del W
        if coming is not None:
            yield self._send(*coming)

    def _stage(self, W: Tensor) -> tuple[Tensor, Tensor]:
        buffer, sent = self.buffers.get()
        if sent is not None:
            sent.synchronize()
        if buffer.numel() < W.nbytes:
            buffer = torch.empty(W.nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        return buffer, buffer[: W.nbytes].view(W.dtype).view(W.shape).copy_(W)

    def _send(self, staged: Future, turned: bool) -> Tensor:
        buffer, here = staged.result()
        with torch.cuda.stream(self.stream):
            there = here.to(self.device, non_blocking=True)
            self.buffers.put((buffer, self.stream.record_event()))
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        there.record_stream(current)
        return there.mT if turned else there


class InPieces:
    """A weight on the host that does not fit beside the rest: some rows at a time go to a device, for each product."""

    def __init__(self, W: Tensor, upload: Upload, nbytes: int) -> None:
        self.W, self.shape, self.dtype, self.device, self.upload = W, W.shape, W.dtype, upload.device, upload
        rows = max(1, nbytes // (W.shape[1] * W.itemsize))
        self.slices = [slice(i, i + rows) for i in range(0, len(W), rows)]

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """The rows and W[rows] on the device, in order."""
        return zip(self.slices, self.upload.each(self.W[at] for at in self.slices), strict=True)
