"""What bench/step.py has everyone train: a model's shape, the conversations, the size of a step, the precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from model_config import PRESETS, ModelArchitectureConfig

DataName = Literal["gsm8k", "alpaca", "documents", "full rows"]
OURS, OURS_BF16, TRL = "ours", "ours, bf16", "TRL"
PADDED, GROUPED, PLAIN = "padded loop", "padded loop, like lengths together", "nanoGPT-style loop"
PROVIDERS = (OURS, OURS_BF16, TRL, PADDED, GROUPED, PLAIN)


@dataclass(frozen=True, kw_only=True)
class Task:
    """The same work for everyone; how it is cut into micro-steps is an option of each provider."""

    name: str
    model: Mapping[str, Any]  # architecture fields of a Qwen3 model
    data: DataName
    row: int  # tokens of a packed row; ours may take shorter ones that hold every conversation
    rows_per_step: int  # of one optimizer update; the loops take as many conversations as that holds, or a few more
    dtype: Literal["float32", "bfloat16"]  # of computing; weights and optimizer states are always fp32
    providers: Sequence[str] = PROVIDERS
    learning_rate: float = 3e-4
    samples: int = 4096  # conversations that are cycled through
    time_share: float = 1.0  # of the minutes, against the other tasks

    @property
    def config(self) -> ModelArchitectureConfig:
        return ModelArchitectureConfig.from_dict(self.model)

    @property
    def tokens_per_step(self) -> int:
        return self.row * self.rows_per_step

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "providers": list(self.providers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Task:
        return cls(**values)


def qwen3(layers: int, width: int, vocabulary: int, **fields: Any) -> dict[str, Any]:
    """The fields of a small Qwen3 model with a tied head."""
    return {
        **PRESETS["qwen3-0.6b"].to_dict(),
        "n_layer": layers,
        "n_embd": width,
        "vocab_size": vocabulary,
        "block_size": 4096,
        **fields,
    }


# Qwen3's own vocabulary makes the head nine tenths of the first model; in the second the blocks are what costs.
LARGE_VOCABULARY = qwen3(6, 160, 151_936, n_head=6, num_key_value_heads=2, head_dim=32, d_ff=480)
SMALL_VOCABULARY = qwen3(8, 448, 8_192, n_head=8, num_key_value_heads=4, head_dim=64, d_ff=1408)
TINY = qwen3(2, 32, 331, n_head=4, num_key_value_heads=2, head_dim=8, d_ff=64)

CPU_TASKS = (
    Task(
        name="V 151,936",
        model=LARGE_VOCABULARY,
        data="gsm8k",
        row=2048,
        rows_per_step=2,
        dtype="float32",
        time_share=1.5,  # its logits take everyone longer
    ),
    Task(name="V 8,192", model=SMALL_VOCABULARY, data="gsm8k", row=2048, rows_per_step=2, dtype="float32"),
)
BIG = PRESETS["qwen3-1.7b"].to_dict()
GPU_TASKS = (
    Task(
        name="1.7B, packed documents, share 0.3",
        model=BIG,
        data="documents",
        row=4096,
        rows_per_step=8,
        dtype="bfloat16",
        providers=(OURS, TRL, PLAIN),
        learning_rate=2e-5,
        samples=1024,
        time_share=2.0,  # all start, and what is compiled is compiled here
    ),
    Task(
        name="1.7B, causal 4096, share 1",
        model=BIG,
        data="full rows",
        row=4096,
        rows_per_step=8,
        dtype="bfloat16",
        providers=(OURS, TRL, PLAIN),
        learning_rate=2e-5,
        samples=256,
    ),
    Task(
        name="1.7B, Alpaca lengths",
        model=BIG,
        data="alpaca",
        row=4096,
        rows_per_step=4,
        dtype="bfloat16",
        providers=(OURS, PADDED, GROUPED),
        learning_rate=2e-5,
        samples=2048,
    ),
)
TINY_TASKS = (
    Task(name="tiny", model=TINY, data="gsm8k", row=1024, rows_per_step=2, dtype="float32", samples=64),
    Task(name="tiny, full rows", model=TINY, data="full rows", row=128, rows_per_step=2, dtype="float32", samples=16),
)
SETS = {"cpu": CPU_TASKS, "cuda": GPU_TASKS, "tiny": TINY_TASKS}
