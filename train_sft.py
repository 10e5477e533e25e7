"""Fine-tune a model on prepared conversations: one process or many, one program.

python train_sft.py configs/sft_demo.py --max_iters=20
torchrun --standalone --nproc_per_node=8 train_sft.py configs/sft_qwen3_1.8b.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from model_builder import ConfigurableGPT, load_pretrained
from model_config import PRESETS, ModelArchitectureConfig, architecture_problems, forward_flops, parameter_count
from sft import adapting, dry_run, elsewhere, memory, out_of_memory, saved_adapters, start_checks, startup
from sft.announcement import Plan, announce
from sft.arrays import PreparedData
from sft.attention_choice import AttentionChoice
from sft.config import Resolved, fingerprint, load_settings, to_dict
from sft.control_rows import UntrainedRows
from sft.ema import MovingAverage
from sft.errors import Preempted, UserError, run_program
from sft.evaluation import Validation
from sft.experts import balance_weight
from sft.fetching import with_local_base
from sft.journal import Journal
from sft.lora import Scaling
from sft.loss import LossKernel
from sft.optim import Schedule, learning_rate_at, make_optimizer
from sft.out_dir_lock import OutDirLock
from sft.packing import RowStream
from sft.progress import Totals
from sft.recompute import ActivationCheckpointing
from sft.run import Run
from sft.run_log import RunLog
from sft.signals import StopSignals
from sft.start import Start, make_sure
from sft.step_facts import Judge
from sft.step_watch import StepWatch
from sft.tracing import StepTrace
from sft.train_rules import contradictions
from sft.watchdog import Watchdog
from sft.world import DeviceChoice, GradientCompression, World, join_world


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Every knob of training. Rows are packed rows of block_size tokens; a step is one optimizer update."""

    sft_data_dir: str  # a folder that prepare_sft.py wrote
    out_dir: str  # where checkpoints and run_*.json go
    checkpoint_path: str | None = None  # the model to start from: a ckpt_*.pt, a Hugging Face folder or hub name
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
    ema_decay: float | None = None  # keep and evaluate a moving average: 0.999 is of about 1,000 steps; None = none
    grad_clip: float | None = 1.0  # largest global gradient norm; None = no clipping
    router_aux_loss_coef: float | None = None  # weight of experts' load-balancing loss; None = as the model says
    dropout: float = 0.0  # on embeddings, attention probabilities and residual branches

    lora_rank: int | None = None  # train adapters of this rank, and keep the base as it is; None = all is trained
    lora_alpha: float = 16.0  # adapters are multiplied by lora_alpha / lora_rank
    lora_dropout: float = 0.0  # of what adapters read
    lora_targets: tuple[str, ...] = ("*",)  # patterns of layers' names, ours or Hugging Face's: q_proj,v_proj; * = all
    lora_scaling: Scaling = "standard"  # rank_stabilized = lora_alpha over the root of lora_rank, for large ranks
    lora_dora: bool = False  # train the length of each adapted row, too (DoRA)
    train_embeddings: bool = False  # with adapters: the embeddings and the head, too, in full
    freeze: tuple[str, ...] = ()  # patterns of parameters' or modules' names that are not trained, as blocks.0

    eval_interval: int | None = 200  # steps between evaluations; None = never
    eval_rows: int | None = None  # validation rows to use; None = all
    log_interval: int = 10  # steps between log records
    log_save_seconds: float = 30.0  # at most this much of the run log is lost in a crash
    save_interval: int | None = 200  # steps between checkpoints; None = only at the end and at the best evaluation
    keep_checkpoints: int | None = 2  # numbered checkpoints to keep (the best one always stays); None = all
    save_optimizer: bool = True  # False = weights alone, a third of the size, which cannot be resumed
    resume: startup.ResumeChoice = "never"  # auto = go on from out_dir's newest checkpoint, if any
    allow_change: tuple[str, ...] = ()  # what a resumed run may have other than before, by name: learning_rate,data
    max_skipped_steps: int = 10  # steps in a row without a finite loss and gradient, after which the run gives up
    spike_sigma: float | None = 6.0  # standard deviations above which a loss or gradient norm is told of; None = never
    untrained_rows: UntrainedRows = "keep"  # of a base's control tokens; mean = begin as the mean of all other rows
    skip_spikes: bool = False  # such a step does not move the weights
    hang_timeout: float = 1800.0  # seconds without progress of a rank after which all ranks end, with their stacks

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
        yield from contradictions(self)
        if self.model is not None:
            yield from (("model", problem) for problem in architecture_problems(self.model))

    def steps(self, stream: RowStream, *, rows_per_step: int, saved: Mapping[str, Any] | None = None) -> int:
        """The length of the run in steps; max_epochs is rounded up, so that the last row is seen."""
        if self.max_iters is not None:
            return self.max_iters
        assert self.max_epochs is not None
        steps, rows = (saved["iter_num"], saved["rows_seen"]) if saved else (0, 0)
        return steps + math.ceil(max(0, stream.rows_in(self.max_epochs) - rows) / rows_per_step)

    def decay(self, steps: int) -> int | None:
        """The step at which the learning rate has come to its end; None = it stays."""
        return None if self.lr_schedule == "constant" else self.lr_decay_iters or steps

    def autocast_dtype(self, device: torch.device) -> torch.dtype | None:
        """bfloat16 where the blocks compute in it, beside fp32 weights; None = in the dtype of the weights."""
        chosen = "bfloat16" if self.dtype == "auto" and device.type == "cuda" else self.dtype
        return torch.bfloat16 if chosen == "bfloat16" else None

    def compiles(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.compile is None else self.compile


def main(argv: list[str]) -> None:
    resolved = load_settings(TrainSettings, argv, elsewhere=elsewhere.TRAIN)
    device, watchdog = resolved.settings.device, Watchdog(resolved.settings.hang_timeout)
    with watchdog, join_world(device, timeout=watchdog.group_timeout) as world, watchdog.among(world):
        world.agree("settings", fingerprint(resolved.settings))
        with out_of_memory.told(world.device):
            train(resolved, world, watchdog)


def train(resolved: Resolved[TrainSettings], world: World, watchdog: Watchdog) -> None:
    """The whole run on one rank: base, lock, start, memory, run."""
    resolved, settings = with_local_base(resolved, world)
    with OutDirLock(Path(settings.out_dir)) as lock:
        start = make_sure(
            settings, world, lock, load=partial(load_base, settings, world), build=partial(build_model, settings, world)
        )
        model, (loader, steps, _) = start.model, start.course
        autocast = settings.autocast_dtype(world.device)
        decay = settings.ema_decay
        work = memory.workload(model, loader, loss=start.loss, autocast_dtype=autocast, world=world, ema_decay=decay)
        model.activation_checkpointing, kept = memory.settle(settings.activation_checkpointing, work)
        if settings.dry_run:
            flops = partial(training_flops, model)
            return dry_run.rehearse(settings, work, loader, steps=steps, saved=start.saved, flops=flops)
        world.on_main(lambda: startup.copy_tokenizer(start.data, lock.out_dir))
        carry_out(resolved, start, work, kept, watchdog)


def carry_out(
    resolved: Resolved[TrainSettings], start: Start, work: memory.Workload, kept: str, watchdog: Watchdog
) -> None:
    """The run itself: optimizer, resume, log, loop, close."""
    settings, world, (loader, steps, _) = resolved.settings, work.world, start.course
    journal = Journal(world, None, steps=steps)
    with StopSignals() as signals:
        run = build_run(resolved, start, journal, signals)
        try:
            if start.saved is not None:
                run.restore(start.saved)
            journal.log = world.together(lambda: open_log(resolved) if world.is_main else None)
            watchdog.last_words = journal.last_words
            announce(run, plan_of(settings, run, start), start.attention, kept)
            start_checks.doubt(run, settings, start.untrained_rows, begins=start.saved is None)
            loop(settings, run, steps=steps)
        except BaseException as error:
            run.close(status_after(error, watchdog))
            if out_of_memory.lacked(error):
                fixed = settings.rows_per_step
                raise out_of_memory.explained(error, world.device, work, loader, fixed=fixed) from error
            raise
        run.close("finished")


def status_after(error: BaseException, watchdog: Watchdog) -> str:
    """What the run log says of a run that ended with this error."""
    if isinstance(error, Preempted):
        return "preempted"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if out_of_memory.lacked(error):
        return "failed: out of memory"
    return f"failed: {watchdog.lost_peer(error) or f'{type(error).__name__}: {error}'}"


def plan_of(settings: TrainSettings, run: Run, start: Start) -> Plan:
    source = start.resume_path or settings.checkpoint_path or "new, random weights"
    parameters = parameter_count(start.model.config)
    return Plan(
        model=f"{adapting.trained_values(start.model)}, {source}",
        parameters=parameters,
        steps=start.course.steps,
        micro_steps=run.loader.micro_steps,
        batch_size=settings.batch_size,
        schedule=f"{settings.lr_schedule} learning rate after {settings.warmup_iters} steps of warm-up",
        compiled=settings.compiles(run.world.device),
        resumed=start.resume_path,
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
    if run.owes_evaluation or run.watch.stops:
        with run.progress.clock_stopped():
            run.milestone(saves=run.owes_evaluation)  # the checkpoint becomes what it would have been
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
        run.owes_evaluation = due(settings.eval_interval)
        saves = due(settings.save_interval) or run.iter_num == steps or (run.owes_saving and due(settings.log_interval))
        if run.owes_evaluation or saves or run.watch.stops:
            with run.progress.clock_stopped():
                run.milestone(saves=saves)


def load_base(settings: TrainSettings, world: World, source: Path) -> ConfigurableGPT:
    """The model of a checkpoint, on the CPU; in a dry run on the device meta: shapes without numbers.

    The main rank verifies it for all; what is resumed has been verified when it was found.
    """
    dtype = torch.float64 if settings.dtype == "float64" else torch.float32
    resumes = settings.resume != "never" and source.parent == Path(settings.out_dir)
    verify = world.is_main and (not resumes or settings.lora_rank is not None)  # whose base nobody has looked at yet
    model = load_pretrained(source, "meta" if settings.dry_run else "cpu", dtype, verify=verify)
    if not resumes:
        adapting.merge_adapters(model)
    return model


def build_model(
    settings: TrainSettings, world: World, data: PreparedData, base: ConfigurableGPT | None
) -> ConfigurableGPT:
    """The base, or a new model, grown to the data's ids; on the device of this rank, in a dry run on meta."""
    place = torch.device("meta") if settings.dry_run else world.device
    if base is not None:
        model = base
    else:
        torch.manual_seed(settings.seed)
        with torch.device("meta" if settings.dry_run else "cpu"):  # the CPU's numbers are the same everywhere
            model = ConfigurableGPT(new_architecture(settings, data))
            model = model.to(torch.float64 if settings.dtype == "float64" else torch.float32)
    limit = model.config.block_size
    if model.config.position_encoding == "learned_absolute" and settings.block_size > limit:
        raise UserError(f"block_size {settings.block_size} is beyond the {limit} positions that the model has learned")
    if grows := model.vocab_size < data.meta["vocab_size"]:
        model.grow_vocabulary(data.meta["vocab_size"], say=world.print)
    of = saved_adapters.base_of_run(settings, model) if world.is_main else None
    halves = settings.autocast_dtype(world.device) is not None
    adapting.make_trainable(model, settings, base=of, half=halves, grew=grows, say=world.print)
    model.set_dropout(settings.dropout)
    if settings.compiles(world.device):
        model.compile_blocks()
    return model.to(place)


def new_architecture(settings: TrainSettings, data: PreparedData) -> ModelArchitectureConfig:
    """The shape of a model from scratch: at least the data's vocabulary, and this run's block_size if it has none."""
    if isinstance(settings.model, str):
        fields = PRESETS[settings.model].to_dict()
    else:
        fields = {"vocab_size": 1, "block_size": settings.block_size, **(settings.model or {})}
    return ModelArchitectureConfig.from_dict(
        {**fields, "vocab_size": max(fields["vocab_size"], data.meta["vocab_size"])}
    )


def training_flops(model: ConfigurableGPT, totals: Totals) -> int:
    """The backward pass has two matrix products for each of the forward's; of a frozen matrix, one."""
    pairs, targets = totals.attended_pairs, totals.trained_tokens
    forward = forward_flops(model.config, tokens=totals.tokens, attended_pairs=pairs, trained_tokens=targets)
    trained, values = adapting.matrix_values(model)
    return 2 * forward + forward * trained // values


def open_log(resolved: Resolved[TrainSettings]) -> RunLog:
    settings = resolved.settings
    return RunLog(
        settings.out_dir,
        run_name=settings.run_name or Path(settings.out_dir).name,
        config=to_dict(settings),
        origin=resolved.origins,
        save_seconds=settings.log_save_seconds,
    )


def build_run(resolved: Resolved[TrainSettings], start: Start, journal: Journal, signals: StopSignals) -> Run:
    data, model, (loader, _, identity) = start.data, start.model, start.course
    settings, world = resolved.settings, journal.world
    out_dir, profiles = Path(settings.out_dir), settings.profile and world.is_main
    judge = Judge(world, spike_sigma=settings.spike_sigma, skip_spikes=settings.skip_spikes)
    sources = [source["path"] for source in data.meta["sources"]]

    return Run(
        world=world,
        model=model,
        ema=None if settings.ema_decay is None else MovingAverage(model, settings.ema_decay),
        autocast_dtype=settings.autocast_dtype(world.device),
        loss=start.loss,
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
        training_flops=partial(training_flops, model),
        balance_weight=balance_weight(settings.router_aux_loss_coef, model),
        out_dir=out_dir,
        keep_checkpoints=settings.keep_checkpoints,
        save_optimizer=settings.save_optimizer,
        constants={
            "model_args": model.config.to_dict(),
            "config": to_dict(settings),
            "config_origins": resolved.origins,
            **identity,
            **saved_adapters.constants(model, out_dir),
        },
        wrap=partial(world.wrap, bucket_mb=settings.ddp_bucket_mb, compression=settings.gradient_compression),
        watch=StepWatch(judge, loader, journal, max_skipped_steps=settings.max_skipped_steps, sources=sources),
        asked_to_stop=lambda: signals.received is not None,
        trace=StepTrace(out_dir / "trace_rank0.json.gz", device=world.device) if profiles else None,
    )


if __name__ == "__main__":
    run_program(main)
