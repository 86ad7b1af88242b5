"""The command line: one file for each subcommand, with its options as a dataclass and a `run` that takes them."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from typing import Any

from .. import __version__
from .console import is_main_process

COMMANDS = {
    "demo": ("Demo", "train a one-step student of the bundled teacher in five minutes, and compare the two"),
    "train": ("Train", "train a one-step student of a teacher of yours, by one of several methods"),
    "sample": ("Sample", "make pictures from prompts"),
    "eval": ("Eval", "measure a model: the tutorial's figures, or FID, KID and CLIP score"),
    "bench": ("Bench", "measure how long a model takes: latency, throughput, part by part"),
    "export": ("Export", "write a student in the form that another program opens"),
    "quantize": ("QuantizeFile", "make a 4-bit file of a model"),
    "info": ("Info", "show what a file says about itself"),
    "recipes": ("Recipes", "show how public few-step models are called"),
}
"""Subcommand, which is its module here, -> its options' class and what it does."""


def usage() -> str:
    lines = ["usage: distill COMMAND [options]; distill COMMAND --help tells them", ""]
    lines += [f"  {name:<9} {does}" for name, (_, does) in COMMANDS.items()]
    return "\n".join([*lines, "", "  --version, --help"])


def parse(words: Sequence[str]) -> tuple[Callable[[Any], Any], Any]:
    """The words behind `distill` -> a command's `run` and its options. Raises SystemExit where they are help or wrong,
    ValueError for an option that cannot be. Only the command that is asked for is imported."""
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        raise SystemExit(0)
    if words[0] == "--version":
        print(f"distill {__version__}")
        raise SystemExit(0)
    name, *rest = words
    if name not in COMMANDS:
        raise ValueError(f"{name!r} is no command; there are {', '.join(COMMANDS)}")
    if os.environ.get("NO_COLOR"):  # tyro does not heed it but this, read at its import
        os.environ["PYTHON_TYRO_ANSI_CODES"] = "False"
    import tyro

    module = import_module(f".{name}", __name__)
    options = getattr(module, COMMANDS[name][0])
    refused = StringIO()
    try:
        with redirect_stderr(refused):
            found = tyro.cli(options, prog=f"distill {name}", args=rest, description=options.__doc__)
    except SystemExit as e:
        if e.code:
            raise ValueError(unboxed(refused.getvalue())) from None
        raise
    sys.stderr.write(refused.getvalue())  # what imports had to say
    return module.run, found


def unboxed(box: str) -> str:
    """What tyro draws a box around as one line: its first paragraph, and what it offers instead."""
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]]  # below the title
    ruled = "\n".join(line if line.strip("─-╰╯") else "" for line in lines).strip("\n")
    said, _, more = ruled.partition("\n\n")
    said = " ".join(said.split()).rstrip(".")
    if meant := re.search(r"Perhaps you meant:\s+(--[\w.-]+)", more):
        return f"{said}; did you mean {meant[1]}?"
    there = re.search(r"Available subcommands: (.+)", more)
    return f"{said}; there are {there[1].strip()}" if there else f"{said}; --help tells what there is"


class Terminated(KeyboardInterrupt):
    """SIGTERM, or SIGHUP of a terminal that was closed, handled as Ctrl-C is: what runs saves and ends."""


def _terminate(signum: int, frame: Any) -> None:
    raise Terminated(signum)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command. What a user can mend is told in one line, without a traceback.

    Returns the exit code: 0; 1 for a run that failed on its way; 2 for arguments, files and data that cannot be; 130
    for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP, 141 where nobody reads on. `--help` leaves by SystemExit. Of the
    processes that torchrun started only the first prints to stdout.
    """
    old = {}
    try:
        for end in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # Windows has no SIGHUP
            if signal.getsignal(end) != signal.SIG_IGN:  # nohup has it ignored, and means it
                old[end] = signal.signal(end, _terminate)
    except ValueError:  # not in the main thread: the program around has its own
        pass
    try:
        with ExitStack() as quiet:
            if not is_main_process():
                quiet.enter_context(redirect_stdout(quiet.enter_context(open(os.devnull, "w"))))
            run, options = parse(sys.argv[1:] if words is None else words)
            run(options)
            sys.stdout.flush()
        return 0
    except Terminated as e:
        return 128 + e.args[0]
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `distill info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        said = explain(error)
        if said is None:
            raise
        code, line = said
        print("distill: " + " ".join(line.splitlines()), file=sys.stderr)
        return code
    finally:
        for end, handler in old.items():
            signal.signal(end, handler)


NAMED = FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError
"""The errors of a file system that come of what a user named; the others come of the machine, as a full disk's."""
MEMORY = "out of memory: take fewer at once (--batch-size, prompts), a smaller model, or another --device"


def explain(error: Exception) -> tuple[int, str] | None:
    """(exit code, what to say) of an error that a user can mend; None for one of ours, which needs its traceback."""
    kind, text = type(error).__name__, str(error)
    if isinstance(error, ImportError):
        if (error.name or "").partition(".")[0] == __name__.partition(".")[0]:
            return None
        return 2, text if "pip install" in text else f"{text}: pip install 'onestep[distill]'"
    if isinstance(error, OSError):
        said = f"{error.filename or 'writing'}: {error.strerror.lower()}" if error.strerror else text
        return (2 if isinstance(error, NAMED) else 1), said
    if isinstance(error, ValueError):
        return 2, text
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        return 1, MEMORY
    return (1, text) if kind == "Diverged" else None  # by name, as `--help` does not import torch
