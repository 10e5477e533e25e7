"""Transformers and TRL's SFTTrainer in bench/step.py, as their documentation has it for speed.

Packing with best fit (which is padding-free), or padding-free batches of conversations; labels are given, so that the
trained tokens are the same for everyone; fused AdamW, no checkpointing of activations, logs far apart. TRL computes the
loss by its own fused head. Liger's kernels take the place of norms, rotary positions and SwiGLU where they run.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor

from bench.step_inputs import document, fill_weights
from bench.step_worker import Gate, Step, Work
from sft.samples import NOT_TRAINED

NEVER = 10**9


def load(provider: str) -> None:
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer

    assert SFTConfig
    assert SFTTrainer
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def qwen3_config(work: Work) -> Any:
    """Our architecture as Transformers describes it."""
    from transformers import Qwen3Config

    config = work.task.config
    return Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.ffn_width,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.key_heads,
        head_dim=config.head_size,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.block_size,
        tie_word_embeddings=config.weight_tying,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        use_cache=False,
    )


def make_model(work: Work) -> Any:
    """Qwen3ForCausalLM in fp32 with everyone's initial weights."""
    from transformers import AutoModelForCausalLM

    with work.device:
        attention = work.option.get("attention", "sdpa")
        model = AutoModelForCausalLM.from_config(qwen3_config(work), attn_implementation=attention, dtype=torch.float32)
    fill_weights(dict(model.named_parameters()))
    return model.train()


def make_tokenizer(vocabulary: int) -> Any:
    """As much of a tokenizer as the trainer asks for: the data set is tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<eos>")), pad_token="<pad>", eos_token="<eos>"
    )


def make_dataset(work: Work) -> Any:
    from datasets import Dataset

    order = range(len(work.samples)) if work.plan is None else [number for step in work.plan for number in step]
    documents = [document(work.samples, number) for number in order]
    return Dataset.from_dict(
        {"input_ids": [ids.tolist() for ids, _ in documents], "labels": [labels.tolist() for _, labels in documents]}
    )


def settings_of(work: Work) -> dict[str, Any]:
    """SFTConfig's arguments for the option."""
    packing = work.plan is None and work.option["packing"]
    row = work.option.get("row", work.task.row)
    if work.plan is not None:
        batch, per_step = len(work.plan[0]), len(work.plan[0])
    else:
        per_step = work.task.tokens_per_step // row if packing else work.documents_per_step
        batch = min(work.option["batch"], per_step)
    return {
        "packing": packing,
        "packing_strategy": "bfd",
        "padding_free": True,
        "max_length": row if packing else None,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": per_step // batch,
        "train_sampling_strategy": "random" if work.plan is None else "sequential",
        "use_liger_kernel": bool(work.option.get("liger")),
        "dataloader_num_workers": work.option.get("workers", 0),
        "dataloader_persistent_workers": bool(work.option.get("workers")),
        "bf16": work.autocast_dtype is not None,
        "use_cpu": work.device.type == "cpu",
        "dataloader_pin_memory": work.device.type == "cuda",
        "gradient_checkpointing": False,
        "learning_rate": work.task.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "max_steps": NEVER,
        "logging_steps": NEVER,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def train(work: Work, gate: Gate) -> None:
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    counts: list[Any] = [
        0,
        0,
        0.0,
    ]  # tokens, trained tokens and loss of the step; tensors are read at the end of a turn

    class Counted(SFTTrainer):
        """SFTTrainer with its steps counted."""

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, items = super().get_batch_samples(*args, **kwargs)
            counts[0] = sum(batch["input_ids"].numel() for batch in batches)  # padding-free
            counts[1] = sum((batch["labels"][:, 1:] != NOT_TRAINED).sum() for batch in batches)
            return batches, items

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            counts[2] = counts[2] + loss.detach()
            return loss

    class AtTheGate(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gate.training_starts()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step = Step(counts[2], counts[0], counts[1])
            counts[2] = 0.0
            if not gate(step):
                control.should_training_stop = True

    with tempfile.TemporaryDirectory() as folder:
        trainer = Counted(
            model=make_model(work),
            args=SFTConfig(output_dir=folder, **settings_of(work)),
            train_dataset=make_dataset(work),
            processing_class=make_tokenizer(work.task.config.vocab_size),
            callbacks=[AtTheGate()],
        )
        trainer.train()
