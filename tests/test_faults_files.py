"""Faults at file operations and damaged files, in small; and that the harness sees what it is there to see."""

import json
import os
import sys

import pytest
import torch

import sft.files
from bench.faults_damage import run_damage
from bench.faults_files import judge_run, run_files
from bench.faults_fork import disturbed, in_child, operations_of
from bench.faults_pairs import END, MODES, Operation, Pair, modes_of, spread
from bench.faults_peers import start_again, what_became
from bench.faults_savers import PEERS, through_python
from bench.faults_scene import make_scene, undisturbed
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="paths of descriptors come from /proc")

OLD, NEW = b"old content", b"new content, longer than that"
AT_END = Operation(END, "", 0)


def test_a_fault_at_an_operation_of_each_program_is_made_good_by_a_rerun(tmp_path):
    outcome = run_files(tmp_path / "scene", True)
    assert outcome.is_met, outcome


def test_damaged_checkpoints_arrays_and_manifests_are_found_and_older_checkpoints_used(tmp_path):
    outcome = run_damage(tmp_path / "scene", True)
    assert outcome.is_met, outcome


def test_a_run_whose_saves_do_not_sync_is_seen_to_be_lost_in_a_power_cut(tmp_path, monkeypatch):
    scene = make_scene(tmp_path / "scene")
    expected = undisturbed(scene)

    def careless(file, partial, path):
        file.close()
        os.replace(partial, path)

    pair = Pair(AT_END, "power cut")
    for is_careless in (False, True):
        if is_careless:
            monkeypatch.setattr(sft.files, "into_place", careless)
        scene.clear()
        ended = disturbed(scene.train, pair, scene.out, scene.work)
        problems = judge_run(scene, expected, pair, ended).problems
        assert bool(problems) == is_careless, problems


def test_nanogpts_way_is_seen_to_lose_its_only_checkpoint(tmp_path, monkeypatch):
    peer = next(peer for peer in PEERS if peer.name == "nanoGPT's way")
    monkeypatch.setattr(torch, "save", through_python(torch.save))
    out = tmp_path / "case" / "out"
    expected = start_again(peer, out, tmp_path)
    assert what_became(expected, result := tuple(expected.ended.output.split()[-2:]), saved=0) == ["resumed exactly"]
    (out / "ckpt.pt").unlink()
    ended = disturbed(lambda: peer.train(out), Pair(Operation("write", "ckpt.pt", 5), "torn"), out, tmp_path)
    assert "saved 1" in ended.output
    assert what_became(start_again(peer, out, tmp_path), result, saved=1) == ["needed help", "lost a finished save"]


def test_the_committed_result_tells_of_every_saver_and_its_versions():
    report = json.loads((ROOT / "bench" / "results" / "faults_peers.json").read_text())
    assert report["savers"].keys() == {peer.name for peer in PEERS}
    assert all(saver["faults"]["cases"] >= 60 for saver in report["savers"].values())
    assert {"transformers", "trl", "torch", "command", "processor"} <= report.keys()


