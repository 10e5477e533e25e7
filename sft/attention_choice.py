"""What computes attention in a run: chosen once, before the first step, by a trial of numbers and of time."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.attention
from torch import Tensor

from sft.attention import BackEnd, Documents, causal_attention
from sft.batches import TrainLoader, on_device
from sft.errors import UserError
from sft.kernels.products import is_out_of_memory
from sft.world import World

AttentionChoice = Literal["auto", "varlen", "flash3", "flash4", "flex", "sdpa", "definition"]
BY_TRIAL: tuple[AttentionChoice, ...] = ("varlen", "flash3", "flash4", "flex", "sdpa")  # of equals the first is taken
DESCRIPTIONS = {
    "varlen": "FlashAttention 2 with the documents' lengths",
    "varlen_whole_rows": "FlashAttention 2 with the documents' lengths, cuDNN where each row is one document",
    "flash3": "FlashAttention 3 with the documents' lengths",
    "flash4": "FlashAttention 4 with the documents' lengths",
    "flex": "FlexAttention under a block mask of documents",
    "sdpa": "PyTorch's attention under a mask of documents",
    "by_document": "PyTorch's attention, one document after the other",
    "definition": "softmax of all scores under a mask (the definition)",
}
IMPLEMENTATIONS = {"flash3": ("FA3", "flash_attn_interface"), "flash4": ("FA4", "flash_attn.cute.interface")}
HALF = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the norm; rounding alone is 3e-3 and 4e-4
TRIAL_ROWS = ([1, 37, 130, 60], [255], [128, 1, 127])  # one-token documents, padded tails, a row filled by two
TRIAL_TOKENS, ROUNDS = 256, 5
LARGEST_MASK = 2**31  # bytes


class Heads(NamedTuple):
    query: int
    key: int
    size: int


@dataclass(frozen=True)
class Attention:
    """A way to compute attention within documents, and why it is the one."""

    name: str  # of DESCRIPTIONS
    reason: str

    def __str__(self) -> str:
        return f"{DESCRIPTIONS[self.name]}: {self.reason}"

    @property
    def back_end(self) -> BackEnd:
        if self.name in IMPLEMENTATIONS:
            return "varlen"
        return "sdpa" if self.name == "by_document" else self.name  # type: ignore[return-value]


class Outcome(NamedTuple):
    """What the trial of a back end shows: the time of a layer's forward and backward, or why there is none."""

    milliseconds: float = math.inf
    problem: str | None = None


def choose_attention(
    choice: AttentionChoice,
    *,
    heads: Heads,
    dtype: torch.dtype,
    dropout: float,
    loader: TrainLoader,
    world: World,
) -> Attention:
    """The way for heads of this dtype; UserError where the one asked for cannot compute them here.

    What can be had takes turns on the documents of the loader's first micro-step. All ranks call this and get the same:
    the main rank measures, and the others make sure that it works for them.
    """
    device = world.device
    if choice == "definition":
        return Attention(choice, "attention=definition")
    if device.type != "cuda":
        if choice not in ("auto", "sdpa"):
            raise UserError(f"attention={choice} needs a CUDA GPU, and this is the CPU; use attention=auto, or sdpa")
        return Attention("by_document", "this is the CPU" if choice == "auto" else "attention=sdpa")
    if dropout > 0:
        if choice not in ("auto", "sdpa"):
            raise UserError(f"attention={choice} has no dropout; set dropout=0, or use attention=sdpa")
        slower = "its cost follows the square of the row"
        return Attention("sdpa", f"dropout={dropout:g}, which the faster ones have not; {slower}")
    if choice == "sdpa":
        return Attention(choice, "attention=sdpa")
    chosen = world.on_main(lambda: _measured_choice(choice, heads, dtype, first_documents(loader)))
    world.together(lambda: _take(chosen, heads, dtype, device))
    return chosen


def first_documents(loader: TrainLoader) -> Documents:
    """Those of the first micro-step of a run, on its device."""
    rows = [loader.samples.lengths[loader.stream.row(place)].tolist() for place in range(loader.batch_size)]
    return documents_of(rows, loader.stream.block_size, loader.device)


