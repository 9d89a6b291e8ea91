"""A and B of many layers by truncated SVD: alike ones together, streamed (upload.py) to the devices that make them."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from .exact_matmul import exact_matmul
from .naming import Former, first_line
from .recipe import Recipe, is_number
from .svd import (
    KEEP_BYTES,
    Group,
    NotFinite,
    Plan,
    check_device,
    decompose,
    group_size,
    host_pool,
    to_host,
    working_bytes,
)
from .svd_math import Q_TERMS, can_sum_in_fp32
from .upload import InPieces, Upload
from .weights import Weight

WORKSPACE = 4 * 2**30  # bytes
WORKSPACE_IN_BYTES = Former("workspace_gib", lambda nbytes, _: nbytes / 2**30 if is_number(nbytes) else nbytes)
PIECES = 16  # in a workspace, of which one is in use, one on its way and one let go

Deliver = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Job:
    """One layer to factor: what errors call it, its weight, the rank, and a recipe with init "svd"."""

    label: str
    weight: Weight
    rank: int
    recipe: Recipe


def compute_options(
    device: torch.device | str | Sequence[torch.device | str] | None, workspace_gib: float, progress: bool
) -> dict[str, Any]:
    """The options of `factor` for these arguments of `attach`; ValueError, naming the argument, for a wrong one."""
    devices = None if device is None else compute_devices(device)
    if not (is_number(workspace_gib) and 0 < workspace_gib < 2**33):
        raise ValueError(f"workspace_gib: got {workspace_gib!r}, must be a number of GiB above 0 and below 2^33")
    return {"devices": devices, "workspace": int(workspace_gib * 2**30), "progress": progress}


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

    Layers of one shape go through the small steps together.  The groups and the workspace change only the rounding.

    Args:
        jobs: the layers.
        deliver: called as deliver(i, A, B) once for each job, in any order, one call at a time, with A and B on the
            weight's device.
        devices: to compute on.  A weight that is on one of them is factored there, others are shared out and moved,
            host to GPU through two pinned buffers while the GPU works, in pieces and anew for each product where it is
            larger than a quarter of the workspace.  None: every weight on its own device.
        workspace: bytes on each GPU beside the weights that are there already and what is delivered.
        progress: show a bar when it takes more than a second.

    Weights that are sharded over ranks are gathered one at a time, all of these ranks take part, each factors those
    whose turn is its own, and sends A and B to the others: no rank holds the model.

    Raises ValueError, naming the layer, where a weight is not finite or does not fit into the workspace; whatever a
    weight's `read` raises.  What one rank raises for a sharded weight, all raise.
    """
    sharded: dict[tuple, list[int]] = defaultdict(list)
    for i, job in enumerate(jobs):
        sharded[job.weight.groups].append(i)
    own, error = sharded.pop((), []), None
    with _bar(len(jobs)) if progress else nullcontext() as bar:

        def delivered(order: Sequence[int], k: int, A: Tensor, B: Tensor) -> None:
            deliver(order[k], A, B)
            if bar is not None:
                bar.update()

        try:
            _factor([jobs[i] for i in own], partial(delivered, own), devices, workspace)
        except Exception as raised:
            if not sharded:
                raise
            error = raised
        for groups, order in sharded.items():
            _in_turns([jobs[i] for i in order], partial(delivered, order), groups, devices, workspace, error)


def _in_turns(
    jobs: Sequence[Job],
    deliver: Deliver,
    groups: Sequence[Any],
    devices: Sequence[torch.device] | None,
    workspace: int,
    error: Exception | None,
) -> None:
    """`factor` for weights that are sharded over the ranks of these process groups.

    error: what this rank has raised before.  The ranks along the longest dimension of the mesh take turns; those along
    the others do the same work.
    """
    turns = max(groups, key=dist.get_world_size)
    ranks, rank = dist.get_world_size(turns), dist.get_rank(turns)
    for first in range(0, len(jobs), ranks):
        together, dtypes, own, made = jobs[first : first + ranks], [], None, []
        for k, job in enumerate(together):
            begun = [group._get_sequence_number_for_group() for group in groups]
            try:
                W = job.weight.read()
                dtypes.append(torch.promote_types(W.dtype, torch.float32))
                own = W if k == rank else own
                del W
            except Exception as raised:
                # Without a collective the others still wait for this rank to gather the weight, and would take its next
                # collective for that one.  It has none, and their time runs out.
                if begun == [group._get_sequence_number_for_group() for group in groups]:
                    raise
                error = error or raised
        if error is None and own is not None:
            try:
                made = _of_one(together[rank], own, devices, workspace)
            except Exception as raised:
                error = raised
        _raise_on_all(error, groups)
        for k, (job, dtype) in enumerate(zip(together, dtypes, strict=True)):
            (N, K), r = job.weight.shape, job.rank
            if k == rank:
                factors = [t.contiguous() for t in made]
            else:
                factors = [torch.empty(size, dtype=dtype, device=job.weight.device) for size in ((r, K), (N, r))]
            for t in factors:
                dist.broadcast(t, dist.get_global_rank(turns, k), group=turns)
            deliver(first + k, *factors)


