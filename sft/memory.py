"""What a step of training needs of the device's memory, told part by part before any of it is taken.

One step of the very program is played on tensors that have shapes and no content (PyTorch's fake tensors): whatever an
operator would allocate is added up, and taken off again when the last reference to it is gone. So nothing here has to
be kept in step with the model, the loss or the optimizer; only what custom operators take for themselves is known by
formula, and what libraries keep by measurement.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sft.batches import Batch, TrainLoader
from sft.ema import MovingAverage
from sft.kernels import linear_cross_entropy
from sft.kernels.products import accumulation_dtype
from sft.loss import Loss
from sft.optim import make_optimizer
from sft.recompute import LEAST_FIRST, ActivationCheckpointing, Recomputing
from sft.step import SummedLoss, train_step
from sft.world import World

Part = Literal[
    "parameters",
    "gradients",
    "optimizer moments",
    "moving average",
    "activations",
    "head and loss",
    "temporaries",
    "program",
]
FUSED_HEAD = "sft::masked_linear_cross_entropy"
# Beside tensors: buffers of MKL and oneDNN and the code pages that a first step touches, 148 to 164 MB on an x86 Linux;
# cuBLAS and cuBLASLt take their workspace from PyTorch's own allocator.
CPU_LIBRARIES = 155_000_000
HEADROOM = 0.9  # share of the memory at hand that an estimate may fill: what it may be wrong by, and fragmentation


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One rank's share of a step, as far as memory depends on it."""

    model: Any  # on the run's device, or on the device meta
    batch: Batch  # of the run's shapes, on the run's device
    loss: Loss
    autocast_dtype: torch.dtype | None
    micro_steps: int
    world: World
    ema_decay: float | None = None  # a moving average of the weights is kept


def workload(
    model: Any,
    loader: TrainLoader,
    *,
    loss: Loss,
    autocast_dtype: torch.dtype | None,
    world: World,
    ema_decay: float | None = None,
) -> Workload:
    """The work of a run's first step, of whose micro-batches the first stands for all."""
    return Workload(
        model=model,
        batch=next(loader.step(0, rows_seen=0).batches),
        loss=loss,
        autocast_dtype=autocast_dtype,
        micro_steps=loader.micro_steps,
        world=world,
        ema_decay=ema_decay,
    )


