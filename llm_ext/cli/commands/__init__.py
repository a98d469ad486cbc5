"""The commands of `llm-ext`: parse, run, exit codes."""

from __future__ import annotations

import errno
import io
import re
import signal
import sys
from collections.abc import Sequence

from llm_ext.cli.errors import CommandError
from llm_ext.cli.streams import drop_output, open_closed_streams, output_fails, warn

__all__ = ["main"]

# Packages of the extra `cli`, and of others with the names of those to install.
CLI = (
    "filelock",
    "lightning_fabric",
    "matplotlib",
    "numpy",
    "rouge_score",
    "sacrebleu",
    "safetensors",
    "tokenizers",
    "tomli",
    "tqdm",
)
DATA = ("av", "jiwer", "librosa", "PIL", "soundfile")
# torch reports a lack of memory as a RuntimeError.
NO_MEMORY = re.compile("not enough memory|t allocate memory|out of memory", re.IGNORECASE)
EXTRAS = (
    dict.fromkeys(CLI, "cli")
    | dict.fromkeys(DATA, "cli,data")
    | {"opacus": "cli,privacy", "optuna": "cli,tune", "transformers": "cli,hf"}
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Arguments without the name of the program; by default those of this process.

    Returns:
        The exit code: 0 success; 1 failure, with a message on standard error; 128 + the number of a signal, 130 for
        Ctrl-C and 143 for SIGTERM (a training has saved a checkpoint). A wrong command line exits the process with 2.
    """
    open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Text is UTF-8 whatever the locale says, and a token that cannot be printed must not end the output.
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        # Imported here to report a missing package of the extra.
        from llm_ext.cli.commands.parser import parse

        options = parse(arguments)
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader of the output has closed it.
        drop_output()
        return 0
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _fail(f"{error.name} is not installed: pip install 'llm_ext[{extra}]'")
    except CommandError as error:
        return _fail(str(error))
    except OSError as error:
        name = error.filename or "file"
        if error.filename is None and (error.errno == errno.ENOSPC or output_fails()):
            name = "standard output"  # errors of files have their names
            drop_output()
        return _fail(f"{name}: {error.strerror or error}")
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
            return _fail("not enough memory; try a smaller model, a smaller --batch, or a shorter text")
        if "--traceback" in (sys.argv if arguments is None else arguments):
            raise
        return _fail(f"{type(error).__name__}: {error} (--traceback shows where)")


def _fail(message: str, code: int = 1) -> int:
    warn(message)
    return code