def _of_one(job: Job, W: Tensor, devices: Sequence[torch.device] | None, workspace: int) -> list[Tensor]:
    """A and B of a layer whose weight has been read."""
    factors: list[Tensor] = []
    job = replace(job, weight=replace(job.weight, read=lambda: W, groups=()))
    _factor([job], lambda _, *made: factors.extend(made), devices, workspace)
    return factors


def _raise_on_all(error: Exception | None, groups: Sequence[Any]) -> None:
    """Raise the error of this rank, if it has one, or say what another has raised: on all ranks or on none."""
    said = None if error is None else f"{type(error).__name__}: {error}"
    for group in groups:  # the first of the ranks along one dimension, then along the next
        ranks: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(ranks, said, group=group)
        said = next(filter(None, ranks), None)
    if error is not None:
        raise error
    if said is not None:
        raise RuntimeError(f"another process (rank) could not read its weights or compute their SVD: {said}")


def _factor(jobs: Sequence[Job], deliver: Deliver, devices: Sequence[torch.device] | None, workspace: int) -> None:
    """`factor` for weights that are not sharded."""
    queues: dict[torch.device, list[int]] = defaultdict(list)
    load = dict.fromkeys(devices or (), 0)
    for i, job in enumerate(jobs):
        device = job.weight.device
        if devices is not None and device not in load:
            device = min(load, key=load.__getitem__)
        check_device(device, job.label)
        _weights_at_once(job, device, workspace)  # raises before anything is read
        queues[device].append(i)
        if devices is not None:
            load[device] += job.weight.shape[0] * job.weight.shape[1]
    stop, lock = threading.Event(), threading.Lock()
    of_host = next((device for device in queues if device.type == "cuda"), torch.device("cpu"))
    # What the caller's streams have under way comes first, and what is delivered is theirs.
    streams = {device: torch.cuda.current_stream(device) for device in queues if device.type == "cuda"}
    with host_pool(of_host, len(jobs)) as pool:

        def work(device: torch.device) -> None:
            try:
                with torch.cuda.stream(streams.get(device)):
                    for i, A, B in _made(jobs, queues[device], device, workspace, pool):
                        if stop.is_set():
                            return
                        with lock:
                            deliver(i, A, B)
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


def _bar(total: int) -> tqdm:
    """A progress bar that shares its lock with no other bar, thread or process.

    tqdm's bars share one lock, and processes forked from one another share a semaphore in it: if a process is killed
    while it holds that semaphore, the others wait for it for ever.
    """

    class Bar(tqdm):
        _instances: ClassVar = weakref.WeakSet()
        monitor_interval = 0  # tqdm's thread that watches slow bars, which miniters=1 makes unnecessary

    Bar.set_lock(threading.RLock())
    return Bar(total=total, desc="LoRA-XS factors", unit="layer", delay=1, miniters=1)


