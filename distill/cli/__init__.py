"""The command line: one file for each subcommand, with its options as a dataclass and a `run` that takes them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from .. import __version__

COMMANDS = {
    "demo": ("Demo", "train a one-step student of the bundled teacher in five minutes, and compare the two"),
    "train": ("Train", "train a one-step student of a teacher of yours, by one of several methods"),
    "sample": ("Sample", "make pictures from prompts"),
    "eval": ("Eval", "measure a model of the tutorial world"),
    "quantize": ("QuantizeFile", "make a 4-bit file of a model"),
    "info": ("Info", "show what a file says about itself"),
}
"""Subcommand, which is its module here, -> its options' class and what it does."""


def usage() -> str:
    lines = ["usage: distill COMMAND [options]; distill COMMAND --help tells them", ""]
    lines += [f"  {name:<9} {does}" for name, (_, does) in COMMANDS.items()]
    return "\n".join([*lines, "", "  --version, --help"])


def parse(words: Sequence[str]) -> tuple[Callable[[Any], Any], Any]:
    """The words behind `distill` -> a command's `run` and its options. Raises SystemExit where they are help or wrong,
    ValueError for an option that cannot be."""
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        raise SystemExit(0)
    if words[0] == "--version":
        print(f"distill {__version__}")
        raise SystemExit(0)
    name, *rest = words
    if name not in COMMANDS:
        raise ValueError(f"{name!r} is no command; there are {', '.join(COMMANDS)}")
    try:
        import tyro
        from tyro import _settings  # its one switch for colours
    except ImportError:
        raise ValueError("the command line needs more packages: pip install 'onestep[distill]'") from None
    if os.environ.get("NO_COLOR"):
        _settings._experimental_options["ansi_codes"] = False
    module = import_module(f".{name}", __name__)
    options = getattr(module, COMMANDS[name][0])
    return module.run, tyro.cli(options, prog=f"distill {name}", args=rest, description=options.__doc__)


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is: what runs saves and ends."""


def _terminate(signum: int, frame: Any) -> None:
    raise Terminated


def main(words: Sequence[str] | None = None) -> int:
    """Run one command. What a user can mend is told in one line, without a traceback.

    Returns the exit code: 0, 1 for a run that failed, 2 for arguments, files and data that cannot be, 130 for Ctrl-C,
    143 for SIGTERM. `--help` and what tyro refuses leave by SystemExit.
    """
    try:
        old = signal.signal(signal.SIGTERM, _terminate)
    except ValueError:  # not in the main thread: the program around has its own
        old = None
    try:
        run, options = parse(sys.argv[1:] if words is None else words)
        run(options)
        sys.stdout.flush()
        return 0
    except Terminated:
        return 143
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `distill info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        return _failed(error, 2)
    except RuntimeError as error:
        if type(error).__name__ != "Diverged":
            raise
        return _failed(error, 1)
    finally:
        if old is not None:
            signal.signal(signal.SIGTERM, old)


def _failed(error: Exception, code: int) -> int:
    if isinstance(error, ImportError) and error.name in ("distill", None):
        raise error  # ours, not a missing package
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'writing'}: {error.strerror.lower()}"
    if isinstance(error, ImportError):
        text = f"{error}: pip install 'onestep[distill]'" if "pip install" not in text else text
    print(f"distill: {text}", file=sys.stderr)
    return code
