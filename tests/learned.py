"""A run's folder with a model that has learned one dialogue by heart, for tests of what it then says."""

import shutil
from pathlib import Path

import torch

from sft.chatml import render
from sft.conversation import Conversation, Message
from sft.templates import JINJA_NAME, jinja_file
from sft.tokenizer import load_tokenizer
from tests.tiny import tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer

FIRST, SECOND_QUESTION, SECOND = "Grüße!", "go", "done"


def learned_run(folder: Path) -> Path:
    """The folder, checkpoint and tokenizer in it; `hi` is answered with FIRST, then SECOND_QUESTION with SECOND."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(save_tiny_tokenizer(folder))
    shutil.copyfile(jinja_file("chatml"), folder / JINJA_NAME)
    turns = [("user", "hi"), ("assistant", FIRST), ("user", SECOND_QUESTION), ("assistant", SECOND)]
    (sample,) = render(Conversation(tuple(Message(role, content) for role, content in turns)), tokenizer)
    ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
    model = tiny_model(vocab_size=tokenizer.vocab_size, block_size=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = torch.nn.functional.cross_entropy(model(ids)[0, :-1], labels[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    content = {"model": model.state_dict(), "model_args": model.config.to_dict()}
    torch.save({**content, "tokenizer_fingerprint": tokenizer.fingerprint}, folder / "ckpt.pt")
    return folder