def compute_devices(device: torch.device | str | Sequence[torch.device | str]) -> list[torch.device]:
    """Devices to compute on, each with its index, so that it equals that of the tensors there."""
    try:
        devices = [torch.device(each) for each in ([device] if isinstance(device, (str, torch.device)) else device)]
    except (RuntimeError, TypeError) as error:
        must = "must be a torch.device, its name, or several"
        raise ValueError(f"device: got {device!r}, {must}: {first_line(error)}") from error
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
    jobs: Sequence[Job], queue: Sequence[int], device: torch.device, workspace: int, pool: Executor | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(i, A, B) for the jobs of one device's queue, on the devices of their weights."""
    started: deque[list[int]] = deque()
    coming: list[tuple[int, Callable[[], Tensor], Callable[[], Tensor]]] = []
    groups = _groups(jobs, queue, device, workspace, started)
    try:
        for U, S, Vh in decompose(groups, device, pool, min(KEEP_BYTES, workspace // 4)):
            before, coming = coming, []
            for i, U_i, S_i, Vh_i in zip(started[0], U, S, Vh, strict=True):
                A, B = S_i[:, None] * Vh_i, U_i
                coming.append((i, *(_towards(jobs[i].weight.device, t) for t in (A, B))))
            started.popleft()
            # One group later: to wait for a copy now would be to wait for the products that were begun before it.
            for i, A, B in before:
                yield i, A(), B()
        for i, A, B in coming:
            yield i, A(), B()
    except NotFinite as error:
        raise ValueError(f"{jobs[started[0][error.index]].label}: {error}") from None


def _towards(device: torch.device, t: Tensor) -> Callable[[], Tensor]:
    """Starts to bring a tensor to the device it is for; the function waits for it."""
    if device.type == "cpu":
        return to_host(t)
    there = t.to(device, non_blocking=True)
    return lambda: there


def _groups(
    jobs: Sequence[Job], queue: Sequence[int], device: torch.device, workspace: int, started: deque[list[int]]
) -> Iterator[Group]:
    """The jobs of a queue, alike ones together, their weights read when they are asked for; `started` gets whose."""
    alike = defaultdict(list)
    for i in queue:
        job = jobs[i]
        how = job.recipe.plan(job.rank, job.weight.shape)
        alike[job.weight.shape, job.weight.dtype, job.rank, how, job.recipe.seed].append(i)
    weights = _brought(jobs, [i for members in alike.values() for i in members], device, workspace)

    def whole(batch: list[tuple[int, Tensor | InPieces]], rank: int, how: Plan, seed: int) -> Group:
        """The batch as a group; from then on only the group holds its weights."""
        started.append([i for i, _ in batch])
        group = Group([W for _, W in batch], rank, how, seed)
        batch.clear()
        return group

    for (_, _, rank, how, seed), members in alike.items():
        batch: list[tuple[int, Tensor | InPieces]] = []
        for i in members:
            W = next(weights)
            if batch and W.dtype != batch[0][1].dtype:  # what is read need not have the dtype that was announced
                yield whole(batch, rank, how, seed)
            batch.append((i, W))
            if len(batch) >= _weights_at_once(jobs[i], device, workspace, W.dtype):
                del W
                yield whole(batch, rank, how, seed)
        if batch:
            yield whole(batch, rank, how, seed)


def _weights_at_once(job: Job, device: torch.device, workspace: int, dtype: torch.dtype | None = None) -> int:
    """How many weights like this go together on a device.

    A quarter of the workspace is for making one group, a quarter for those that wait for the host, half for the
    weights of two groups, one of them on its way, where they are not on the device already.
    """
    weight = job.weight
    dtype = dtype or weight.dtype
    how = job.recipe.plan(job.rank, weight.shape)
    most = group_size(weight.shape, dtype, device, how)
    if device.type == "cpu":
        return most
    elements = weight.shape[0] * weight.shape[1]
    nbytes = elements * dtype.itemsize if weight.copies or weight.device != device else 0
    if pieces := _in_pieces(weight, device, workspace, dtype):
        most, nbytes, elements = 1, 0, workspace // PIECES // dtype.itemsize
    upcast = 4 * elements if dtype.itemsize < 4 and not can_sum_in_fp32(device) else 0
    making = working_bytes(weight.shape, dtype, how)
    if pieces:  # the product with one, before it is added
        making += 4 * Q_TERMS * max(weight.shape) * how.block
    if workspace < (needed := 4 * max(making + upcast, nbytes)):
        raise ValueError(
            f"workspace_gib: got {workspace / 2**30:g}, must be at least {needed / 2**30:.2g} for {job.label} of shape "
            f"{weight.shape[0]} x {weight.shape[1]} and rank {job.rank}"
        )
    most = min(most, (workspace // 4 - upcast) // making)
    return min(most, workspace // 4 // nbytes) if nbytes else most


def _in_pieces(weight: Weight, device: torch.device, workspace: int, dtype: torch.dtype) -> bool:
    """Whether a weight on the host is too large for its part of the workspace, and goes to the device in pieces."""
    nbytes = weight.shape[0] * weight.shape[1] * dtype.itemsize
    return weight.device.type == "cpu" and device.type == "cuda" and nbytes > workspace // 4


def _brought(
    jobs: Sequence[Job], order: Sequence[int], device: torch.device, workspace: int
) -> Iterator[Tensor | InPieces]:
    """The weights of jobs in this order, read when their turn comes, on the device or to be brought there in pieces."""

    def read(i: int) -> Tensor | InPieces:
        W = jobs[i].weight.read()
        large = _in_pieces(jobs[i].weight, device, workspace, W.dtype)
        return InPieces(W, upload, workspace // PIECES) if large else W

    with Upload(device) as upload:
        yield from upload.each(map(read, order))
