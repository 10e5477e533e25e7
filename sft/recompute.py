"""What a block's backward pass computes again, so that less of the forward pass is kept.

No bit of a gradient changes on a CPU; on a GPU none as far as its kernels repeat themselves.

selective keeps what matrix products and attention gave, and repeats the cheap rest: norms, rotary positions, SiLU,
multiplications, casts. full keeps a block's input alone, and repeats everything up to the last result needed. Where
blocks are compiled the compiler repeats cheap operations anyway, if that saves memory: there none is close to
selective, whose promise is then kept by the compiler's own choice of what to save.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Result = TypeVar("Result")
Recomputing = Literal["none", "selective", "full"]
ActivationCheckpointing = Literal["none", "selective", "full", "auto"]  # auto = the least that fits, see sft/memory.py
LEAST_FIRST: tuple[Recomputing, ...] = ("none", "selective", "full")  # by the work that is done twice
EXPENSIVE = re.compile(r"(^|_)(add|b|badd|scaled_|grouped_)?b?mm$|linear|attention|attn")  # operators worth keeping


def run(
    compute: Callable[..., Result], x: Tensor, *others: Any, recomputing: Recomputing, draws: bool = True
) -> Result:
    """compute(x, *others), of which the backward pass repeats a part. `draws`: whether it draws random numbers."""
    if recomputing == "none":
        return compute(x, *others)
    options: dict[str, Any] = {}
    if recomputing == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_expensive)
    return checkpoint(compute, x, *others, use_reentrant=False, preserve_rng_state=draws, **options)


def keep_expensive(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save the results of matrix products and attention, by whatever library."""
    name = operator.name() if callable(operator.name) else operator.name  # a method of overloads alone
    word = name.split("::")[-1].split(".")[0]
    return CheckpointPolicy.MUST_SAVE if EXPENSIVE.search(word) else CheckpointPolicy.PREFER_RECOMPUTE
