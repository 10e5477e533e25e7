"""train_sft.py, killed right after it has saved the step given first: run under torchrun by test_train.py."""

import os
import signal
import sys

import train_sft
from sft.run import Run


def main(argv: list[str]) -> None:
    last_step = int(argv[0])
    save = Run.save

    def save_and_die(run: Run, **options: bool) -> None:
        save(run, **options)
        if run.iter_num == last_step:
            run.world.agree("steps", str(run.iter_num))  # every rank has left the save
            os.kill(os.getpid(), signal.SIGKILL)

    Run.save = save_and_die  # type: ignore[method-assign]
    train_sft.main(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
