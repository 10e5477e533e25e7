"""The loss of a batch: the head and the masked cross-entropy of its trained tokens, by a kernel that is chosen once."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sft.batches import Batch
from sft.errors import UserError
from sft.kernels import linear_cross_entropy, reference

LossKernel = Literal["auto", "triton", "torch", "reference"]
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
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

        hidden (B, T, D) after the final norm, head_weight (V, D). A batch without trained tokens gives zero and zero
        gradients. `grad_scale` is the upstream gradient to expect: with it the backward pass has nothing left to do.
        """
        return self.function(
            hidden.flatten(0, 1),
            head_weight,
            batch.targets,
            batch.weights,
            rows=batch.trained,
            grad_scale=grad_scale,
        ).loss_sum


def choose_loss(choice: LossKernel, *, device: torch.device, dtype: torch.dtype) -> Loss:
    """The kernel for hidden states of this dtype; UserError where the one asked for cannot compute them here.

    Tries Triton on a few numbers, so that what cannot be compiled is known before the first step.
    """
    if choice in ("torch", "reference"):
        return Loss(choice, f"loss_kernel={choice}")
    if choice == "auto" and device.type != "cuda":
        return Loss("torch", "this is the CPU")
    problem = triton_problem(device, dtype)
    if problem is None:
        return Loss("triton", "it compiles here" if choice == "auto" else "loss_kernel=triton")
    if choice == "triton":
        raise UserError(f"loss_kernel=triton: {problem}; use loss_kernel=auto, or torch")
    return Loss("torch", problem)


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
        return _trial(device, dtype)
    except Exception as error:  # whatever a compiler, a driver or a missing library raises
        return f"Triton does not work here ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"


def _trial(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the loss and the gradients of a few numbers; compiles the kernels on the way."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    hidden, head = draw(8, 16), draw(100, 16)
    labels = torch.tensor([3, -100, 99, 0, 50, -100, 7, 3], device=device)

    def numbers(kernel: Any) -> list[Tensor]:
        loss = Loss(kernel, "").function(hidden, head, labels, grad_scale=0.5).loss_sum
        return [loss, *torch.autograd.grad(0.5 * loss, (hidden, head))]

    for ours, exact in zip(numbers("triton"), numbers("reference"), strict=True):
        if not torch.allclose(ours.float(), exact.float(), rtol=0.05, atol=0.05):
            return "Triton gives wrong numbers here"
    return None
