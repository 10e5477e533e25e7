"""Flipped bits, zeroed pages, truncation and appended garbage, in checkpoints and in prepared data: is all of it found?

A damaged checkpoint must be told of, and the run go on from the one before without help, to the same end. Damaged
prepared data must be refused by the name of the file, before the first step.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.faults_bytes import (
    Damage,
    flips,
    garbage,
    spans_of_archive,
    spans_of_array,
    truncations,
    zeroed_pages,
)
from bench.faults_fork import disturbed, in_child, operations_of
from bench.faults_outcome import Fault, Outcome
from bench.faults_pairs import Pair
from bench.faults_scene import (
    STEP,
    STEPS,
    Scene,
    copy_with_links,
    last_words,
    make_scene,
    recover,
    undisturbed,
)

SEED = 6
KEPT = 3  # checkpoints of the run, so that there is a good one below two damaged ones


def damages_of_checkpoint(content: bytes, other: bytes, draw: random.Random, *, short: bool) -> list[Damage]:
    each = 1 if short else 14
    return [
        *flips(spans_of_archive(content), each, draw),
        *zeroed_pages(content, 1 if short else 14),
        *truncations(content, 1 if short else 16, draw),
        *garbage(other, 1 if short else 5, draw),
    ]


def damages_of_array(content: bytes, draw: random.Random, *, short: bool) -> list[Damage]:
    return [
        *flips(spans_of_array(content), 1 if short else 3, draw),
        *([] if short else zeroed_pages(content, 1)),
        *truncations(content, 1 if short else 3, draw),
        *([] if short else garbage(content, 2, draw)),
    ]


def damages_of_meta(content: bytes, draw: random.Random, *, short: bool) -> list[Damage]:
    return [
        *flips({"text": [(0, len(content))]}, 2 if short else 40, draw),
        *zeroed_pages(content, 1),
        *truncations(content, 1 if short else 6, draw),
        *garbage(content, 1 if short else 5, draw),
    ]


class Found(NamedTuple):
    """What became of a damaged file: what went wrong, and what it counts as."""

    problem: str | None
    kind: str


def cut_short_run(scene: Scene) -> Path:
    """A run that was killed when it was about to save its last step, with all earlier checkpoints in place."""
    scene.clear()
    operations = operations_of(lambda: scene.train(keep_checkpoints=KEPT), scene.out, scene.work)
    last = [each for each in operations if each.kind == "create" and each.role.startswith("ckpt_N")][-1]
    scene.clear()
    disturbed(lambda: scene.train(keep_checkpoints=KEPT), Pair(last, "kill"), scene.out, scene.work)
    return scene.keep("cut_short")


def damage_checkpoints(scene: Scene, state: Path, numbers: list[int], damage: Damage) -> None:
    """A case like `state` in which these checkpoints are damaged, under all their names."""
    scene.clear(state)
    for number in numbers:
        path = scene.out / f"ckpt_{number:06d}.pt"
        path.write_bytes(damage.change(path.read_bytes()))


def look_at_run(scene: Scene, expected: dict[str, str], numbers: list[int]) -> Found:
    """A run that goes on from a folder in which the checkpoints of these steps are damaged."""
    good = min(numbers) - 1
    recovery = recover(scene, keep_checkpoints=KEPT)
    untold = [number for number in numbers if not told_of(f"ckpt_{number:06d}.pt", recovery.ended.output)]
    if good == 0:
        if recovery.ended.status == 0 or STEP.search(recovery.ended.output):
            return Found("undetected: it trained without a good checkpoint", "undetected")
        return Found(None, "refused, none being good")
    if recovery.ended.status != 0:
        return Found(f"needed help: {last_words(recovery.ended)}", "needed help")
    if recovery.first != good or untold:
        return Found(f"undetected: it went on from step {recovery.first}, untold are {untold}", "undetected")
    if wrong := [name for name in expected if recovery.after.get(name) != expected[name]]:
        return Found(f"lost: {wrong} differ from the undisturbed run", "lost")
    return Found(None, "found, fell back")


def told_of(name: str, output: str) -> bool:
    return any("warning" in line and name in line for line in output.splitlines())


def look_at_data(scene: Scene, folder: Path, name: str) -> Found:
    """A run on a prepared folder one file of which is damaged."""
    ended = in_child(lambda: scene.train(sft_data_dir=folder), scene.output)
    if ended.status == 0 or STEP.search(ended.output):
        return Found("undetected: it trained", "undetected")
    if "Traceback (most" in ended.output:
        return Found(f"a traceback: {last_words(ended)}", "a traceback")
    split, _, part = name.removesuffix(".npy").partition("_")
    if name not in ended.output and f"{split}: {part} " not in ended.output:
        return Found(f"the file is not named: {last_words(ended)}", "not named")
    return Found(None, "found, refused by name")


def checkpoint_cases(scene: Scene, *, short: bool) -> Iterator[tuple[str, Found]]:
    expected, state, draw = undisturbed(scene), cut_short_run(scene), random.Random(SEED)
    out = state / "out"
    newest = STEPS - 1
    content, other = ((out / f"ckpt_{number:06d}.pt").read_bytes() for number in (newest, newest - 1))
    all_of = damages_of_checkpoint(content, other, draw, short=short)
    plans = [(damage, [newest]) for damage in all_of]
    plans += [(damage, [newest, newest - 1]) for damage in draw.sample(all_of, 1 if short else 16)]
    plans += [(damage, list(range(1, newest + 1))) for damage in draw.sample(all_of, 1 if short else 4)]
    for damage, numbers in plans:
        damage_checkpoints(scene, state, numbers, damage)
        yield f"checkpoints {numbers}: {damage}", look_at_run(scene, expected, numbers)


def data_cases(scene: Scene, *, short: bool) -> Iterator[tuple[str, Found]]:
    draw, folder = random.Random(SEED), scene.work / "damaged"
    names = sorted(path.name for path in scene.data.glob("*.npy"))
    for name in [*(names[:1] if short else names), "meta.json"]:
        content = (scene.data / name).read_bytes()
        kinds = damages_of_meta if name == "meta.json" else damages_of_array
        copy_with_links(scene.data, folder)
        for damage in kinds(content, draw, short=short):
            (folder / name).write_bytes(damage.change(content))
            scene.clear()
            yield f"{name}: {damage}", look_at_data(scene, folder, name)
        shutil.rmtree(folder)


def run_damage(folder: Path, short: bool) -> Outcome:
    started, scene = time.monotonic(), make_scene(folder)
    failures, cases = [], 0
    counts: dict[str, Any] = {}
    for part, found in (("checkpoints", checkpoint_cases), ("arrays and meta.json", data_cases)):
        kinds: Counter[str] = Counter()
        for case, (problem, kind) in found(scene, short=short):
            cases, kinds[kind] = cases + 1, kinds[kind] + 1
            failures += [f"{case}: {problem}"] if problem else []
        counts |= {f"{part}: {kind}": kinds[kind] for kind in sorted(kinds)}
    return Outcome(
        test="flipped bits, zeroed pages, truncation, garbage appended, in checkpoints, arrays and meta.json",
        must="all detected before the first step, the checkpoint before used where there is one",
        cases=cases,
        least=10 if short else 200,
        failures=tuple(failures),
        counts=counts,
        seconds=time.monotonic() - started,
    )


FAULTS = (Fault("damage", run_damage),)
