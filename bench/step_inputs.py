"""The conversations and the initial weights of bench/step.py: the same ones for everyone.

Where GSM8K, Alpaca's demonstration set and Qwen3's tokenizer are at hand, prepare_sft.py renders them, and ids are
real; a smaller vocabulary takes ids modulo its size, which leaves lengths and trained tokens as they are. Elsewhere
lengths are drawn from log-normal distributions fitted to those two, and ids log-uniformly from the vocabulary.

Weights are drawn tensor by tensor, under Hugging Face's names, each from a generator of its own: whoever fills a model
of the same shape on the same kind of device has the same weights, and no file of gigabytes is passed around.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.step_tasks import DataName, Task
from sft.arrays import Samples, open_prepared
from sft.samples import NOT_TRAINED

SPREAD = 0.02  # of the initial weights
FILES = {"gsm8k": "data/gsm8k/train.jsonl", "alpaca": "data/llamafactory/alpaca_en_demo.json"}
TOKENIZER = "tokenizer/qwen3"


class Lengths(NamedTuple):
    """A log-normal distribution of lengths, and the share of the tokens that is trained."""

    log_mean: float
    log_spread: float
    shortest: int
    longest: int
    share: float


# The first two as measured under Qwen3's tokenizer (191 and 174 tokens on average), the third with 600 on average.
DISTRIBUTIONS: Mapping[str, Lengths] = {
    "gsm8k": Lengths(5.196, 0.339, 74, 546, 0.641),
    "alpaca": Lengths(4.831, 0.849, 24, 661, 0.842),
    "documents": Lengths(6.29, 0.46, 64, 4096, 0.3),
}


def make_samples(task: Task, shared: Path | None) -> tuple[Samples, str]:
    """The conversations of a task, and what they are in words."""
    limit = task.row
    if shared is not None and task.data in FILES and (shared / FILES[task.data]).is_file():
        samples = rendered(shared / FILES[task.data], shared / TOKENIZER, limit, task.samples)
        folded = np.asarray(samples.input_ids) % task.config.vocab_size
        labels = np.where(np.asarray(samples.labels) == NOT_TRAINED, NOT_TRAINED, folded).astype(np.int32)
        words = f"{task.data}, rendered by prepare_sft.py"
        words += "" if task.config.vocab_size > samples.input_ids.max() else f", ids modulo {task.config.vocab_size:,}"
        return samples_of(folded.astype(np.int32), labels, np.asarray(samples.offsets)), words
    return drawn(task.data, task.samples, limit, task.config.vocab_size), f"{task.data}, drawn lengths and ids"


def rendered(raw: Path, tokenizer: Path, block_size: int, count: int) -> Samples:
    """The first conversations of a raw file, prepared as a user would; block_size drops the longer ones."""
    import prepare_sft

    with tempfile.TemporaryDirectory() as folder:
        argv = [f"--input={raw}", f"--tokenizer={tokenizer}", f"--out_dir={folder}", f"--block_size={block_size}"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepare_sft.main([*argv, "--val_fraction=0"])
        whole = open_prepared(Path(folder)).splits["train"]
        offsets = np.array(whole.offsets[: count + 1])
        ids, labels = (np.array(part[: offsets[-1]]) for part in (whole.input_ids, whole.labels))
    return samples_of(ids, labels, offsets)


def drawn(data: DataName, count: int, longest: int, vocabulary: int) -> Samples:
    """Conversations of drawn lengths: a prompt, then an answer to the end; full rows are trained from end to end."""
    random = np.random.default_rng(0)
    if data == "full rows":
        lengths, share = np.full(count, longest), 1.0
    else:
        fit = DISTRIBUTIONS[data]
        lengths = random.lognormal(fit.log_mean, fit.log_spread, count)
        lengths, share = np.clip(lengths, fit.shortest, min(fit.longest, longest)).astype(np.int64), fit.share
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.minimum(vocabulary ** random.random(offsets[-1]), vocabulary - 1).astype(np.int32)
    labels = ids.copy()
    for start, length in zip(offsets[:-1], lengths, strict=True):
        labels[start : start + length - max(1, round(share * length))] = NOT_TRAINED
    return samples_of(ids, labels, offsets)


def samples_of(ids: np.ndarray, labels: np.ndarray, offsets: np.ndarray) -> Samples:
    counted = labels != NOT_TRAINED
    counted[offsets[:-1]] = False  # a first token is nobody's target
    targets = np.add.reduceat(counted.astype(np.float64), offsets[:-1])
    origins = np.zeros((len(targets), 3), np.int64)
    return Samples(ids, labels, offsets, targets, origins, None)


def save_samples(path: Path, samples: Samples) -> None:
    np.savez(path, ids=samples.input_ids, labels=samples.labels, offsets=samples.offsets)


def load_samples(path: Path) -> Samples:
    with np.load(path) as arrays:
        return samples_of(arrays["ids"], arrays["labels"], arrays["offsets"])


def document(samples: Samples, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids and the unshifted labels of one conversation."""
    span = slice(samples.offsets[number], samples.offsets[number + 1])
    return samples.input_ids[span], samples.labels[span]


def fill_weights(tensors: Mapping[str, object]) -> None:
    """The initial weights, written into tensors under their Hugging Face names."""
    import torch

    with torch.no_grad():
        for name, tensor in tensors.items():
            assert isinstance(tensor, torch.Tensor)
            if "norm" in name:
                tensor.fill_(1.0)
                continue
            generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
            tensor.copy_(torch.randn(tensor.shape, generator=generator, device=tensor.device) * SPREAD)
