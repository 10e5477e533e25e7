"""Fine-tune a model on prepared conversations: one process or many, one program.

python train_sft.py configs/sft_demo.py --max_iters=20
torchrun --standalone --nproc_per_node=8 train_sft.py configs/sft_qwen3_1.8b.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from model_builder import ConfigurableGPT, load_pretrained
from model_config import PRESETS, ModelArchitectureConfig, architecture_problems, forward_flops, parameter_count
from sft import dry_run, elsewhere, memory, out_of_memory, startup
from sft.announcement import Plan, announce
from sft.arrays import PreparedData
from sft.attention_choice import AttentionChoice, Heads, choose_attention
from sft.batches import TrainLoader
from sft.config import Resolved, fingerprint, load_settings, to_dict
from sft.errors import UserError, run_program
from sft.evaluation import Validation
from sft.journal import Journal
from sft.loss import Loss, LossKernel, choose_loss
from sft.optim import Schedule, learning_rate_at, make_optimizer
from sft.packing import PACKING_VERSION, RowStream
from sft.progress import Totals
from sft.recompute import ActivationCheckpointing
from sft.run import Run
from sft.run_log import RunLog
from sft.tracing import StepTrace
from sft.world import DeviceChoice, GradientCompression, World, join_world

# names of numbers, their range in words, and the range
RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("block_size batch_size gradient_accumulation_steps rows_per_step", "above 0", lambda value: value > 0),
    ("max_iters max_epochs learning_rate lr_decay_iters grad_clip", "above 0", lambda value: value > 0),
    ("eval_interval eval_rows log_interval save_interval keep_checkpoints", "above 0", lambda value: value > 0),
    ("seed min_lr warmup_iters weight_decay log_save_seconds", "0 or more", lambda value: value >= 0),
    ("dropout beta1 beta2", "at least 0 and below 1", lambda value: 0 <= value < 1),
    ("ddp_bucket_mb", "above 0", lambda value: value > 0),
    ("seed", "below 2**63", lambda value: value < 2**63),
    ("block_size max_epochs", "at most ten million", lambda value: value <= 10**7),
)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Every knob of training. Rows are packed rows of block_size tokens; a step is one optimizer update."""

    sft_data_dir: str  # a folder that prepare_sft.py wrote
    out_dir: str  # where checkpoints and run_*.json go
    checkpoint_path: str | None = None  # the model to start from: a ckpt_*.pt file or a Hugging Face folder
    model: str | dict[str, Any] | None = None  # or from scratch: a preset's name or a dict of architecture fields
    run_name: str | None = None  # a name for the run log; None = the name of out_dir
    seed: int = 1337  # decides the order of the rows, dropout, and a new model's weights

    block_size: int = 2048  # tokens in a row
    batch_size: int = 4  # rows per micro-step and GPU
    gradient_accumulation_steps: int | None = None  # micro-steps per step and GPU; None = 1, or as rows_per_step needs
    rows_per_step: int | None = None  # rows per step over all GPUs, instead of gradient_accumulation_steps

    max_iters: int | None = None  # length of the run in steps
    max_epochs: float | None = None  # or in passes over the packed rows: one of the two
    learning_rate: float = 2e-5  # peak learning rate, reached after warm-up
    min_lr: float = 2e-6  # learning rate at the end of the decay
    lr_schedule: Schedule = "cosine"  # shape of the decay: cosine, linear or constant
    warmup_iters: int = 100  # steps of linear warm-up
    lr_decay_iters: int | None = None  # step at which min_lr is reached; None = the length of the run

    weight_decay: float = 0.01  # on matrices and embeddings, not on norms and biases
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # AdamW's decay of the mean squared gradient
    grad_clip: float | None = 1.0  # largest global gradient norm; None = no clipping
    dropout: float = 0.0  # on embeddings, attention probabilities and residual branches

    eval_interval: int | None = 200  # steps between evaluations; None = never
    eval_rows: int | None = None  # validation rows to use; None = all
    log_interval: int = 10  # steps between log records
    log_save_seconds: float = 30.0  # at most this much of the run log is lost in a crash
    save_interval: int | None = 200  # steps between checkpoints; None = only at the end and at the best evaluation
    keep_checkpoints: int | None = 2  # numbered checkpoints to keep (the best one always stays); None = all
    resume: startup.ResumeChoice = "never"  # auto = go on from out_dir's newest checkpoint, if any

    device: DeviceChoice = "auto"  # auto = CUDA where there is a GPU
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"  # of computing; auto = bfloat16 on CUDA
    compile: bool | None = None  # torch.compile the blocks; None = on CUDA
    attention: AttentionChoice = "auto"  # within documents; auto = the fastest that works here; all are exact
    loss_kernel: LossKernel = "auto"  # of the head and its loss; auto = triton on CUDA, else torch; all are exact
    dry_run: bool = False  # tell what the run would come to, and end: nothing is written
    activation_checkpointing: ActivationCheckpointing = "none"  # selective = recompute cheap parts, full = whole blocks
    ddp_bucket_mb: int = 25  # MiB of gradients that ranks add up at a time, while the backward goes on
    gradient_compression: GradientCompression = "none"  # between ranks; bf16 = half of the bytes, and bf16's rounding
    profile: bool = False  # write a Chrome trace of three early steps, and their dearest operators, into out_dir

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """(setting, what is wrong with it) for every value that cannot be used."""
        if (self.checkpoint_path is None) == (self.model is None):
            yield "checkpoint_path", "set checkpoint_path or model: one of the two, the other none"
        if self.checkpoint_path is not None and not Path(self.checkpoint_path).exists():
            yield "checkpoint_path", f"checkpoint_path {self.checkpoint_path!r} does not exist"
        if self.model is not None:
            yield from (("model", problem) for problem in architecture_problems(self.model))
        if not self.out_dir:
            yield "out_dir", "out_dir must name a folder"
        if not Path(self.sft_data_dir).is_dir():
            yield "sft_data_dir", f"sft_data_dir {self.sft_data_dir!r} does not exist; write it with prepare_sft.py"
        if (self.max_iters is None) == (self.max_epochs is None):
            yield "max_iters", "set max_iters or max_epochs: one of the two, the other none"
        if self.rows_per_step is not None and self.gradient_accumulation_steps is not None:
            yield "rows_per_step", "rows_per_step already decides gradient_accumulation_steps; set one of the two"
        for names, words, holds in RANGES:
            for name in names.split():
                if (value := getattr(self, name)) is not None and not holds(value):
                    yield name, f"{name} must be {words}, not {value}"
        if self.min_lr > self.learning_rate:
            yield "min_lr", f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}"
        if self.lr_decay_iters is not None and self.lr_decay_iters < self.warmup_iters:
            yield "lr_decay_iters", f"lr_decay_iters {self.lr_decay_iters} ends before warmup_iters {self.warmup_iters}"

    def fixed(self) -> dict[str, Any]:
        """What a resumed run may not change: the order of the rows and the model hang on it."""
        return {"seed": self.seed, "block_size": self.block_size, "model": self.model}

    def micro_steps(self, world_size: int) -> int:
        """Micro-steps per step and rank. Raises UserError where rows_per_step does not divide evenly."""
        if self.rows_per_step is None:
            return self.gradient_accumulation_steps or 1
        share, left = divmod(self.rows_per_step, self.batch_size * world_size)
        if left:
            raise UserError(
                f"rows_per_step={self.rows_per_step} is no multiple of {self.batch_size} rows x {world_size} ranks; "
                "change rows_per_step or batch_size"
            )
        return share

    def steps(self, stream: RowStream, *, rows_per_step: int) -> int:
        """The length of the run in steps; max_epochs is rounded up, so that the last row is seen."""
        if self.max_iters is not None:
            return self.max_iters
        assert self.max_epochs is not None
        return math.ceil(stream.rows_in(self.max_epochs) / rows_per_step)

    def autocast_dtype(self, device: torch.device) -> torch.dtype | None:
        """bfloat16 where the blocks compute in it, beside fp32 weights; None = in the dtype of the weights."""
        chosen = "bfloat16" if self.dtype == "auto" and device.type == "cuda" else self.dtype
        return torch.bfloat16 if chosen == "bfloat16" else None

    def compiles(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.compile is None else self.compile


def main(argv: list[str]) -> None:
    resolved = load_settings(TrainSettings, argv, elsewhere=elsewhere.TRAIN)
    with join_world(resolved.settings.device) as world:
        world.agree("settings", fingerprint(resolved.settings))
        world.together(lambda: resolved.settings.micro_steps(world.size))
        with out_of_memory.told(world.device):
            train(resolved, world)


def train(resolved: Resolved[TrainSettings], world: World) -> None:
    """The whole run on one rank: data, model, optimizer, resume, loop, close."""
    settings, out_dir = resolved.settings, Path(resolved.settings.out_dir)
    folder, block_size, writes = settings.sft_data_dir, settings.block_size, not settings.dry_run
    data = world.together(lambda: startup.open_training_data(folder, block_size=block_size, proves=world.is_main))
    resume_path = world.on_main(lambda: startup.prepare_out_dir(out_dir, resume=settings.resume, writes=writes))
    saved = world.together(
        lambda: startup.read_saved_state(resume_path, data, fixed=settings.fixed()) if resume_path else None
    )
    model = world.together(lambda: build_model(settings, data, resume_path, world))
    model = model.to(world.device) if writes else model
    dtype = settings.autocast_dtype(world.device) or model.head_weight.dtype
    loss = choose_loss(settings.loss_kernel, device=world.device, dtype=dtype, world=world)
    world.on_main(lambda: startup.copy_tokenizer(data, out_dir, resumes=resume_path is not None, writes=writes))
    loader = build_loader(settings, data, world)
    heads = Heads(model.config.n_head, model.config.key_heads, model.config.head_size)
    attention = choose_attention(
        settings.attention, heads=heads, dtype=dtype, dropout=settings.dropout, loader=loader, world=world
    )
    model.set_attention(attention.back_end)
    work = memory.workload(model, loader, loss=loss, autocast_dtype=settings.autocast_dtype(world.device), world=world)
    model.activation_checkpointing, kept = memory.settle(settings.activation_checkpointing, work)
    steps = settings.steps(loader.stream, rows_per_step=loader.rows_per_step)
    if settings.dry_run:
        flops = partial(training_flops, model.config)
        return dry_run.rehearse(settings, work, loader, steps=steps, saved=saved, flops=flops)
    log = world.together(lambda: open_log(resolved) if world.is_main else None)
    run = build_run(resolved, data, model, loader, Journal(world, log, steps=steps), loss=loss)
    try:
        if saved is not None:
            run.restore(saved)
        announce(run, plan_of(settings, run, model.config, resume_path, steps=steps), attention, kept)
        loop(settings, run, steps=steps)
    except BaseException as error:
        if out_of_memory.lacked(error):
            run.close("failed: out of memory")
            raise out_of_memory.explained(error, world.device, work, loader, fixed=settings.rows_per_step) from error
        run.close("interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}: {error}")
        raise
    run.close("finished")


def plan_of(
    settings: TrainSettings, run: Run, config: ModelArchitectureConfig, resume_path: Path | None, *, steps: int
) -> Plan:
    source = resume_path or settings.checkpoint_path or "new, random weights"
    return Plan(
        model=f"{parameter_count(config):,} parameters, {source}",
        parameters=parameter_count(config),
        steps=steps,
        micro_steps=settings.micro_steps(run.world.size),
        batch_size=settings.batch_size,
        schedule=f"{settings.lr_schedule} learning rate after {settings.warmup_iters} steps of warm-up",
        compiled=settings.compiles(run.world.device),
        resumed=resume_path,
    )


def loop(settings: TrainSettings, run: Run, *, steps: int) -> None:
    """From the current step to the last: update, report, evaluate, save."""

    def due(interval: int | None) -> bool:
        return interval is not None and (run.iter_num % interval == 0 or run.iter_num == steps)

    run.loss_module.train()
    if run.iter_num == 0 and settings.eval_interval is not None:
        run.evaluate()
    if run.world.size > 1 or settings.compiles(run.world.device):
        run.warm_up(evaluates=settings.eval_interval is not None)
    run.start()
    while run.iter_num < steps:
        learning_rate = learning_rate_at(
            run.iter_num,
            schedule=settings.lr_schedule,
            peak=settings.learning_rate,
            floor=settings.min_lr,
            warmup=settings.warmup_iters,
            total=settings.lr_decay_iters or steps,
        )
        run.update(learning_rate=learning_rate, grad_clip=settings.grad_clip)
        if due(settings.log_interval):
            run.report()
        evaluates, saves = due(settings.eval_interval), due(settings.save_interval) or run.iter_num == steps
        if evaluates or saves:
            with run.progress.clock_stopped():
                is_best = evaluates and run.evaluate()
                if is_best or saves:
                    run.save(is_best=is_best)


def build_model(settings: TrainSettings, data: PreparedData, resume_path: Path | None, world: World) -> ConfigurableGPT:
    """The model on the CPU: from the run's own checkpoint, from checkpoint_path, or new; grown to the data's ids.

    In a dry run it is on the device meta: shapes without numbers.
    """
    place = "meta" if settings.dry_run else "cpu"
    source = resume_path or settings.checkpoint_path
    dtype = torch.float64 if settings.dtype == "float64" else torch.float32
    if source is not None:
        startup.refuse_other_tokenizer(Path(source), data)
        model = load_pretrained(source, place, dtype)
    else:
        torch.manual_seed(settings.seed)
        with torch.device(place):
            model = ConfigurableGPT(new_architecture(settings, data)).to(dtype)
    limit = model.config.block_size
    if model.config.position_encoding == "learned_absolute" and settings.block_size > limit:
        raise UserError(f"block_size {settings.block_size} is beyond the {limit} positions that the model has learned")
    if model.vocab_size < data.meta["vocab_size"]:
        model.grow_vocabulary(data.meta["vocab_size"], say=world.print)
    model.set_dropout(settings.dropout)
    if settings.compiles(world.device):
        model.compile_blocks()
    return model


def new_architecture(settings: TrainSettings, data: PreparedData) -> ModelArchitectureConfig:
    """The shape of a model from scratch: at least the data's vocabulary, and this run's block_size if it has none."""
    if isinstance(settings.model, str):
        fields = PRESETS[settings.model].to_dict()
    else:
        fields = {"vocab_size": 1, "block_size": settings.block_size, **(settings.model or {})}
    return ModelArchitectureConfig.from_dict(
        {**fields, "vocab_size": max(fields["vocab_size"], data.meta["vocab_size"])}
    )


def build_loader(settings: TrainSettings, data: PreparedData, world: World) -> TrainLoader:
    split, weights = data.splits["train"], data.source_weights
    stream = RowStream(
        split.lengths, block_size=settings.block_size, seed=settings.seed, sources=split.origins[:, 0], weights=weights
    )
    return TrainLoader(
        split,
        stream,
        batch_size=settings.batch_size,
        rows_per_step=settings.batch_size * settings.micro_steps(world.size) * world.size,
        rank=world.rank,
        world_size=world.size,
        pad_id=data.meta["pad_id"],
        seed=settings.seed,
        device=world.device,
    )


def training_flops(config: ModelArchitectureConfig, totals: Totals) -> int:
    """The backward pass has two matrix products for each of the forward's."""
    pairs, trained = totals.attended_pairs, totals.trained_tokens
    return 3 * forward_flops(config, tokens=totals.tokens, attended_pairs=pairs, trained_tokens=trained)


def open_log(resolved: Resolved[TrainSettings]) -> RunLog:
    settings = resolved.settings
    return RunLog(
        settings.out_dir,
        run_name=settings.run_name or Path(settings.out_dir).name,
        config=to_dict(settings),
        origin=resolved.origins,
        save_seconds=settings.log_save_seconds,
    )


def build_run(
    resolved: Resolved[TrainSettings],
    data: PreparedData,
    model: ConfigurableGPT,
    loader: TrainLoader,
    journal: Journal,
    *,
    loss: Loss,
) -> Run:
    settings, world = resolved.settings, journal.world
    out_dir, profiles = Path(settings.out_dir), settings.profile and world.is_main

    return Run(
        world=world,
        model=model,
        autocast_dtype=settings.autocast_dtype(world.device),
        loss=loss,
        optimizer=make_optimizer(
            model,
            learning_rate=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
        ),
        loader=loader,
        validation=Validation(
            data.splits["val"],
            block_size=settings.block_size,
            batch_size=settings.batch_size,
            pad_id=loader.pad_id,
            seed=settings.seed,
            limit=settings.eval_rows,
            one_shape=settings.compiles(world.device),
        ),
        journal=journal,
        training_flops=partial(training_flops, model.config),
        out_dir=out_dir,
        keep_checkpoints=settings.keep_checkpoints,
        constants={
            "model_args": model.config.to_dict(),
            "config": to_dict(settings),
            "config_origins": resolved.origins,
            "data_fingerprint": data.fingerprint,
            "packing_version": PACKING_VERSION,
            "tokenizer_fingerprint": data.meta["tokenizer_fingerprint"],
        },
        wrap=partial(world.wrap, bucket_mb=settings.ddp_bucket_mb, compression=settings.gradient_compression),
        trace=StepTrace(out_dir / "trace_rank0.json.gz", device=world.device) if profiles else None,
    )


if __name__ == "__main__":
    run_program(main)
