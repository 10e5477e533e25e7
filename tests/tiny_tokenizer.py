"""A byte-level tokenizer of a few hundred tokens, built like Qwen3's: for tests that need no published one."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sft.tokenizer import QWEN3_PATTERN

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
OTHER = ["<think>", "</think>"]
TEXTS = ["system user assistant", "What is the capital of France? It is Paris.", "the cat and the hat sat on the mat"]


def tiny_library_tokenizer(*, nfc: bool = True, control: list[str] = CONTROL, texts: list[str] = TEXTS) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN3_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=control, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in OTHER])
    return tokenizer


def save_tiny_tokenizer(folder: Path, **choices) -> Path:
    path = folder / "tokenizer.json"
    tiny_library_tokenizer(**choices).save(str(path))
    return path
