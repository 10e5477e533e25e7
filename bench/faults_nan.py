"""Losses, gradients and weights of one rank that are not finite: nothing moves, ranks agree, nothing of it is saved."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sft.run
from bench.faults_outcome import Fault, Outcome
from bench.faults_ranks import json_lines, prepare_data, run_arguments, run_to_end
from bench.faults_result import bytes_of
from sft.errors import EXIT_DIVERGED
from sft.step import SummedLoss

ROWS_PER_RANK = 2
LIMIT = 3  # max_skipped_steps of the runs that are to give up
FIRST_BAD = 5


class Poison(NamedTuple):
    """What one rank has at one step: its loss, or one number of its gradient, or of its weights after the step."""

    step: int
    rank: int
    kind: str  # loss, gradient, weights
    value: float

    def __str__(self) -> str:
        return f"{self.kind} {self.value} on rank {self.rank} at step {self.step}"


def schedule(size: int) -> list[Poison]:
    """NaN on every rank in turn, infinities on the last one; two in a row, then a good step."""
    cases = [(rank, kind, math.nan) for rank in range(size) for kind in ("loss", "gradient")]
    cases += [(size - 1, kind, value) for kind in ("loss", "gradient") for value in (math.inf, -math.inf)]
    return [Poison(3 + place + place // 2, *case) for place, case in enumerate(cases)]


def run_nan(folder: Path, short: bool) -> Outcome:
    """Runs whose steps are poisoned now and then, runs that are beyond help, and weights that are spoilt."""
    started = time.monotonic()
    data = prepare_data(folder / "data")
    failures: list[str] = []
    cases = 0
    for size in (2,) if short else (1, 2, 3):
        poisons = schedule(size)
        problems = poisoned_now_and_then(data, folder / f"some_{size}", poisons, size=size)
        failures += [f"{size} rank(s): {problem}" for problem in problems]
        cases += len(poisons)
    endings = [("gradient", [1], 2)] if short else [("gradient", [1], 2), ("loss", [0], 2), ("loss", [0], 1),
                ("weights", [0, 1], 2), ("weights", [1], 2), ("weights", [0], 1)]  # fmt: skip
    for kind, ranks, size in endings:
        place = folder / f"ends_{kind}_{size}_{len(ranks)}_{ranks[0]}"
        problems = beyond_help(data, place, kind, ranks, size=size)
        failures += [f"{size} rank(s), {kind} on rank {ranks}: {problem}" for problem in problems]
    return Outcome(
        test="NaN or infinity in one rank's loss or gradient",
        must="weights, moments, step counts unchanged to the bit, ranks agree; never saved; status 3 in the end",
        cases=cases + len(endings),
        least=9 if short else 30,
        failures=tuple(failures),
        counts={"steps poisoned": cases, "runs that gave up": len(endings)},
        seconds=time.monotonic() - started,
    )


def poisoned_now_and_then(data: Path, folder: Path, poisons: list[Poison], *, size: int) -> list[str]:
    """What is wrong with a run in which these steps are poisoned and all others are not."""
    out_dir, steps = folder / "out", max(poison.step for poison in poisons) + 2
    settings = {"gradient_accumulation_steps": ROWS_PER_RANK, "max_iters": steps, "log_interval": 1,
                "save_interval": "none", "eval_interval": "none"}  # fmt: skip
    statuses = run_to_end(
        run_arguments(data, out_dir, **settings),
        size=size,
        outputs=folder,
        patch=lambda rank: poison_steps(rank, poisons, folder / f"{rank}.jsonl"),
    )
    if statuses != [0] * size:
        return [f"exit statuses {statuses}: {(folder / '0.txt').read_text()[-500:]}"]
    told = [json_lines(folder / f"{rank}.jsonl") for rank in range(size)]
    bad_steps, problems = {poison.step: poison for poison in poisons}, []
    for of_ranks in zip(*told, strict=True):
        step, before, after = of_ranks[0]
        if any(other != of_ranks[0] for other in of_ranks):
            problems.append(f"step {step}: the ranks have other weights or moments than rank 0")
        if (before == after) != (step in bad_steps):
            problems.append(f"step {step}: the state {'moved' if step in bad_steps else 'did not move'}")
    return [*problems, *wrong_in_the_log(only_log(out_dir), bad_steps, size=size)]


def wrong_in_the_log(log: dict[str, Any], bad_steps: dict[int, Poison], *, size: int) -> list[str]:
    """What the run log should tell of the poisoned steps, and does not."""
    events = {event["iter"]: event for event in log["events"] if event["kind"] == "odd_step"}
    skipped = {record["iter"] for record in log["training_iterations"] if record["skipped"]}
    problems = []
    if skipped != set(bad_steps) or {step for step in events if events[step]["skipped"]} != set(bad_steps):
        problems.append(f"skipped by the log: {sorted(skipped)}, poisoned: {sorted(bad_steps)}")
    rows_per_step = ROWS_PER_RANK * size
    for step, poison in bad_steps.items():
        rows = range((step - 1) * rows_per_step, step * rows_per_step)
        wanted = [row for row in rows if poison.kind != "loss" or row % size == poison.rank]
        if step in events and events[step]["rows"] != wanted:
            problems.append(f"{poison}: the event names rows {events[step]['rows']}, not {wanted}")
    return problems


def beyond_help(data: Path, folder: Path, kind: str, ranks: list[int], *, size: int) -> list[str]:
    """What is wrong with the end of a run that is poisoned on some ranks from FIRST_BAD on, saving after each step."""
    out_dir = folder / "out"
    last = FIRST_BAD if kind == "weights" else FIRST_BAD + LIMIT + 2
    poisons = [Poison(step, rank, kind, math.nan) for step in range(FIRST_BAD, last + 1) for rank in ranks]
    settings = {"max_iters": 20, "max_skipped_steps": LIMIT, "save_interval": 1, "log_interval": 1, "eval_interval": 3}
    statuses = run_to_end(
        run_arguments(data, out_dir, **settings),
        size=size,
        outputs=folder,
        patch=lambda rank: poison_steps(rank, poisons, folder / f"{rank}.jsonl"),
    )
    problems = []
    if statuses != [EXIT_DIVERGED] * size:
        problems.append(f"exit statuses {statuses}, not {EXIT_DIVERGED}")
    if not (status := only_log(out_dir)["status"]).startswith("failed: "):
        problems.append(f"the run log says {status!r}")
    paths = sorted(out_dir.glob("ckpt*.pt"))
    for path in paths:
        places = not_finite(torch.load(path, weights_only=True))
        problems += [f"{path.name} holds {place}, which is not finite" for place in places[:1]]
    if not paths:
        problems.append("the checkpoints from before are gone")
    return problems


def not_finite(content: dict[str, Any]) -> list[str]:
    """Weights and moments of a checkpoint that are not finite."""
    state = {f"{i}.{name}": value for i, of in content["optimizer"]["state"].items() for name, value in of.items()}
    tensors = {**content["model"], **state}
    return [name for name, value in tensors.items() if isinstance(value, Tensor) and not value.isfinite().all()]


def poison_steps(rank: int, poisons: list[Poison], path: Path) -> None:
    """Patch this process: poison its steps, and write down [step, state before, state after] of each."""
    train_step, forward = sft.run.train_step, SummedLoss.forward
    mine, step = {poison.step: poison for poison in poisons if poison.rank == rank}, [0]

    def poisoned_forward(module: SummedLoss, batch: Any, **options: Any) -> Tensor:
        loss = forward(module, batch, **options)
        poison = mine.get(step[0])
        return loss * poison.value if poison and poison.kind == "loss" and module.training else loss

    def noted_step(loss_module: torch.nn.Module, optimizer: torch.optim.Optimizer, *rest: Any, **options: Any) -> Any:
        step[0] += 1
        poison = mine.get(step[0])
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = state_hash(optimizer)
        with poisoned_gradient(parameters, poison):
            result = train_step(loss_module, optimizer, *rest, **options)
        if poison and poison.kind == "weights":
            with torch.no_grad():
                parameters[1].view(-1)[7] = poison.value  # not of an embedding that may not be used
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([step[0], before, state_hash(optimizer)]) + "\n")
        return result

    SummedLoss.forward = poisoned_forward  # type: ignore[method-assign, assignment]
    sft.run.train_step = noted_step


@contextlib.contextmanager
def poisoned_gradient(parameters: list[Tensor], poison: Poison | None) -> Iterator[None]:
    """Inside, one number of this rank's own gradient is the poison, before it is averaged with other ranks'."""
    if poison is None or poison.kind != "gradient":
        yield
        return

    def hook(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[3] = poison.value
        return gradient

    handle = parameters[-1 - poison.step % 2].register_hook(hook)
    yield
    handle.remove()


def state_hash(optimizer: torch.optim.Optimizer) -> str:
    """Of the bits of all weights, moments and step counts."""
    digest = hashlib.sha256()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            digest.update(bytes_of(parameter))
            for name, value in sorted(optimizer.state.get(parameter, {}).items()):
                digest.update(name.encode() + bytes_of(value))
    return digest.hexdigest()


def only_log(out_dir: Path) -> dict[str, Any]:
    (path,) = out_dir.glob("run_*.json")
    return json.loads(path.read_text(encoding="utf-8"))


NAN = Fault("nan", run_nan)
