"""Errors that people read: one message with culprit, place and remedy, never a traceback."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Sequence

EXIT_FAILED = 1  # the run broke; the same command may succeed later
EXIT_BAD_INPUT = 2  # settings, data or files are wrong; repeating the command repeats the refusal
EXIT_DIVERGED = 3  # too many steps in a row were not finite; repeating the command repeats them
EXIT_HUNG = 4  # a rank got no further for hang_timeout; the same command with --resume=auto goes on
EXIT_PREEMPTED = 75  # stopped by a signal and saved; the same command with --resume=auto goes on
EXIT_INTERRUPTED = 130  # stopped at once by a second Ctrl-C; what came after the last checkpoint is lost

FIRST_SPEAKS_WITHIN_SECONDS = 10.0


class UserError(Exception):
    """Something the person at the keyboard can put right; str(error) is the whole message."""

    def __init__(self, message: str, *, exit_status: int = EXIT_BAD_INPUT):
        super().__init__(message)
        self.exit_status = exit_status


class Preempted(Exception):
    """A signal asked the run to stop, and it has stopped in order, with a checkpoint; str(error) says so."""


def listed(headline: str, problems: Sequence[str]) -> UserError:
    """One UserError that lists every problem below a headline, so that all are fixed in one go."""
    return UserError("\n".join([headline, *(f"  {problem}" for problem in problems)]))


def run_program(main: Callable[[list[str]], None]) -> None:
    """Run main(argv) as a command: exit status 0 only if that returns; a UserError becomes one message on stderr.

    Of the processes that torchrun starts on a machine, the first one speaks. The others wait to be ended by torchrun,
    which does so as soon as one process has left; a process that is still there had the error alone, and speaks too.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    status = 0
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show must not fail work that is done
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except UserError as error:
        if not is_first:
            time.sleep(FIRST_SPEAKS_WITHIN_SECONDS)
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = error.exit_status
    except Preempted as stop:
        if is_first:
            print(stop, file=sys.stderr, flush=True)
        status = EXIT_PREEMPTED
    except BrokenPipeError:  # who reads our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_FAILED
    except OSError as error:  # the machine's refusal, which names what it refused
        print(
            f"error: {error.filename or 'the operating system'}: {error.strerror or error}", file=sys.stderr, flush=True
        )
        status = EXIT_FAILED
    except KeyboardInterrupt:
        if is_first:
            print("interrupted", file=sys.stderr, flush=True)
        status = EXIT_INTERRUPTED
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A thread of the process group that still wants the interpreter while it shuts down would abort the process
        # and make a finished run a failed one. All files are closed: leave without shutting down.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
