"""Small models and documents that several tests share."""

from __future__ import annotations

import numpy as np
import torch

from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from sft.batches import Document
from sft.samples import NOT_TRAINED
from sft.world import World

CPU_WORLD = World(rank=0, size=1, device=torch.device("cpu"))


def tiny_config(**changes: object) -> ModelArchitectureConfig:
    shape = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "num_key_value_heads": 2,
        "d_ff": 64,
        "vocab_size": 97,
        "block_size": 64,
        "normalization": "rmsnorm",
        "activation": "silu",
        "ffn_type": "swiglu",
        "position_encoding": "rope",
        "qk_norm": True,
        "bias": False,
        "weight_tying": True,
    }
    return ModelArchitectureConfig.from_dict({**shape, **changes})


def tiny_model(*, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> ConfigurableGPT:
    torch.manual_seed(seed)
    return ConfigurableGPT(tiny_config(**changes)).to(dtype)


def random_documents(
    lengths: list[int], *, seed: int = 0, trained_share: float = 0.5, vocab: int = 97, weighted: bool = False
) -> list[Document]:
    """Documents of random ids; about trained_share of their tokens are trained, with random weights if `weighted`."""
    random = np.random.default_rng(seed)
    documents = []
    for length in lengths:
        ids = random.integers(0, vocab, length)
        documents.append(Document(ids, np.where(random.random(length) < trained_share, ids, NOT_TRAINED)))
    if weighted:
        return [with_weights(document, random.uniform(0.1, 3, len(document.labels))) for document in documents]
    return documents


def with_weights(document: Document, weights: np.ndarray) -> Document:
    """The document with these weights where it is trained, as the prepared arrays have them."""
    return document._replace(weights=np.where(document.labels == NOT_TRAINED, 0, weights).astype(np.float32))


def target_weight(documents: list[Document]) -> float:
    """The sum of the weights of the tokens that are a target: a document's first token is none."""
    trained = [document.labels[1:] != NOT_TRAINED for document in documents]
    weights = [1.0 if document.weights is None else np.float64(document.weights[1:]) for document in documents]
    return float(sum((weight * where).sum() for weight, where in zip(weights, trained, strict=True)))
