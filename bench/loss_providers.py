"""Everyone who computes a masked cross-entropy, with the grid of options in which the fastest is looked for.

Each takes what its users give it: other projects get all N rows with -100 where nothing is trained, ours gets the index
of the trained rows, which travels with a batch. Each returns the mean over the trained tokens; ours, which sums, is
divided by their number, which the host knows. A grid's row with FP32_LOGITS is left out where logits are fp32 anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.loss_inputs import Draw

HEAD, LOGITS, EVALUATION = "head", "logits", "evaluation"
WORKLOADS = {
    HEAD: "hidden states and head to loss, gradients of both",
    LOGITS: "logits to loss and their gradient",
    EVALUATION: "hidden states and head to loss alone",
}

OURS, EAGER, EAGER_FP32, COMPILED = "ours", "eager", "eager, fp32 logits", "torch.compile"
OURS_TUNED = "ours, tuned"  # the quickest of the kernel's configurations: whether the default is the right one
TORCH_LINEAR, LIGER, CCE, TRL, QUACK = "F.linear_cross_entropy", "Liger-Kernel", "cut-cross-entropy", "TRL", "QuACK"
FP32_LOGITS = "fp32_logits"

Loss = Callable[..., Tensor]  # (hidden, head, draw, **options) or (logits, draw, **options) -> the mean loss


class Provider(NamedTuple):
    name: str
    workloads: Sequence[str]
    load: Callable[[], Loss]  # ImportError: the provider is missing
    grid: Sequence[Mapping[str, Any]] = ({},)
    gpu_grid: Sequence[Mapping[str, Any]] = ()  # more rows, for GPUs
    cuda_only: bool = False


def ours_head() -> Loss:
    from sft.kernels.linear_cross_entropy import masked_linear_cross_entropy

    def loss(hidden: Tensor, head: Tensor, draw: Draw) -> Tensor:
        scale = 1 / draw.trained
        return masked_linear_cross_entropy(
            hidden, head, draw.row_labels, rows=draw.rows, grad_scale=scale
        ).loss_sum.mul(scale)

    return loss


def ours_logits() -> Loss:
    from sft.kernels.masked_cross_entropy import masked_cross_entropy

    def loss(logits: Tensor, draw: Draw, **options: Any) -> Tensor:
        scale = 1 / draw.trained
        return masked_cross_entropy(logits, draw.labels, overwrite=True, grad_scale=scale, **options).loss_sum.mul(
            scale
        )

    return loss


def eager_logits(logits: Tensor, draw: Draw, *, fp32_logits: bool) -> Tensor:
    return F.cross_entropy(logits.float() if fp32_logits else logits, draw.labels)


def eager_head(hidden: Tensor, head: Tensor, draw: Draw, *, fp32_logits: bool) -> Tensor:
    return eager_logits(F.linear(hidden, head), draw, fp32_logits=fp32_logits)


def compiled(graph: Loss) -> Callable[[], Loss]:
    """A loader of a loss that is compiled once for each option and shape."""

    def load() -> Loss:
        made: dict[tuple[bool, bool], Loss] = {}

        def loss(*tensors: Any, fp32_logits: bool, auto_chunker: bool = False) -> Tensor:
            *inputs, draw = tensors
            if (fp32_logits, auto_chunker) not in made:
                options = {"auto_chunker.enable": True} if auto_chunker else None

                def labelled(*inputs_and_labels: Tensor) -> Tensor:
                    *given, labels = inputs_and_labels
                    return graph(*given, SimpleNamespace(labels=labels), fp32_logits=fp32_logits)

                made[fp32_logits, auto_chunker] = torch.compile(labelled, dynamic=False, options=options)
            return made[fp32_logits, auto_chunker](*inputs, draw.labels)

        return loss

    return load


def torch_linear() -> Loss:
    linear_cross_entropy = getattr(F, "linear_cross_entropy", None)
    if linear_cross_entropy is None:
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")

    def loss(hidden: Tensor, head: Tensor, draw: Draw, *, chunked: bool = True, **options: Any) -> Tensor:
        given = torch.nn.LinearCrossEntropyOptions(**options) if chunked else None
        return linear_cross_entropy(hidden, head, draw.labels, options=given)

    return loss


def liger_logits() -> Loss:
    from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss

    module = LigerCrossEntropyLoss(reduction="mean")
    return lambda logits, draw: module(logits, draw.labels)  # its gradient takes the place of the logits


def liger_head() -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(hidden: Tensor, head: Tensor, draw: Draw, *, fp32_sum: bool, chunk_mem_const: int) -> Tensor:
        return liger_fused_linear_cross_entropy(
            hidden,
            head,
            draw.labels,
            accum_dtype=torch.float32 if fp32_sum else None,
            chunk_mem_const=chunk_mem_const,
        )

    return loss


def cce_head() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, head, draw, **options: linear_cross_entropy(hidden, head, draw.labels, **options)


class HeadAlone:
    """As much of a model as TRL needs to give it its fused head: a backbone that returns what it is given."""

    def __init__(self) -> None:
        text = SimpleNamespace()
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.head: Tensor | None = None

    def base_model(self, hidden: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(weight=self.head, bias=None)

    def forward(self) -> None:
        raise NotImplementedError("TRL replaces it")


def trl_head() -> Loss:
    """The loss of SFTTrainer: model(..., fused_lm_head=True) after add_fused_lm_head(model)."""
    from trl.trainer.utils import add_fused_lm_head

    models: dict[tuple[str, ...], Any] = {}

    def loss(hidden: Tensor, head: Tensor, draw: Draw, *, outputs: tuple[str, ...]) -> Tensor:
        if outputs not in models:
            models[outputs] = HeadAlone()
            add_fused_lm_head(models[outputs], outputs=outputs)
        models[outputs].head = head
        return models[outputs].forward(hidden[None], shift_labels=draw.labels[None], fused_lm_head=True).loss

    return loss


def quack_logits() -> Loss:
    from quack.cross_entropy import cross_entropy

    return lambda logits, draw, **options: cross_entropy(logits, draw.labels, **options)


def quack_head() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, head, draw, **options: chunked_linear_cross_entropy(hidden, head, draw.labels, **options)


BOTH_DTYPES = ({FP32_LOGITS: False}, {FP32_LOGITS: True})
PROVIDERS = (
    Provider(OURS, (HEAD, EVALUATION), ours_head),
    Provider(OURS, (LOGITS,), ours_logits, cuda_only=True),
    Provider(OURS_TUNED, (LOGITS,), ours_logits, [{"configuration": i} for i in range(10)], cuda_only=True),
    Provider(EAGER, (HEAD, EVALUATION), lambda: eager_head, BOTH_DTYPES[:1]),
    Provider(EAGER, (LOGITS,), lambda: eager_logits, BOTH_DTYPES[:1]),
    Provider(EAGER_FP32, (HEAD, EVALUATION), lambda: eager_head, BOTH_DTYPES[1:]),
    Provider(EAGER_FP32, (LOGITS,), lambda: eager_logits, BOTH_DTYPES[1:]),
    Provider(COMPILED, (HEAD,), compiled(eager_head), BOTH_DTYPES, ({FP32_LOGITS: False, "auto_chunker": True},)),
    Provider(COMPILED, (EVALUATION,), compiled(eager_head), BOTH_DTYPES),
    Provider(COMPILED, (LOGITS,), compiled(eager_logits), BOTH_DTYPES),
    Provider(
        TORCH_LINEAR,
        (HEAD, EVALUATION),
        torch_linear,
        ({"chunked": False}, {"batch_chunk_size": 256}, {"batch_chunk_size": 4096}),
        # the rules of thumb make chunks of N D / V rows: one or two at a CPU's sizes, ten times slower than no chunks
        gpu_grid=({}, {"chunking_method": "aspect_ratio"}, {"batch_chunk_size": 4096, "acc_policy": "balanced"}),
    ),
    Provider(LIGER, (LOGITS,), liger_logits, cuda_only=True),
    Provider(
        LIGER,
        (HEAD, EVALUATION),
        liger_head,
        (
            {"fp32_sum": False, "chunk_mem_const": 1},
            {"fp32_sum": True, "chunk_mem_const": 1},
            {"fp32_sum": False, "chunk_mem_const": 8},
            {"fp32_sum": True, "chunk_mem_const": 8},
        ),
        cuda_only=True,
    ),
    Provider(
        CCE,
        (HEAD, EVALUATION),
        cce_head,
        ({"filter_eps": "high"}, {"filter_eps": None}),
        cuda_only=True,
    ),
    Provider(
        TRL,
        (HEAD, EVALUATION),
        trl_head,
        ({"outputs": ("log_probs", "entropy", "is_top1")}, {"outputs": ("log_probs",)}),
    ),
    Provider(QUACK, (LOGITS,), quack_logits, ({"inplace_backward": False}, {"inplace_backward": True}), cuda_only=True),
    Provider(
        QUACK,
        (HEAD, EVALUATION),
        quack_head,
        (
            {"chunk_size": 4096},
            {"chunk_size": 8192},
            {"chunk_size": 4096, "use_scaled_exp": False, "tuned": False},
        ),
        cuda_only=True,
    ),
)


def options_of(provider: Provider, like: Tensor) -> list[dict[str, Any]]:
    """The rows of the grid for the device of a tensor that differ from each other for its dtype."""
    rows = [*provider.grid, *(provider.gpu_grid if like.is_cuda else ())]
    return [dict(row) for row in rows if not (like.dtype == torch.float32 and row.get(FP32_LOGITS))]


def providers_of(workload: str, like: Tensor) -> list[Provider]:
    """Who takes part, those that need a GPU among them: they are listed with that reason where there is none."""
    return [row for row in PROVIDERS if workload in row.workloads and options_of(row, like)]
