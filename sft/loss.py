"""The loss of a batch: the head and the masked cross-entropy of its trained tokens, by a kernel that is chosen once."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sft.batches import Batch
from sft.errors import EXIT_FAILED, UserError
from sft.kernels import linear_cross_entropy, products, reference
from sft.world import World

LossKernel = Literal["auto", "triton", "torch", "reference"]
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRIAL_VOCABULARIES = (100, 3 * 2**14 + 16)  # the second in several steps of the kernel's loop
DESCRIPTIONS = {
    "triton": "fused head, cross-entropy in Triton",
    "torch": "fused head, cross-entropy in PyTorch",
    "reference": "plain logits of all trained tokens, in PyTorch (the definition)",
}


@dataclass(frozen=True)
class Loss:
    """A kernel, and why it is the one."""

    kernel: Literal["triton", "torch", "reference"]
    reason: str

    def __str__(self) -> str:
        return f"{DESCRIPTIONS[self.kernel]}: {self.reason}"

    @property
    def function(self) -> Callable[..., reference.CrossEntropy]:
        if self.kernel == "reference":
            return reference.masked_linear_cross_entropy
        return functools.partial(linear_cross_entropy.masked_linear_cross_entropy, triton=self.kernel == "triton")

    def sum(self, hidden: Tensor, head_weight: Tensor, batch: Batch, *, grad_scale: float = 1.0) -> Tensor:
        """The weighted sum of the token losses of a batch, a scalar in fp32 or wider; to be divided once, by the step.

        hidden (n, D) after the final norm, of the places batch.trained; head_weight (V, D). A batch without trained
        tokens gives zero and zero gradients. `grad_scale` is the upstream gradient to expect: with it the backward
        pass has nothing left to do.
        """
        return self.function(hidden, head_weight, batch.targets, batch.weights, grad_scale=grad_scale).loss_sum


def choose_loss(choice: LossKernel, *, device: torch.device, dtype: torch.dtype, world: World | None = None) -> Loss:
    """The kernel for hidden states of this dtype; UserError where the one asked for cannot compute them here.

    Tries what it chooses on a few numbers, so that what cannot be compiled is known before the first step. All ranks of
    `world` must call it, and get the same; None: this process alone.
    """
    if choice == "reference":
        return Loss(choice, "loss_kernel=reference")
    if choice == "auto" and device.type != "cuda":
        return Loss("torch", "this is the CPU")
    world = world or World(rank=0, size=1, device=device)
    problem, slower = world.together(lambda: _examine(choice, device, dtype))
    problem = _of_any_rank(problem, world)
    if problem is not None and choice == "triton":
        raise UserError(f"loss_kernel=triton: {problem}; use loss_kernel=auto, or torch")
    works = "it compiles here" if choice == "auto" else f"loss_kernel={choice}"
    reason = "; ".join(filter(None, (problem or works, slower)))
    return Loss("torch" if choice == "torch" or problem is not None else "triton", reason)


def _examine(choice: LossKernel, device: torch.device, dtype: torch.dtype) -> tuple[str | None, str | None]:
    """Why Triton cannot be used, if it is wanted, and what is slower than elsewhere; UserError if memory is lacking."""
    try:
        problem = None if choice == "torch" else triton_problem(device, dtype)
        return problem, products.slower_addition(device, dtype)
    except Exception as error:
        if not products.is_out_of_memory(error):
            raise
        raise UserError(
            f"{device} is out of memory before the first step; is it used by another process?", exit_status=EXIT_FAILED
        ) from error


def _of_any_rank(problem: str | None, world: World) -> str | None:
    """The problem of the first rank that has one, on all ranks."""

    def tell() -> None:
        if problem is not None:
            raise UserError(problem if world.size == 1 else f"rank {world.rank}: {problem}")

    try:
        world.together(tell)
    except UserError as error:
        return str(error).partition("\n")[0]
    return None


def triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot compute the loss here; None if they can."""
    name = str(dtype).removeprefix("torch.")
    if dtype not in TRITON_DTYPES:
        return f"Triton has no kernel for {name}"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton needs a GPU, and this is the CPU"
    if device.type != "cuda" and dtype == torch.bfloat16:
        return "Triton's interpreter does not round to bfloat16"
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            return _trial(device, dtype)
    except Exception as error:  # whatever a compiler, a driver or a missing library raises
        if products.is_out_of_memory(error):
            raise
        return f"Triton does not work here ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"


def _trial(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the loss and the gradients of a few numbers; compiles each kernel that training may use.

    The compiler tells apart whether V is a multiple of 16, whether tokens have weights, and training from evaluation.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    def numbers(kernel: Any, *tensors: Any) -> list[Tensor]:
        function = Loss(kernel, "").function
        with torch.no_grad():
            evaluated = function(*tensors).loss_sum
        trained = function(*tensors, grad_scale=0.5).loss_sum
        return [evaluated, trained, *torch.autograd.grad(0.5 * trained, tensors[:2])]

    labels = torch.tensor([3, -100, 99, 0, 50, -100, 7, 3], device=device)
    for V, weights in itertools.product(TRIAL_VOCABULARIES, (None, torch.arange(8, device=device) / 4)):
        tensors = draw(8, 16), draw(V, 16), labels, weights
        for ours, exact in zip(numbers("triton", *tensors), numbers("reference", *tensors), strict=True):
            if not torch.allclose(ours.float(), exact.float(), rtol=0.05, atol=0.05):
                return "Triton gives wrong numbers here"
    return None
