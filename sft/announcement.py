"""What a run says before its first step: the model, the data, the length of a step and of the run."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from sft.attention_choice import Attention
from sft.run import Run


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the settings have decided, as far as the run itself does not know it."""

    model: str  # its size and where its weights come from
    parameters: int
    steps: int
    micro_steps: int
    batch_size: int
    schedule: str
    compiled: bool
    resumed: Path | None


def announce(run: Run, plan: Plan, attention: Attention, kept: str) -> None:
    """Say what is about to happen, on the console and in the run log; `kept`: what of the activations, in words."""
    world, stream, rows = run.world, run.loader.stream, run.loader.rows_per_step
    on_gpu = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if on_gpu else "CPU"
    compute = str(run.local_loss.autocast_dtype or run.model.head_weight.dtype).removeprefix("torch.")
    lengths = stream.lengths_in(0)  # an epoch's: as often as the sources' weights ask for
    fill = float(lengths.sum() / (stream.rows_per_epoch * stream.block_size))
    sentences = {
        "model": plan.model,
        "data": f"{len(lengths):,} samples in {stream.rows_per_epoch:,} rows of {stream.block_size} tokens "
        f"({fill:.1%} filled), {len(run.validation.rows):,} validation rows",
        "step": f"{plan.batch_size} rows x {plan.micro_steps} micro-steps x {world.size} "
        f"{'GPUs' if on_gpu else 'processes'} = {rows} rows = {rows * stream.block_size:,} tokens a step",
        "run": f"{plan.steps} steps = {plan.steps * rows / stream.rows_per_epoch:.2f} epochs from step {run.iter_num}, "
        f"{plan.schedule}",
        "compute": f"{compute} on {device}{', compiled blocks' if plan.compiled else ''}",
        "attention": str(attention),
        "loss": str(run.local_loss.loss),
        "memory": kept,
    }
    if run.ema is not None:
        decay = run.ema.decay
        sentences["ema"] = (
            f"evaluations see a moving average of the weights, decay {decay}: about the last {1 / (1 - decay):,.0f} "
            f"steps, and {decay**plan.steps:.1%} of the first weights at the end"
        )
    run.journal.startup(
        sentences,
        parameters=plan.parameters,
        model_args=run.constants["model_args"],
        steps=plan.steps,
        rows_per_step=rows,
        rows_per_epoch=stream.rows_per_epoch,
        row_fill=fill,
        world_size=world.size,
        device=device,
        torch=torch.__version__,
        python=platform.python_version(),
    )
    if plan.resumed is not None:
        run.journal.event("resumed", iter=run.iter_num, path=str(plan.resumed))
