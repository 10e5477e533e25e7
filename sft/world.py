"""The processes of a run: who am I, on which device, and how do we act as one."""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sft.errors import UserError
from sft.heartbeat import heart

DeviceChoice = Literal["auto", "cuda", "cpu"]
GradientCompression = Literal["none", "bf16"]
Result = TypeVar("Result")
SIGNS_OF_A_LOST_PEER = ("gloo/transport", "ncclRemoteError")  # in what gloo and NCCL report of a broken connection


@dataclass(frozen=True)
class World:
    """All processes of a run as seen by one of them. A single process is a world of size 1 with no process group."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, line: str) -> None:
        """Print on the main rank only. A console that has gone, or a full disk behind it, ends no run."""
        if not self.is_main:
            return
        try:
            print(line, flush=True)
        except OSError as error:
            if error.errno != errno.ENOSPC:  # there may be room again; who reads has left for good
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum of a tensor over all ranks; every rank must call it, with the same shape."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            heart.beat()
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is True on any rank; every rank must call it. Waits for the device where there are several."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def wrap(self, module: nn.Module, *, bucket_mb: int = 25, compression: GradientCompression = "none") -> nn.Module:
        """The module with its gradients averaged over all ranks; the module itself in a world of one.

        Gradients are sent in buckets of so many MiB, each as soon as the backward has filled it.
        """
        if self.size == 1:
            return module
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        wrapped = DistributedDataParallel(
            module, device_ids=device_ids, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb
        )
        if compression == "bf16":
            # DDP reads the annotations of what it is given, and does not understand postponed ones
            wrapped.register_comm_hook(None, lambda _, bucket: mean_sent_as_bf16(bucket, ranks=self.size))
        return wrapped

    def together(self, act: Callable[[], Result]) -> Result:
        """Run act() on every rank; if it raises UserError on any, all of them raise it.

        Without this a rank that fails alone leaves the others waiting in the next collective.
        """
        result: Result | None = None
        problem: tuple[str, int] | None = None
        try:
            result = act()
        except UserError as error:
            problem = (str(error), error.exit_status)
        heart.beat()
        problems = [p for p in self._gather(problem) if p is not None]
        if problems:
            message = "\n".join(dict.fromkeys(message for message, _ in problems))
            raise UserError(message, exit_status=problems[0][1])
        return result  # type: ignore[return-value]  # act() returned on every rank

    def on_main(self, act: Callable[[], Result]) -> Result:
        """The result of act(), run by the main rank alone and sent to all; a UserError is raised on all."""
        result = self.together(lambda: act() if self.is_main else None)
        shared = self._gather(result)[0]
        return shared  # type: ignore[return-value]  # the main rank's, and there act() returned

    def agree(self, what: str, value: str) -> None:
        """UserError on every rank unless `value` is the same on each; `what` names it in the message."""
        values = self._gather(value)
        if len(set(values)) > 1:
            odd = [rank for rank, other in enumerate(values) if other != values[0]]
            raise UserError(
                f"{what} differ between ranks: rank(s) {', '.join(map(str, odd))} have others than rank 0; "
                "start every rank with the same command and the same files"
            )

    def _gather(self, value: Result) -> Sequence[Result]:
        if self.size == 1:
            return [value]
        values: list[Result] = [value] * self.size
        dist.all_gather_object(values, value)
        heart.beat()
        return values


def mean_sent_as_bf16(bucket: dist.GradBucket, *, ranks: int) -> torch.futures.Future[Tensor]:
    """The mean of a bucket of gradients over all ranks, added up in bf16: half of the bytes on the wire.

    Divided in the dtype of the gradients, so that the scale is exact for any number of ranks; PyTorch's own hook, which
    divides in bf16, is for NCCL alone.
    """
    gradients = bucket.buffer()
    sent = dist.all_reduce(gradients.to(torch.bfloat16), async_op=True)
    assert sent is not None
    return sent.get_future().then(lambda future: gradients.copy_(future.value()[0]).div_(ranks))


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective, or the store, failed since a connection to another rank broke."""
    if isinstance(error, dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS_OF_A_LOST_PEER)


@contextmanager
def join_world(choice: DeviceChoice = "auto", *, timeout: float = 1800.0) -> Iterator[World]:
    """The world that torchrun describes in the environment, or a world of one; left in order where nothing failed.

    A collective fails after `timeout` seconds.

    NCCL on GPUs, one per local rank; gloo on CPUs. Raises UserError where CUDA is asked for and not to be had.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA GPU; use device=auto or device=cpu")
    if choice != "cpu" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; "
                "lower --nproc_per_node or set CUDA_VISIBLE_DEVICES"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size > 1:
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=timeout),
            device_id=device if on_gpu else None,
            **meeting_place(rank, size, timeout=timeout),
        )
    yield World(rank=rank, size=size, device=device)
    # Not after an error: it may wait for a rank that has gone, and who is told of the error ends the process.
    if size > 1:
        gc.collect()  # DDP's reference cycles would keep the group's threads alive into the interpreter's end
        dist.destroy_process_group()


def meeting_place(rank: int, size: int, *, timeout: float) -> dict[str, Any]:
    """Where the ranks of this attempt find each other, as init_process_group takes it; {} = where PyTorch has them.

    torchrun keeps its store when it starts dead ranks again, and who finds there the address of one that has died
    fails, or waits for it for good. Several machines need not count attempts alike: there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 brings a new store with each.
    """
    environment = os.environ
    is_kept = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not is_kept or environment.get("GROUP_WORLD_SIZE", "1") != "1":
        return {}
    place = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = dist.TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"attempt {attempt}", store), "rank": rank, "world_size": size}
