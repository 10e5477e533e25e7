"""A prepared folder made by hand, with origins, weights and contents that no short raw file would give."""

from pathlib import Path
from typing import Any

import numpy as np

from sft.prepared_writer import PreparedWriter
from sft.samples import NOT_TRAINED
from sft.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_tokenizer import save_tiny_tokenizer

HOSTILE = '</script><img src=x onerror="alert(1)"><!-- \x1b[31mred\x1b]0;title\x07\u2028\u202eevil\u009b2J<|im_end|>'
SOURCES = ["raw/cats.jsonl", "raw/more/cats.jsonl", "raw/<b>dogs</b>.jsonl"]


class MadeData:
    """A prepared folder in the making: samples with origins and weights, whoever may write such ones."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        self.tokenizer = load_tokenizer(save_tiny_tokenizer(folder))
        self.samples: dict[str, list[tuple[list[int], list[int]]]] = {"train": [], "val": []}
        self.origins: dict[str, list[tuple[int, int, int]]] = {"train": [], "val": []}
        self.weights: dict[str, list[float]] = {"train": [], "val": []}

    def add(
        self,
        question: str,
        answer: str | bytes,
        *,
        split: str = "train",
        origin: tuple[int, int, int] = (0, 1, -1),
        weight: float = 1.0,
    ) -> None:
        ids = self.tokenizer
        answered = ids.encode(answer) if isinstance(answer, str) else bytes_as_ids(answer, ids)
        prompt = [ids.im_start, *ids.encode(f"user\n{question}"), ids.im_end, *ids.encode("\n")]
        prompt += [ids.im_start, *ids.encode("assistant\n")]
        trained, end = [*answered, ids.im_end], ids.encode("\n")
        labels = [NOT_TRAINED] * len(prompt) + trained + [NOT_TRAINED] * len(end)
        self.samples[split].append((prompt + trained + end, labels))
        self.origins[split].append(origin)
        self.weights[split].append(weight)

    def write(self, **changes: Any) -> Path:
        with PreparedWriter(self.folder) as writer:
            for split, samples in self.samples.items():
                for told in zip(samples, self.origins[split], self.weights[split], strict=True):
                    add_to(writer, split, *told)
            writer.close()
            writer.finish({**facts(self.tokenizer, self.samples), **changes})
        return self.folder


def add_to(
    writer: PreparedWriter, split: str, sample: tuple[list[int], list[int]], origin: tuple[int, int, int], weight: float
) -> None:
    ids, labels = (np.array(part, np.int32) for part in sample)
    trained = labels != NOT_TRAINED
    writer.add_samples(
        split,
        ids,
        labels,
        lengths=[len(ids)],
        targets=[weight * trained.sum()],
        origins=[origin],
        weights=None if weight == 1 else weight * trained.astype(np.float32),
    )


def bytes_as_ids(content: bytes, tokenizer: Tokenizer) -> list[int]:
    """A token for each byte, which may divide characters or be none."""
    id_of = {token: i for i, token in tokenizer.token_bytes.items()}
    return [id_of[bytes([byte])] for byte in content]


def facts(tokenizer: Tokenizer, samples: dict[str, list[tuple[list[int], list[int]]]]) -> dict[str, Any]:
    """What prepare_sft.py tells of such samples."""
    splits = {
        split: {
            "samples": len(told),
            "tokens": sum(len(ids) for ids, _ in told),
            "trained_tokens": sum(len(labels) - labels.count(NOT_TRAINED) for _, labels in told),
        }
        for split, told in samples.items()
    }
    tokens, trained = (sum(counts[name] for counts in splits.values()) for name in ("tokens", "trained_tokens"))
    count = len(samples["train"]) + len(samples["val"])
    return {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "tokenizer_files": list(tokenizer.files),
        "vocab_size": tokenizer.vocab_size,
        "im_start_id": tokenizer.im_start,
        "im_end_id": tokenizer.im_end,
        "pad_id": tokenizer.pad,
        "template": "chatml",
        "block_size": 1234,
        "settings": {"input": "raw", "block_size": 1234},
        "settings_origins": {"input": "command line", "block_size": "configs/mine.py:3"},
        "sources": [{"path": path, "sha256": "0", "bytes": 9, "weight": 0.5, "records": 40} for path in SOURCES],
        "ledger": {
            "records": {"read": count + 1, "bad": 1, "bad_bytes": 77},
            "conversations": {"read": count, "kept": count, "too_long": 0},
            "tokens": {
                "total": tokens,
                "trained": trained,
                "masked": {"user": tokens - trained, "tool": 0},
                "dropped": {"too_long": 0},
            },
            "splits": splits,
        },
        "noticed": {
            "spells_control": {"conversations": 1, "first": ["raw/cats.jsonl:37"]},
            "empty_turn": {"conversations": 0, "first": []},
        },
        "bad_records": ["raw/cats.jsonl:9: not valid JSON; \x1bmend it"],
        "audit": {"passed": True, "conversations": count, "trained_tokens": trained},
    }


def write_prepared(folder: Path, splits: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Write (input ids, unshifted labels) per split as a prepared folder that has no ledger and no audit; its meta."""
    with PreparedWriter(folder) as writer:
        for split, samples in splits.items():
            for record, (input_ids, labels) in enumerate(samples, 1):
                trained = np.array(labels) != NOT_TRAINED
                writer.add_samples(
                    split,
                    np.array(input_ids, np.int32),
                    np.array(labels, np.int32),
                    lengths=[len(labels)],
                    targets=[np.count_nonzero(trained[1:])],
                    origins=[(0, record, -1)],
                )
        writer.close()
        return writer.finish(facts)
