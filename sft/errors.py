"""Errors that people read: one message with culprit, place and remedy, never a traceback."""

from __future__ import annotations

import contextlib
import errno
import io
import json
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

MAY_PASS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENFILE, errno.EMFILE, errno.ESTALE)  # what a disk says

FIRST_SPEAKS_WITHIN_SECONDS = 10.0
FIRST_SPEAKS_SOON_SECONDS = 1.0  # where all ranks end in order, and torchrun may be waiting for the last one


class UserError(Exception):
    """Something the person at the keyboard can put right; str(error) is the whole message."""

    def __init__(self, message: str, *, exit_status: int = EXIT_BAD_INPUT):
        super().__init__(message)
        self.exit_status = exit_status


class Preempted(Exception):
    """A signal asked the run to stop, and it has stopped in order, with a checkpoint; str(error) says so."""


class PeerLost(Exception):
    """Another rank has gone, and this one cannot go on; it was said where, and why if that is known."""


def status_of(error: OSError) -> int:
    """The exit status of a refusal by the machine: whether the same command may succeed later."""
    return EXIT_FAILED if error.errno in MAY_PASS else EXIT_BAD_INPUT


def listed(headline: str, problems: Sequence[str]) -> UserError:
    """One UserError that lists every problem below a headline, so that all are fixed in one go."""
    return UserError("\n".join([headline, *(f"  {problem}" for problem in problems)]))


def run_program(main: Callable[[list[str]], None]) -> None:
    """Run main(argv) as a command: exit status 0 only if that returns; what it raises is told on stderr.

    A mistake of the programmer keeps its traceback, and names the rank and the step where the error knows its `place`.
    """
    status = 0
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show must not fail work that is done
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        status = tell(error, is_first=os.environ.get("LOCAL_RANK", "0") == "0")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A thread of the process group that still wants the interpreter while it shuts down would abort the process
        # and make a finished run a failed one. All files are closed: leave without shutting down.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def tell(error: BaseException, *, is_first: bool) -> int:
    """Say on stderr what has ended the program, and return its exit status.

    Of the processes that torchrun starts on a machine, the first one speaks. The others wait to be ended by torchrun,
    which does so as soon as one process has left; a process that is still there had the error alone, and speaks too.
    """
    place = error.__dict__.get("place")
    if isinstance(error, UserError):
        if not is_first:
            time.sleep(FIRST_SPEAKS_WITHIN_SECONDS)
        say(f"error: {error}")
        return error.exit_status
    if isinstance(error, (Preempted, KeyboardInterrupt)):
        if is_first:
            say(str(error) or "interrupted")
        else:
            time.sleep(FIRST_SPEAKS_SOON_SECONDS)
        return EXIT_PREEMPTED if isinstance(error, Preempted) else EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError):  # who reads our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif isinstance(error, OSError):  # the machine's refusal, which names what it refused
        refusal = f"{error.filename or 'the operating system'}: {error.strerror or error}"
        say(f"error: {f'{place}: ' if place else ''}{refusal}")
    elif place is None:
        raise error
    elif not isinstance(error, PeerLost):  # that was said when it was found
        sys.excepthook(type(error), error, error.__traceback__)  # PyTorch's begins each line with the rank
        cause = f"{place}: {type(error).__name__}: {error}"
        say(f"error: {cause}")
        tell_torchrun(cause)
    return EXIT_FAILED


def say(text: str) -> None:
    print(harmless(text), file=sys.stderr, flush=True)


def harmless(text: str) -> str:
    """The text with all spelled out that could steer a terminal, as names from a file could; line ends stay."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)


def tell_torchrun(cause: str) -> None:
    """Name what ends this process in torchrun's closing report, which takes the earliest cause for the first."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": cause, "timestamp": str(int(time.time()))}  # the names are torchrun's
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": cause, "extraInfo": details}}, file)
