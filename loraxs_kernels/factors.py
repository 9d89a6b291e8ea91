"""A and B of many layers by truncated SVD: alike ones together, streamed to the devices that make them."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from .basis import Recipe
from .svd import Group, NotFinite, Plan, decompose, exact_matmul, group_size, working_bytes
from .weights import Weight

WORKSPACE = 4 * 2**30  # bytes

Deliver = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Job:
    """One layer to factor: what errors call it, its weight, the rank, and a recipe with init "svd"."""

    label: str
    weight: Weight
    rank: int
    recipe: Recipe


@torch.no_grad()
def factor(
    jobs: Sequence[Job],
    deliver: Deliver,
    *,
    devices: Sequence[torch.device] | None = None,
    workspace: int = WORKSPACE,
    progress: bool = True,
) -> None:
    """Make A = S V^T (r, K) and B = U (N, r) of every layer, in fp32 (fp64 for fp64 weights).

    Layers of one shape go through the small steps together; a layer has the same bits whichever others there are.

    Args:
        jobs: the layers.
        deliver: called as deliver(i, A, B) once for each job, in any order, one call at a time, with A and B on the
            device that made them.
        devices: to compute on.  A weight that is on one of them is factored there, others are shared out and moved,
            host to GPU through two pinned buffers while the GPU works.  None: every weight on its own device.
        workspace: bytes on each GPU beside the weights that are there already and what is delivered.  A and B do not
            depend on it.
        progress: show a bar when it takes more than a second.

    Raises ValueError, naming the layer, where a weight is not finite or the workspace holds not even one weight;
    whatever a weight's `read` raises.
    """
    queues: dict[torch.device, list[int]] = defaultdict(list)
    load = dict.fromkeys(devices or (), 0)
    for i, job in enumerate(jobs):
        device = job.weight.device
        if devices is not None and device not in load:
            device = min(load, key=load.__getitem__)
        queues[device].append(i)
        if devices is not None:
            load[device] += job.weight.shape[0] * job.weight.shape[1]
    for device, queue in queues.items():
        for i in queue:
            _weights_at_once(jobs[i], device, workspace)  # raises before anything is read
    stop, lock = threading.Event(), threading.Lock()
    with tqdm(total=len(jobs), desc="LoRA-XS factors", unit="layer", delay=1, disable=not progress) as bar:

        def work(device: torch.device) -> None:
            try:
                for i, A, B in _made(jobs, queues[device], device, workspace):
                    if stop.is_set():
                        return
                    with lock:
                        deliver(i, A, B)
                        bar.update()
            except BaseException:
                stop.set()
                raise

        if len(queues) <= 1:
            for device in queues:
                work(device)
            return
        # The settings are the process's, so they are set here for all threads; each only sets them again.
        with exact_matmul(), ThreadPoolExecutor(len(queues)) as threads:
            running = [threads.submit(work, device) for device in queues]
            try:
                for each in running:
                    each.result()
            finally:
                stop.set()


def compute_devices(device: torch.device | str | Sequence[torch.device | str]) -> list[torch.device]:
    """Devices to compute on, each with its index, so that it equals that of the tensors there."""
    devices = [torch.device(each) for each in ([device] if isinstance(device, (str, torch.device)) else device)]
    if not devices:
        raise ValueError("device: got no device, must be one or more, or None")
    for each in devices:
        if each.type not in ("cpu", "cuda"):
            raise ValueError(f"device: got {str(each)!r}, must be the CPU or CUDA devices")
        if each.type == "cuda" and not (each.index or 0) < torch.cuda.device_count():
            raise ValueError(f"device: got {str(each)!r}, but torch sees {torch.cuda.device_count()} CUDA devices")
    return [torch.empty(0, device=each).device for each in devices]


@torch.no_grad()
def _made(
    jobs: Sequence[Job], queue: Sequence[int], device: torch.device, workspace: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(i, A, B) for the jobs of one device's queue."""
    started: deque[list[int]] = deque()
    try:
        for U, S, Vh in decompose(_groups(jobs, queue, device, workspace, started)):
            for i, U_i, S_i, Vh_i in zip(started[0], U, S, Vh, strict=True):
                yield i, S_i[:, None] * Vh_i, U_i
            started.popleft()
    except NotFinite as error:
        raise ValueError(f"{jobs[started[0][error.index]].label}: {error}") from None


def _groups(
    jobs: Sequence[Job], queue: Sequence[int], device: torch.device, workspace: int, started: deque[list[int]]
) -> Iterator[Group]:
    """The jobs of a queue, alike ones together, their weights read when they are asked for; `started` gets whose."""
    alike = defaultdict(list)
    for i in queue:
        job = jobs[i]
        how = job.recipe.plan(job.rank, job.weight.shape)
        alike[job.weight.shape, job.weight.dtype, job.rank, how, job.recipe.seed].append(i)
    upload = _Upload(device) if device.type == "cuda" else None
    for (_, _, rank, how, seed), members in alike.items():
        batch: list[tuple[int, Tensor]] = []

        def whole(batch: list = batch, rank: int = rank, how: Plan = how, seed: int = seed) -> Group:
            started.append([i for i, _ in batch])
            group = Group([W for _, W in batch], rank, how, seed)
            batch.clear()
            return group

        for i in members:
            W = jobs[i].weight.read()
            if W.device != device:
                W = upload(W) if upload is not None else W.to(device)
            if batch and W.dtype != batch[0][1].dtype:  # what is read need not have the dtype that was announced
                yield whole()
            batch.append((i, W))
            if len(batch) == _weights_at_once(jobs[i], device, workspace, W.dtype):
                del W
                yield whole()
        if batch:
            yield whole()


def _weights_at_once(job: Job, device: torch.device, workspace: int, dtype: torch.dtype | None = None) -> int:
    """How many weights like this fit beside the working memory of two groups, one of them being prepared."""
    weight = job.weight
    dtype = dtype or weight.dtype
    how = job.recipe.plan(job.rank, weight.shape)
    places = group_size(weight.shape, dtype, device, how)
    if device.type == "cpu":
        return places
    copies = weight.copies or weight.device != device
    nbytes = weight.shape[0] * weight.shape[1] * dtype.itemsize if copies else 0
    working = places * working_bytes(weight.shape, dtype, how)
    room = workspace // 2 - working
    if room < nbytes:
        raise ValueError(
            f"workspace: got {workspace} bytes, must be at least {2 * (working + nbytes)} for {job.label} of shape "
            f"{weight.shape[0]} x {weight.shape[1]} and rank {job.rank}"
        )
    return min(places, room // nbytes) if copies else places


class _Upload:
    """Copies weights from the host to a GPU on a stream of its own, through two pinned buffers in turn."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.buffers: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def __call__(self, W: Tensor) -> Tensor:
        """W on the GPU; the current stream waits for it, the host does not."""
        if not W.is_contiguous() and W.mT.is_contiguous():
            return self(W.mT).mT
        buffer, copied = self.buffers.popleft() if len(self.buffers) == 2 else (None, None)
        if copied is not None:
            copied.synchronize()
        if buffer is None or buffer.numel() < W.nbytes:
            buffer = torch.empty(W.nbytes, dtype=torch.uint8, pin_memory=True)
        staged = buffer[: W.nbytes].view(W.dtype).view(W.shape)
        staged.copy_(W)
        with torch.cuda.stream(self.stream):
            there = staged.to(self.device, non_blocking=True)
            copied = self.stream.record_event()
        self.buffers.append((buffer, copied))
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        there.record_stream(current)
        return there
