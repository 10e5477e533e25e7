"""The rows of each step on any number of ranks: the same ones, in the same order, none twice and none left out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sft.run
from bench.faults_outcome import Fault, Outcome
from bench.faults_ranks import BLOCK_SIZE, json_lines, prepare_data, run_arguments, run_to_end
from bench.faults_result import log_records
from sft.arrays import open_prepared
from sft.batches import Batch, read_row
from sft.packing import RowStream

SEED = 1337
ROWS_PER_STEP = 10  # which neither 3 nor 4 nor 6 ranks share evenly
STEPS = 5
SIZES = (1, 2, 3, 4, 6)
SHORT_SIZES = (1, 3)
FIXED = {  # every run has them: the steps of a chain end at other places, the learning rate's decay does not
    "gradient_accumulation_steps": "none",
    "rows_per_step": ROWS_PER_STEP,
    "dtype": "float64",
    "eval_interval": "none",
    "log_interval": 1,
    "lr_decay_iters": 20,
    "seed": SEED,
}


class Link(NamedTuple):
    """A part of a run that is stopped and gone on with on another number of ranks, or with other batches."""

    size: int
    changes: dict[str, Any] = {}  # noqa: RUF012  # never changed


CHAIN = (Link(1), Link(3), Link(2, {"batch_size": 2}), Link(6), Link(4, {"batch_size": 3}),
         Link(2, {"rows_per_step": 7, "allow_change": "rows_per_step"}),
         Link(1, {"rows_per_step": 7, "batch_size": 7}))  # fmt: skip
SHORT_CHAIN: tuple[Link, ...] = ()


class Steps(NamedTuple):
    """What one start has trained on: step -> the ids of its rows in order, its order hash and its loss."""

    rows: dict[int, list[list[int]]]
    orders: dict[int, str]
    losses: dict[int, float]


def run_rows(folder: Path, short: bool) -> Outcome:
    """Every world size from the start, then a run that goes from one to the next; ids as they enter the step."""
    started, failures, steps_seen = time.monotonic(), [], 0
    data = prepare_data(folder / "data")
    found: dict[int, Steps] = {}
    for size in SHORT_SIZES if short else SIZES:
        place = folder / f"of_{size}"
        found[size] = train(data, place, Link(size), max_iters=STEPS)
        expected = expected_rows(data, [ROWS_PER_STEP] * STEPS)
        failures += [f"{size} ranks: {problem}" for problem in problems(found[size], expected, found[min(found)])]
        steps_seen += STEPS
    chained, in_chain = chain(data, folder, SHORT_CHAIN if short else CHAIN)
    spread = [loss_spread(found[min(found)], steps) for steps in found.values()]
    if max(spread) > 1e-9:
        failures.append(f"losses in float64 differ by up to {max(spread):.1e} of themselves")
    return Outcome(
        test=f"rows of each step for world sizes {', '.join(map(str, found))}"
        + (", and where size or batch change on the way" if in_chain else ""),
        must="identical",
        cases=steps_seen + in_chain,
        least=len(found) * STEPS,
        failures=(*failures, *chained),
        counts={
            "world sizes": list(found),
            "steps of each": STEPS,
            "steps after a change": in_chain,
            "largest relative difference of a loss": max(spread),
        },
        seconds=time.monotonic() - started,
    )


def chain(data: Path, folder: Path, links: Sequence[Link]) -> tuple[list[str], int]:
    """Two steps of each link, resumed by the next one; what is wrong, and the number of steps."""
    failures: list[str] = []
    rows = [int(link.changes.get("rows_per_step", ROWS_PER_STEP)) for link in links for _ in range(2)]
    expected = expected_rows(data, rows)
    for place, link in enumerate(links):
        steps = train(data, folder / "chain" / str(place), link, max_iters=2 * place + 2, out_dir=folder / "chain_out")
        wanted = {step: expected[step] for step in (2 * place + 1, 2 * place + 2)}
        failures += [f"part {place + 1}, on {link.size} ranks: {problem}" for problem in problems(steps, wanted)]
    return failures, len(rows)


def train(data: Path, folder: Path, link: Link, *, max_iters: int, out_dir: Path | None = None) -> Steps:
    """What the steps of one start trained on; AssertionError where it does not end well."""
    out_dir, outputs = out_dir or folder / "out", folder / "ranks"
    settings = {**FIXED, "max_iters": max_iters, "resume": "auto", **link.changes}
    statuses = run_to_end(
        run_arguments(data, out_dir, **settings),
        size=link.size,
        outputs=outputs,
        patch=lambda rank: write_down_rows(outputs / f"{rank}.jsonl"),
    )
    assert statuses == [0] * link.size, (statuses, (outputs / "0.txt").read_text()[-2000:])
    shares = [json_lines(outputs / f"{rank}.jsonl") for rank in range(link.size)]
    records = {record["iter"]: record for record in log_records(out_dir)}
    rows: dict[int, list[list[int]]] = {}
    for of_ranks in zip(*shares, strict=True):  # one step
        numbers = {step for step, _ in of_ranks}
        assert len(numbers) == 1, "the ranks count alike"
        micro_steps = zip(*(batches for _, batches in of_ranks), strict=True)
        rows[numbers.pop()] = [row for micro_step in micro_steps for batch in micro_step for row in batch]
    return Steps(
        rows,
        {step: records[step]["order"] for step in rows},
        {step: records[step]["loss"] for step in rows},
    )


def write_down_rows(path: Path) -> None:
    """Patch this process: the ids of every row that a step trains on go into a file, [step, micro-batches] a line."""
    train_step, update = sft.run.train_step, sft.run.Run.update
    current = [0]

    def counted_update(run: sft.run.Run, **options: Any) -> None:
        current[0] = run.iter_num + 1
        update(run, **options)

    def noted_step(loss_module: Any, optimizer: Any, batches: Iterator[Batch], **options: Any) -> Any:
        noted: list[list[list[int]]] = []

        def passed() -> Iterator[Batch]:
            for batch in batches:
                # a row that fills up the share of a rank is padding alone
                noted.append([row for row in batch.input_ids.tolist() if len(set(row)) > 1])
                yield batch

        result = train_step(loss_module, optimizer, passed(), **options)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([current[0], noted]) + "\n")
        return result

    sft.run.Run.update = counted_update  # type: ignore[method-assign, assignment]
    sft.run.train_step = noted_step  # type: ignore[assignment]


def expected_rows(data: Path, rows_of_steps: Sequence[int]) -> dict[int, list[list[int]]]:
    """The ids of the rows of each step as the stream of rows has them, the next ones for each."""
    prepared = open_prepared(data)
    samples, pad = prepared.splits["train"], prepared.meta["pad_id"]
    stream = RowStream(samples.lengths, block_size=BLOCK_SIZE, seed=SEED)
    expected: dict[int, list[list[int]]] = {}
    seen = 0
    for step, count in enumerate(rows_of_steps, 1):
        expected[step] = []
        for number in range(seen, seen + count):
            ids = [int(i) for document in read_row(samples, stream.row(number)) for i in document.input_ids]
            expected[step].append([*ids, *[pad] * (BLOCK_SIZE - len(ids))])
        seen += count
    return expected


def problems(steps: Steps, expected: dict[int, list[list[int]]], first: Steps | None = None) -> list[str]:
    """Where these steps have other rows than they should, or another order hash than those of the first size."""
    if steps.rows.keys() != expected.keys():
        return [f"trained steps {sorted(steps.rows)}, not {sorted(expected)}"]
    odd = [f"step {step} has other rows than the stream" for step in expected if steps.rows[step] != expected[step]]
    if first is not None:
        odd += [f"step {step} has another order hash" for step in expected if steps.orders[step] != first.orders[step]]
    return odd


def loss_spread(one: Steps, other: Steps) -> float:
    """The largest relative difference between the losses of the same step."""
    return max(abs(one.losses[step] / other.losses[step] - 1) for step in one.losses)


ROWS = Fault("rows", run_rows)