def _measured_choice(choice: AttentionChoice, heads: Heads, dtype: torch.dtype, documents: Documents) -> Attention:
    """The fastest that gives the right numbers; of all, or the one asked for."""
    asked = BY_TRIAL if choice == "auto" else (choice,)
    outcomes = {name: try_out(name, heads, dtype, documents) for name in asked}
    best = min(asked, key=lambda name: outcomes[name].milliseconds)
    told = "; ".join(_told(name, outcome) for name, outcome in outcomes.items())
    if outcomes[best].problem is not None:
        if choice != "auto":
            raise UserError(f"attention={choice} {outcomes[choice].problem}; use attention=auto, or sdpa")
        return Attention("sdpa", f"nothing else works here: {told}")
    name = best
    if best == "varlen":
        B, T = documents.ids.shape
        whole = documents_of([[T]] * B, T, documents.ids.device)
        ours, theirs = (try_out(each, heads, dtype, whole) for each in ("varlen", "varlen_whole_rows"))
        if theirs.milliseconds < ours.milliseconds:
            name = "varlen_whole_rows"  # type: ignore[assignment]
            told += f"; with whole rows cuDNN {theirs.milliseconds:.2f} ms, varlen {ours.milliseconds:.2f} ms"
    torch.cuda.empty_cache()
    return Attention(name, f"{'fastest here' if choice == 'auto' else f'attention={choice}'}: {told}")


def _told(name: str, outcome: Outcome) -> str:
    return f"{name} {outcome.problem or f'{outcome.milliseconds:.2f} ms a layer'}"


def _take(chosen: Attention, heads: Heads, dtype: torch.dtype, device: torch.device) -> None:
    """Make the choice hold in this process; UserError if it does not work here."""
    if chosen.name == "sdpa":
        return

    def take() -> Outcome:
        if chosen.name in IMPLEMENTATIONS:
            torch.nn.attention.activate_flash_attention_impl(IMPLEMENTATIONS[chosen.name][0])
        return Outcome(problem=wrong_numbers(chosen.back_end, heads, dtype, device))

    if (problem := _outcome_of(take).problem) is not None:
        raise UserError(f"attention={chosen.name} works on the main rank, but here it {problem}; use attention=sdpa")


def try_out(name: str, heads: Heads, dtype: torch.dtype, documents: Documents) -> Outcome:
    """The time of a back end that gives the right numbers."""
    if (problem := problem_of(name, heads, dtype, documents)) is not None:
        return Outcome(problem=problem)

    def measure() -> Outcome:
        with active(name):
            return Outcome(_milliseconds(Attention(name, "").back_end, heads, dtype, documents))

    return _outcome_of(measure)


def problem_of(name: str, heads: Heads, dtype: torch.dtype, documents: Documents) -> str | None:
    """Why a back end cannot be used for these documents; None if it can."""
    if (problem := unsupported(name, heads, dtype, documents)) is not None:
        return problem

    def examine() -> Outcome:
        with active(name):
            return Outcome(problem=wrong_numbers(Attention(name, "").back_end, heads, dtype, documents.ids.device))

    return _outcome_of(examine).problem


