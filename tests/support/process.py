"""Running Python code in a process of its own: a new one, or a fork of a server that has imported llm_ext."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

# The server has called no op, so its forks have no threads and no cached memory.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["llm_ext.cli.commands.parser", "lightning_fabric", "matplotlib.figure", "support.cli_process"]
)


def run_python(
    code: str, *arguments: object, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` with sys.argv[1:] = arguments; the caller checks the return code."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def check_python(code: str, *arguments: object, timeout: float = 120, **environment: str) -> str:
    """Run `code`, require success, and return what it printed."""
    done = run_python(code, *arguments, timeout=timeout, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_fork(code: str, *arguments: object, timeout: float = 120) -> str:
    """Run `code` as check_python does, but in a fork, which starts faster and skips the exit of the interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [os.devnull, str(Path(folder, "stdout")), str(Path(folder, "stderr"))]
        process = CONTEXT.Process(target=_execute, args=(code, [*map(str, arguments)], streams))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"the code did not end in {timeout} seconds")
        assert process.exitcode == 0, Path(streams[2]).read_text()
        return Path(streams[1]).read_text()


def run_ranks(count: int, function: Callable[..., object], *arguments: object, timeout: float = 60) -> None:
    """Call `function(rank, *arguments)` in `count` forks at the same time."""
    processes = [CONTEXT.Process(target=function, args=(rank, *arguments)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * count


def redirect(streams: Sequence[str]) -> None:
    """Let the standard streams be files, in a process that was forked."""
    flags = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)
    for descriptor, (path, flag) in enumerate(zip(streams, flags, strict=True)):
        os.dup2(os.open(path, flag, 0o666), descriptor)
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, mode, closefd=False), write_through=mode == "w")
        for number, mode in enumerate("rww")
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _execute(code: str, arguments: list[str], streams: list[str]) -> None:
    redirect(streams)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})