class Program:
    """Replaces a file: as it should be done, or without one of the parts."""

    def __init__(self, folder, *, syncs=True, syncs_folder=True, in_place=False):
        self.folder, self.work = folder / "watched", folder
        self.folder.mkdir()
        self.path = self.folder / "file"
        self.path.write_bytes(OLD)
        self.syncs, self.syncs_folder, self.in_place = syncs, syncs_folder, in_place

    def __call__(self):
        partial = self.path if self.in_place else self.path.with_suffix(".partial")
        with open(partial, "wb") as file:
            file.write(NEW)
            if self.syncs:
                file.flush()
                os.fsync(file.fileno())
        if not self.in_place:
            os.replace(partial, self.path)
        if self.syncs_folder:
            descriptor = os.open(self.folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        print("done")

    def ended(self, kind, mode, role="file.partial", ordinal=0):
        """(status, what the file holds) after that fault."""
        self.path.write_bytes(OLD)
        pair = Pair(Operation(kind, role, ordinal), mode)
        ended = disturbed(self, pair, self.folder, self.work)
        return ended.status, self.path.read_bytes()


def test_every_operation_is_counted_in_order(tmp_path):
    program = Program(tmp_path)
    kinds = ["create", "write", "fsync", "close"]
    expected = [*(Operation(kind, "file.partial", 0) for kind in kinds), Operation("replace", "file", 0)]
    assert operations_of(program, program.folder, tmp_path) == [*expected, Operation("fsync", ".", 0), AT_END]


@pytest.mark.parametrize("mode", ["power cut", "power cut, names lost"])
def test_a_power_cut_takes_what_was_not_synced_and_nothing_else(tmp_path, mode):
    names_are_lost = mode != "power cut"
    for i, (lacks, left) in enumerate(
        [
            ({}, NEW),
            ({"syncs": False}, b""),
            ({"syncs_folder": False}, OLD if names_are_lost else NEW),
            ({"in_place": True, "syncs": False}, b""),
        ]
    ):
        (tmp_path / str(i)).mkdir()
        program = Program(tmp_path / str(i), **lacks)
        assert program.ended(END, mode, role="") == (-9, left), lacks
    program = Program(tmp_path)
    assert program.ended("fsync", mode) == (-9, OLD)
    assert program.ended("fsync", mode, role=".") == (-9, OLD if names_are_lost else NEW)


def test_a_kill_comes_before_its_operation_and_a_torn_write_is_half_done(tmp_path):
    program = Program(tmp_path, in_place=True)
    assert program.ended("create", "kill", role="file") == (-9, OLD)
    assert program.ended("write", "kill", role="file") == (-9, b"")
    assert program.ended("write", "torn", role="file") == (-9, NEW[: len(NEW) // 2])
    assert program.ended("fsync", "kill", role="file") == (-9, NEW)


def test_a_full_disk_stays_full_and_refuses_only_what_needs_room(tmp_path):
    path = tmp_path / "watched" / "file"
    path.parent.mkdir()

    def act():
        for _ in range(2):
            try:
                path.write_bytes(NEW)
            except OSError as error:
                print(error.errno, path.stat().st_size)
        path.unlink()
        path.parent.joinpath("other").touch()

    for mode, told in (("ENOSPC", f"28 {len(NEW) // 2}\n28 0\n"), ("ENOSPC once", f"28 {len(NEW) // 2}\n")):
        ended = disturbed(act, Pair(Operation("write", "file", 0), mode), path.parent, tmp_path)
        assert ended.output.startswith(told), mode
        assert ended.status == (mode == "ENOSPC"), ended
        assert not path.exists()
    assert (path.parent / "other").exists()


def test_an_error_of_every_operation_reaches_the_program(tmp_path):
    program = Program(tmp_path)
    for operation in operations_of(program, program.folder, tmp_path)[:-1]:
        ended = disturbed(program, Pair(operation, "EIO once"), program.folder, tmp_path)
        assert (ended.status, "Input/output error" in ended.output) == (1, True), operation


def test_all_operations_are_tried_before_any_twice_and_all_modes_of_each_kind_in_the_end():
    operations = [Operation("write", role, i) for role in ("a", "b") for i in range(10)] + [AT_END]
    assert {pair.operation for pair in spread(operations, 21)} == set(operations)
    assert {pair.mode for pair in spread(operations, 21)} == set(MODES)
    assert len({pair.operation for pair in spread(operations, 7)}) == 7
    everything = spread(operations, None)
    assert len(set(everything)) == len(everything) == 20 * len(MODES) + len(modes_of(END))


def test_a_child_that_hangs_is_ended_and_told_of(tmp_path):
    ended = in_child(lambda: os.read(os.pipe()[0], 1), tmp_path / "output.txt", seconds=0.2)
    assert (ended.status, ended.hung) == (-9, True)