@dataclass(frozen=True)
class Estimate:
    """Bytes at the moment of a step when most is allocated."""

    parts: Mapping[Part, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(work: Workload, recomputing: Recomputing) -> Estimate:
    """The memory of a step whose backward pass recomputes so much; neither memory nor random numbers are used.

    Compiled blocks count as `selective` where nothing is recomputed: what the compiler keeps is about that.
    """
    if work.model.compiled and recomputing == "none":
        recomputing = "selective"
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        ledger = _play(work, recomputing)
    parts: dict[Part, int] = {part: size for part, size in ledger.at_peak.items() if size}
    device = work.world.device
    if device.type == "cuda":
        parts["temporaries"] = parts.get("temporaries", 0) + linear_cross_entropy.CUDA_WORKSPACE
    else:
        held = sum(p.nbytes for p in work.model.parameters() if p.device.type == "cpu")
        parts["program"] = max(0, resident_bytes() - held) + CPU_LIBRARIES
    return Estimate(parts)


def _play(work: Workload, recomputing: Recomputing) -> Ledger:
    """A step on tensors without content, whose allocations are in the ledger."""
    model, device = hollow(work.model).train(), work.world.device
    model.activation_checkpointing = recomputing
    work.batch.documents.prepare(  # reads numbers, which fake tensors do not have
        model.attention, dropout=model.config.attention_dropout_rate, compiled=model.compiled
    )
    _ = work.batch.documents.spans  # which stand for flex's block mask, too
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger(device) as ledger:
        with ledger.making("parameters"):
            give_memory(model, device)
        optimizer = make_optimizer(model, learning_rate=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        with ledger.making("optimizer moments"):
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with ledger.making("moving average"):  # held until the step is over
            average = None if work.ema_decay is None else MovingAverage(model, work.ema_decay)
        if work.world.size > 1:  # gradients are views of buckets, which stay
            with ledger.making("gradients"):
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: ledger.move(p.grad, "gradients"))
        ledger.forget_peak()
        loss = SummedLoss(model, autocast_dtype=work.autocast_dtype, loss=work.loss)
        result = train_step(
            _Noting(loss, ledger),
            optimizer,
            [work.batch] * min(2, work.micro_steps),
            target_weight=1.0,
            learning_rate=0.0,
            grad_clip=1.0,
            world=World(rank=0, size=1, device=device),
        )
        if average is not None:
            average.update(result.judgement.skips)
    return ledger


def hollow(model: Any) -> Any:
    """A copy of a model on the device meta, not compiled: its structure without its numbers."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    copied = copy.deepcopy(model, empty)
    for module in copied.modules():
        module._compiled_call_impl = None
    return copied


def give_memory(model: nn.Module, device: torch.device) -> None:
    """Put empty parameters in the place of those on the device meta; what is shared stays shared."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if old not in new:
                    empty = torch.empty(old.shape, dtype=old.dtype, device=device)
                    new[old] = nn.Parameter(empty, requires_grad=old.requires_grad)
                module._parameters[name] = new[old]


class _Noting(nn.Module):
    """The loss module; what it makes is kept for the backward pass, what is made after it is temporary."""

    def __init__(self, loss: nn.Module, ledger: Ledger):
        super().__init__()
        self.loss, self.ledger = loss, ledger

    def forward(self, batch: Batch, *, grad_scale: float) -> Tensor:
        with self.ledger.making("activations"):
            return self.loss(batch, grad_scale=1.0)


class Ledger(TorchDispatchMode):
    """The bytes of all tensors that are alive on one device, by what they are; and those at the worst moment."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.alive: Counter[Part] = Counter()
        self.at_peak: dict[Part, int] = {}
        self.peak = 0
        self._part: Part = "temporaries"
        self._known: dict[int, tuple[Part, int]] = {}  # by storage
        self._kept_logits = 0

    @contextmanager
    def making(self, part: Part) -> Iterator[None]:
        """New tensors belong to this part."""
        before, self._part = self._part, part
        yield
        self._part = before

    def move(self, tensor: Tensor | None, part: Part) -> None:
        """A tensor belongs to another part from now on."""
        if tensor is not None and (known := self._known.get(key := tensor.untyped_storage()._cdata)):
            self.alive[known[0]] -= known[1]
            self.alive[part] += known[1]
            self._known[key] = (part, known[1])

    def forget_peak(self) -> None:
        self.peak = 0

    def __torch_dispatch__(
        self, operator: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = operator(*args, **(kwargs or {}))
        is_head = operator.name().startswith(FUSED_HEAD)
        with self.making("head and loss") if is_head else self.making(self._part):
            for result in tree_leaves(results):
                if isinstance(result, Tensor) and result.device.type == self.device.type:
                    self._add(result)
        if is_head:
            logits, others = fused_head_bytes(*args, **(kwargs or {}))
            self.alive["head and loss"] += max(logits, self._kept_logits) - self._kept_logits + others
            self._note()
            self.alive["head and loss"] -= others
            if self.device.type == "cpu":  # where their memory stays for the next ones
                self._kept_logits = max(logits, self._kept_logits)
            else:
                self.alive["head and loss"] -= logits
        self._note()
        return results

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = (self._part, storage.nbytes())
            self.alive[self._part] += storage.nbytes()
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        part, size = self._known.pop(key)
        self.alive[part] -= size

    def _note(self) -> None:
        total = sum(self.alive.values())
        if total > self.peak:
            self.peak, self.at_peak = total, dict(self.alive)


def fused_head_bytes(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    _weights: Tensor | None,
    _rows: Tensor | None,
    _grad_scale: Tensor,
    hidden_gradient: bool,
    head_gradient: bool,
    _details: bool,
    dtype: torch.dtype,
    *_others: Any,
) -> tuple[int, int]:
    """What the fused head (sft/kernels/linear_cross_entropy.py) takes beside its results: for logits, and otherwise."""
    (V, D), N, wide = head_weight.shape, len(labels), accumulation_dtype(dtype).itemsize
    size = linear_cross_entropy.chunk_rows(N, hidden, vocabulary=V, dtype=dtype, hidden_gradient=hidden_gradient)
    rows = min(size, N)
    row = D * (dtype.itemsize + hidden_gradient * (wide + hidden.dtype.itemsize))
    if not hidden.is_cuda and head_gradient and dtype == torch.float16:
        row += V * wide  # the gradient of the logits, widened for its product
    of_head = V * D * (dtype.itemsize if head_weight.dtype != dtype else 0)  # autocast's copy
    if head_gradient and head_weight.dtype.itemsize < wide:
        of_head += V * D * wide  # the sum, before it is rounded
    return rows * V * dtype.itemsize, rows * row + of_head


def estimates(work: Workload) -> dict[Recomputing, Estimate]:
    """The estimate of each mode, the least recomputing first."""
    return {mode: estimate(work, mode) for mode in LEAST_FIRST}


def settle(choice: ActivationCheckpointing, work: Workload) -> tuple[Recomputing, str]:
    """What to recompute on all ranks, and why, in a sentence. Every rank must call it."""
    if choice != "auto":
        return choice, f"activation_checkpointing={choice}"

    def on_main() -> tuple[Recomputing, str]:
        try:
            found = estimates(work)
        except Exception as error:  # an operator that does not run without numbers: a run must not fail for that
            return LEAST_FIRST[-1], f"cannot be estimated ({type(error).__name__}: {error}); {LEAST_FIRST[-1]} is safe"
        at_hand = memory_at_hand(work.world.device)
        chosen = choose(found, at_hand)
        return chosen, f"activation_checkpointing={chosen} of auto: {described(found, at_hand)}"

    return work.world.on_main(on_main)


def choose(found: Mapping[Recomputing, Estimate], at_hand: int) -> Recomputing:
    """The mode with the least recomputing that fits; `full` where none does."""
    return next((mode for mode in found if found[mode].total <= HEADROOM * at_hand), LEAST_FIRST[-1])


def described(found: Mapping[Recomputing, Estimate], at_hand: int) -> str:
    """Each mode's estimate and the memory at hand, in a sentence."""
    told = ", ".join(f"{mode} {gib(estimate.total)}" for mode, estimate in found.items())
    return f"estimated {told}; {gib(at_hand)} at hand"


def gib(size: float) -> str:
    """A size for people."""
    return f"{size / 2**30:.2f} GiB" if size < 10 * 2**30 else f"{size / 2**30:.1f} GiB"


def memory_at_hand(device: torch.device) -> int:
    """Bytes that this process can have on a device in all: what it has and what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return resident_bytes() + min(_available_bytes(), _left_in_control_group())


def resident_bytes() -> int:
    """Physical memory of this process now; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _available_bytes() -> int:
    """Memory of this machine that programs can still have."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_in_control_group(folder: str = "/sys/fs/cgroup") -> int:
    """What a container may still take; without limit where there is none."""
    try:
        with open(f"{folder}/memory.max") as limit, open(f"{folder}/memory.current") as current:
            return max(0, int(limit.read()) - int(current.read()))
    except (OSError, ValueError):  # no container, or "max"
        return 2**63
