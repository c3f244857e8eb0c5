"""The command `splitkern`: arguments, and errors as one line.

The package itself imports torch, before this module is reached; what else is heavy is imported inside the subcommands.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from splitkern.cli.common import UserError

_COMMANDS = {
    "train": "train an image classifier as a Split-CNN, and measure what that saves",
    "plan": "plan the memory of a training step: what stays, what is offloaded or recomputed, where it all lies",
    "doctor": "what this machine has, and which kernels splitkern uses on it",
    "bench": "measure networks against the unsplit ones, and kernels against PyTorch's",
}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in arguments if not word.startswith("-")), None)
    name = "splitkern" if command is None else f"splitkern {command}"
    try:
        code = _run(arguments, command)
        _flush()  # here, because errors at exit are beyond reach
        return code
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt as error:
        print(f"\nsplitkern: interrupted{f'; {error}' if str(error) else ''}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of the output went away (| head)
        _discard_output()
        return 1
    except OSError as error:
        text = " ".join(str(error).split())
        try:
            _flush()
        except OSError as unwritten:
            _discard_output()
            text = f"standard output cannot be written: {unwritten.strerror}"
        print(f"{name}: error: {text}", file=sys.stderr)
        return EXIT_USER_ERROR


def _run(arguments: Sequence[str], command: str | None) -> int:
    parser = argparse.ArgumentParser(prog="splitkern", description="Train CNNs as Split-CNNs, in less memory.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    try:
        for name, text in _COMMANDS.items():
            subparser = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
            if name == command:
                import_module(f"splitkern.cli.{name}").add_arguments(subparser)
        options = parser.parse_args(arguments)
        if options.version:
            from splitkern import __version__

            print(f"splitkern {__version__}")
            return 0
        if options.command is None:
            parser.print_help()
            return 0
        return int(import_module(f"splitkern.cli.{options.command}").run(options))
    except SystemExit as error:  # argparse has printed its message or the help
        return error.code if isinstance(error.code, int) else EXIT_USER_ERROR


def _flush() -> None:
    if sys.stdout is not None:  # as it is where the shell closed it
        sys.stdout.flush()


def _discard_output() -> None:
    """Leads stdout to nowhere: Python would try to write what is left in it, and complain again, at exit."""
    with suppress(io.UnsupportedOperation):
        output = sys.stdout.fileno()
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, output)
        os.close(descriptor)