def _outcome_of(measure: Callable[[], Outcome]) -> Outcome:
    """Its result, or what it raised as a problem."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
            return measure()
    except Exception as error:  # whatever a compiler, a driver or a library raises
        if is_out_of_memory(error):
            return Outcome(problem="is out of memory")
        first_line = str(error).strip().partition("\n")[0]
        return Outcome(problem=f"does not work here ({type(error).__name__}: {first_line})")


def unsupported(name: str, heads: Heads, dtype: torch.dtype, documents: Documents) -> str | None:
    """Why a back end is not to be tried; None if it is."""
    if name == "sdpa":
        B, T = documents.ids.shape
        scores = B * T * T * (1 + dtype.itemsize)  # the mask, and what the kernel makes of it
        return f"has a mask of {scores / 2**30:.1f} GiB" if scores > LARGEST_MASK else None
    if name == "flex":
        return "has no float64" if dtype == torch.float64 else None
    if dtype not in HALF:
        return f"has no {str(dtype).removeprefix('torch.')}"
    if heads.size % 8 or heads.size > 256:
        return f"has no heads of {heads.size}"
    return _missing(*IMPLEMENTATIONS[name], documents.ids.device) if name in IMPLEMENTATIONS else None


def _missing(implementation: str, module: str, device: torch.device) -> str | None:
    listed: list[str] = getattr(torch.nn.attention, "list_flash_attention_impls", list)()
    if implementation not in listed:
        return f"is unknown to torch {torch.__version__}"
    if not _is_installed(module):
        return "is not installed"
    return "needs a newer GPU" if torch.cuda.get_device_capability(device)[0] < 9 else None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a package on its way that is missing or broken
        return False


@contextlib.contextmanager
def active(name: str) -> Iterator[None]:
    """FlashAttention 3 or 4 in the place of what PyTorch brings along, if the name is theirs."""
    if name not in IMPLEMENTATIONS:
        yield
        return
    torch.nn.attention.activate_flash_attention_impl(IMPLEMENTATIONS[name][0])
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def wrong_numbers(back_end: BackEnd, heads: Heads, dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with values or gradients beside the definition's in fp32; None if nothing is."""
    batches = [documents_of(TRIAL_ROWS, TRIAL_TOKENS, device)]
    if back_end == "varlen_whole_rows":
        batches.append(documents_of([[TRIAL_TOKENS]] * len(TRIAL_ROWS), TRIAL_TOKENS, device))
    for documents in batches:
        *inputs, grad = drawn(heads, dtype, documents)
        wide = [x.detach().float().requires_grad_() for x in inputs]
        ours = _results(back_end, inputs, grad, documents)
        exact = _results("definition", wide, grad.float(), documents)
        names = ("values", "gradients of q", "gradients of k", "gradients of v")
        for name, one, two in zip(names, ours, exact, strict=True):
            error = (one.float() - two).norm() / two.norm()
            if not error <= TOLERANCE.get(dtype, 2e-3):
                return f"gives wrong {name} (error {error:.1e})"
    return None


def _milliseconds(back_end: BackEnd, heads: Heads, dtype: torch.dtype, documents: Documents) -> float:
    """The time of a forward and a backward pass on the device, which is kept busy until all are launched: as in a
    training step, where the host is ahead, launches cost nothing."""
    *inputs, grad = drawn(heads, dtype, documents)
    for _ in range(2):
        _results(back_end, inputs, grad, documents)
    work = torch.zeros(8192, 8192, dtype=torch.bfloat16, device=grad.device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(2 * ROUNDS):  # at least a millisecond each
        work = work @ work
    start.record()
    for _ in range(ROUNDS):
        _results(back_end, inputs, grad, documents)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / ROUNDS


def _results(back_end: BackEnd, inputs: Sequence[Tensor], grad: Tensor, documents: Documents) -> list[Tensor]:
    """The mixed values and the gradients of q, k and v."""
    q, k, v = inputs
    mixed = causal_attention(q, k, v, documents=documents, dropout=0.0, back_end=back_end)
    return [mixed.detach(), *torch.autograd.grad(mixed, inputs, grad)]


def drawn(heads: Heads, dtype: torch.dtype, documents: Documents) -> list[Tensor]:
    """q, k, v and a gradient of the values, laid out as a block has them; no generator of the run is moved."""
    B, T = documents.ids.shape
    device = documents.ids.device
    generator = torch.Generator(device).manual_seed(0)
    counts = (heads.query, heads.key, heads.key, heads.query)
    tensors = [torch.randn(B, T, n, heads.size, generator=generator, device=device, dtype=dtype) for n in counts]
    return [x.transpose(1, 2).requires_grad_(place < 3) for place, x in enumerate(tensors)]


def documents_of(rows: Sequence[Sequence[int]], block_size: int, device: torch.device) -> Documents:
    return Documents.of_lengths(
        rows, block_size=block_size, place=lambda array: on_device(torch.from_numpy(array), device)
    )
