"""Defects as others have them, put into our own code on purpose, each with the test that finds it.

A change is the exact text of a file, which it must hold once, and what is put there.
"""

from __future__ import annotations

from typing import NamedTuple


class Defect(NamedTuple):
    """What is broken, where and how, and which test must fail of it."""

    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    test: str


# how files, checkpoints and logs are written and read
SAVES = (
    Defect(
        "the file is not synced",
        "sft/files.py",
        (("    os.fsync(file.fileno())\n", ""),),
        "tests/test_files.py::test_content_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_end",
    ),
    Defect(
        "the folder is not synced",
        "sft/files.py",
        (
            (
                "    os.replace(partial, path)\n    sync_folder(path.parent)\n\n\ndef let_go",
                "    os.replace(partial, path)\n\n\ndef let_go",
            ),
        ),
        "tests/test_files.py::test_content_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_end",
    ),
    Defect(
        "the file is renamed before it is synced",
        "sft/files.py",
        (
            (
                "    file.flush()\n    os.fsync(file.fileno())\n    file.close()\n    os.replace(partial, path)\n",
                "    file.flush()\n    os.replace(partial, path)\n    os.fsync(file.fileno())\n    file.close()\n",
            ),
        ),
        "tests/test_files.py::test_content_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_end",
    ),
    Defect(
        "a file is written in place",
        "sft/files.py",
        (("    partial = partial or partial_of(path)\n", "    partial = path\n"),),
        "tests/test_files.py::test_a_disk_that_refuses_leaves_what_was_there_and_nothing_else",
    ),
    Defect(
        "a checkpoint is loaded without a look at its checksums",
        "sft/checkpoint.py",
        (("        if verify and is_archive:\n", "        if False:\n"),),
        "tests/test_checkpoint.py::test_a_damaged_newest_one_is_told_of_once_set_aside_and_the_one_before_used",
    ),
    Defect(
        "the checksums of records are not compared",
        "sft/seal.py",
        (("zip(records, found, strict=True) if crc != record.crc]", "zip(records, found, strict=True) if False]"),),
        "tests/test_seal.py::test_a_flipped_bit_that_torch_load_does_not_see_is_found_in_anybodys_checkpoint",
    ),
    Defect(
        "the seal is not compared",
        "sft/seal.py",
        (("        if comment and comment != MARK", "        if False and comment != MARK"),),
        "tests/test_seal.py::test_every_bit_of_a_sealed_file_counts",
    ),
    Defect(
        "a damaged newest checkpoint ends the run",
        "sft/checkpoint.py",
        (('            warn(f"warning: {error}")\n', "            raise\n"),),
        "tests/test_checkpoint.py::test_a_damaged_newest_one_is_told_of_once_set_aside_and_the_one_before_used",
    ),
    Defect(
        "old checkpoints are deleted before the new one is whole",
        "sft/checkpoint.py",
        (
            (
                "    write_checkpoint(path, content)\n    link_whole(path, folder / NEWEST)\n",
                "    for _, old in numbered_checkpoints(folder)[(keep or 99) - 1 :]:\n        os.unlink(old)\n"
                "    write_checkpoint(path, content)\n    link_whole(path, folder / NEWEST)\n",
            ),
        ),
        "tests/test_checkpoint_faults.py::test_a_power_failure_at_any_moment_of_a_save_leaves_whole_checkpoints",
    ),
    Defect(
        "one checkpoint is kept while training",
        "sft/checkpoint.py",
        (("FEWEST_WHILE_TRAINING = 2", "FEWEST_WHILE_TRAINING = 1"),),
        "tests/test_checkpoint.py::test_one_is_kept_at_the_end_and_never_fewer_than_two_before",
    ),
    Defect(
        "a checkpoint is read as code",
        "sft/checkpoint.py",
        (("map_location=stay, weights_only=True, mmap=True", "map_location=stay, weights_only=False, mmap=True"),),
        "tests/test_checkpoint.py::test_a_malicious_pickle_is_refused_by_name_and_not_run",
    ),
    Defect(
        "a full disk ends the run",
        "sft/run.py",
        (
            (
                "        except (OSError, RuntimeError) as error:\n            return None, str(error)\n",
                "        except ZeroDivisionError as error:\n            return None, str(error)\n",
            ),
        ),
        "tests/test_step_facts.py::test_a_save_that_fails_is_told_and_tried_again_and_the_run_goes_on",
    ),
    Defect(
        "weights that are not finite are saved",
        "sft/run.py",
        (
            (
                "        if not all(bool(torch.isfinite(each).all())",
                "        if False and not all(bool(torch.isfinite(each).all())",
            ),
        ),
        "tests/test_step_facts.py::test_weights_that_are_not_finite_are_never_saved",
    ),
    Defect(
        "the run log is written in place",
        "sft/run_log.py",
        (
            (
                "file.write(text.encode()), partial=partial_of(self.path))",
                "file.write(text.encode()), partial=self.path)",
            ),
        ),
        "tests/test_run_log.py::test_a_reader_and_a_kill_find_valid_json_at_every_moment",
    ),
    Defect(
        "the lock is not taken",
        "sft/out_dir_lock.py",
        (("                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "                pass\n"),),
        "tests/test_out_dir_lock.py::test_a_second_process_is_refused_and_told_who_has_it",
    ),
)

# what a run begins with
STARTS = (
    Defect(
        "a data set of before stays valid while its arrays are replaced",
        "sft/prepared_writer.py",
        (
            (
                "            for path in replaced_files(self.folder):\n                path.unlink(missing_ok=True)\n",
                "",
            ),
        ),
        "tests/test_arrays.py::test_a_rerun_that_fails_leaves_no_valid_folder_and_no_half_written_file",
    ),
    Defect(
        "a run is resumed on other data",
        "sft/continuity.py",
        (('    elif saved["data_fingerprint"] != now["data_fingerprint"]', "    elif False"),),
        "tests/test_resume_worlds.py::test_a_change_is_refused_by_its_name_and_let_through_by_it[data]",
    ),
    Defect(
        "a base with weights that are not finite is trained",
        "sft/start_checks.py",
        (("    return bool(torch.isfinite(least) & torch.isfinite(most))\n", "    return True\n"),),
        "tests/test_start_checks.py::TestBase::test_finite_is_what_torch_calls_finite",
    ),
    Defect(
        "prepared arrays are not compared with their checksums",
        "sft/startup.py",
        (('[*(f"{problem}; {AGAIN}" for problem in damaged.result()), *problems]', "[*problems]"),),
        "tests/test_start_checks.py::TestAtOnce::test_one_message_tells_of_the_data_the_out_dir_and_the_base",
    ),
)

# what a resumed run has to have again, and what evaluations and signals must not touch
RESUMES = (
    Defect(
        "rows_seen is not saved",
        "sft/run.py",
        (
            (
                '            "rows_seen": self.rows_seen,\n            "order"',
                '            "rows_seen": 0,\n            "order"',
            ),
        ),
        "tests/test_two_parts.py::test_a_run_in_two_parts_ends_as_one_in_one_to_the_bit",
    ),
    Defect(
        "the order of rows comes from the number of steps",
        "sft/run.py",
        (("rows_seen=self.rows_seen, end=", "rows_seen=self.iter_num * self.loader.rows_per_step, end="),),
        "tests/test_two_parts.py::test_after_a_change_of_rows_per_step_the_next_rows_come_next",
    ),
    Defect(
        "the optimizer starts afresh after a resume",
        "sft/run.py",
        (('        restore_optimizer(self.optimizer, saved["optimizer"])\n', ""),),
        "tests/test_two_parts.py::test_a_run_in_two_parts_ends_as_one_in_one_to_the_bit",
    ),
    Defect(
        "the learning rate is off by one step after a resume",
        "train_sft.py",
        (
            ("    run.start()\n    if", "    run.start()\n    late = int(run.iter_num > 0)\n    if"),
            (
                "        learning_rate = learning_rate_at(\n            run.iter_num,\n",
                "        learning_rate = learning_rate_at(\n            run.iter_num + late,\n",
            ),
        ),
        "tests/test_two_parts.py::test_a_run_in_two_parts_ends_as_one_in_one_to_the_bit",
    ),
    Defect(
        "the dropout of a batch is drawn from whatever the generator has come to",
        "sft/step.py",
        (("            torch.manual_seed(batch.dropout_seed)\n", "            pass\n"),),
        "tests/test_step.py::test_dropout_depends_on_the_batch_seed_and_on_nothing_else",
    ),
    Defect(
        "dropout has the seed of the rank",
        "sft/batches.py",
        (
            (
                "            micro_batch = micro_step * self.world_size + self.rank\n",
                "            micro_batch = micro_step\n",
            ),
        ),
        "tests/test_batches.py::test_the_ranks_share_the_rows_of_a_step_and_each_keeps_its_dropout",
    ),
    Defect(
        "evaluation draws from the generator of training",
        "sft/evaluation.py",
        (
            (
                "        mine = self._share(world)\n        # loss sum",
                "        torch.rand(1)\n        mine = self._share(world)\n        # loss sum",
            ),
        ),
        "tests/test_evaluation.py::test_evaluation_leaves_the_generators_and_the_training_mode_alone",
    ),
    Defect(
        "evaluation leaves dropout off",
        "sft/evaluation.py",
        (
            (
                "        loss_module.train(was_training)\n        loss_sum, target_weight",
                "        loss_sum, target_weight",
            ),
        ),
        "tests/test_evaluation.py::test_evaluation_leaves_the_generators_and_the_training_mode_alone",
    ),
    Defect(
        "a signal is obeyed where it finds the process, and not between two steps",
        "sft/signals.py",
        (
            (
                "        self.received = self.received or signal.Signals(number)\n        # the listener",
                "        raise SystemExit(75)\n        # the listener",
            ),
        ),
        "tests/test_signals.py::test_a_signal_is_noted_and_the_handlers_are_put_back",
    ),
    Defect(
        "a validation loss that is no number is the best",
        "sft/run.py",
        (("self.iter_num > 0 and math.isfinite(result.loss) and is_better", "self.iter_num > 0 and is_better"),),
        "tests/test_train.py::test_a_validation_loss_that_is_no_number_is_never_the_best",
    ),
)

# what ranks compute, and agree upon
STEPS = (
    Defect(
        "the loss of a step is a mean of means",
        "sft/step.py",
        (
            (
                "    for batch, is_last in _with_last(batches):\n",
                "    batches = list(batches)\n    for batch, is_last in _with_last(batches):\n",
            ),
            (
                "                (loss * scale).backward()\n",
                "                (loss / batch.trained_tokens / len(batches)).backward()\n",
            ),
            ("loss_module(batch, grad_scale=scale)", "loss_module(batch)"),
        ),
        "tests/test_step.py::test_the_step_divides_by_its_trained_tokens_once_however_they_are_spread",
    ),
    Defect(
        "a rank divides by its own tokens",
        "sft/batches.py",
        (
            (
                "        target_weight = float(sum(self.samples.targets[row].sum() for row in rows))\n",
                "        mine = [row for share in self.shares(rows, self.rank) for row in share]\n"
                "        target_weight = self.world_size * float(sum(self.samples.targets[r].sum() for r in mine))\n",
            ),
        ),
        "tests/test_batches.py::test_the_ranks_share_the_rows_of_a_step_and_each_keeps_its_dropout",
    ),
    Defect(
        "rows that fill up a step are repeated ones",
        "sft/batches.py",
        (
            (
                "*([] for _ in range(self.batch_size - len(share)))",
                "*(read_row(self.samples, rows[0]) for _ in range(self.batch_size - len(share)))",
            ),
        ),
        "tests/test_train.py::test_empty_rows_that_fill_up_a_step_change_nothing",
    ),
    Defect(
        "each rank decides alone whether its loss is finite",
        "sft/step_facts.py",
        (("        joined = world.sum(own)\n", "        joined = own\n"),),
        "tests/test_step_agreement.py::test_all_ranks_skip_where_the_loss_of_one_is_not_finite_and_all_know_whose",
    ),
    Defect(
        "a rank that is asked to stop tells nobody",
        "sft/step_facts.py",
        (("        own[1].fill_(float(stop))\n", ""),),
        "tests/test_step_agreement.py::test_all_ranks_stop_after_the_step_in_which_one_is_asked_to",
    ),
    Defect(
        "a loss that is not finite moves weights and moments",
        "sft/step.py",
        (("        optimizer.found_inf = judgement.skips.float()", "        optimizer.found_inf = torch.zeros(())"),),
        "tests/test_step_facts.py::test_a_step_that_is_not_finite_moves_no_bit_of_weights_and_moments",
    ),
    Defect(
        "a gradient that is not finite is made zero, and the moments decay",
        "sft/step.py",
        (
            (
                "        optimizer.found_inf = judgement.skips.float()",
                "        [p.grad.nan_to_num_(0, 0, 0) for p in parameters]\n"
                "        optimizer.found_inf = torch.zeros(())",
            ),
        ),
        "tests/test_step_facts.py::test_a_gradient_that_is_not_finite_beside_a_finite_loss_is_skipped_too",
    ),
    Defect(
        "the loss alone is asked whether it is finite",
        "sft/step_facts.py",
        (
            (
                "        is_finite = torch.isfinite(loss) & torch.isfinite(norm)\n",
                "        is_finite = torch.isfinite(loss)\n",
            ),
        ),
        "tests/test_step_facts.py::test_a_gradient_that_is_not_finite_beside_a_finite_loss_is_skipped_too",
    ),
    Defect(
        "a run goes on however many steps it skips",
        "sft/step_watch.py",
        (("            if self.skipped_in_a_row >= self.max_skipped_steps:\n", "            if False:\n"),),
        "tests/test_step_facts.py::test_a_run_gives_up_after_so_many_skipped_steps_in_a_row",
    ),
    Defect(
        "skipped steps are not counted over a resume",
        "sft/step_watch.py",
        (
            (
                '        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]\n',
                '        self.skipped = state["skipped"]\n',
            ),
        ),
        "tests/test_step_facts.py::test_skipped_steps_in_a_row_are_counted_over_a_resume",
    ),
)

DEFECTS = (*SAVES, *STARTS, *RESUMES, *STEPS)
