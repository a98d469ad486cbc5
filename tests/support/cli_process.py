"""`llm-ext` in processes of its own that start fast: forks of a server process that has imported llm_ext."""

from __future__ import annotations

import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from llm_ext.cli import main
from support.process import CONTEXT, redirect


class CommandProcess:
    """A running `llm-ext`.

    Args:
        arguments: the command line.
        folder: directory for its standard streams.
        stdin: file that it reads, possibly a FIFO.
        stdout: file that it writes, possibly a FIFO; by default a file in `folder`.
        environment: environment variables to set.
        closed: numbers of the standard streams to close.
    """

    def __init__(
        self,
        arguments: list[object],
        folder: Path,
        *,
        stdin: str | Path = os.devnull,
        stdout: Path | None = None,
        environment: dict[str, str] | None = None,
        closed: Sequence[int] = (),
    ) -> None:
        number = len(list(folder.glob("stderr.*")))
        self._stdout, self._stderr = stdout or folder / f"stdout.{number}", folder / f"stderr.{number}"
        self._stderr.touch()
        streams = [str(path) for path in (stdin, self._stdout, self._stderr)]
        self._process = CONTEXT.Process(
            target=_run, args=([str(argument) for argument in arguments], streams, environment or {}, closed)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(60)

    def ends_within(self, seconds: float) -> bool:
        """Wait; return whether the process has ended by itself."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    def wait(self) -> tuple[int, str, str]:
        """Wait for the end; return exit code, standard output (empty for a FIFO) and standard error."""
        self._process.join(120)
        code = self._process.exitcode
        if code is None:
            self.kill()
            raise TimeoutError("llm-ext did not end in 120 seconds")
        return code, self._stdout.read_text() if self._stdout.is_file() else "", self._stderr.read_text()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition, which must hold before the process ends."""
        deadline = time.monotonic() + 60
        while not condition():
            assert self._process.exitcode is None, self.wait()
            assert time.monotonic() < deadline, "nothing happened in a minute"
            time.sleep(0.005)


def _run(arguments: list[str], streams: list[str], environment: dict[str, str], closed: Sequence[int]) -> None:
    redirect(streams)
    for number in closed:  # as Python begins where a stream is closed
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
        os.close(number)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(main(arguments))


def torchrun_environments(count: int) -> list[dict[str, str]]:
    """The environments that torchrun gives to `count` processes of this machine."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    shared = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def peak_memory(function: Callable[..., object], *arguments: object) -> int:
    """Run a function in a process of its own; return the peak memory of the process in MiB."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_measure, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        peak = receiver.recv()
    except EOFError:
        raise AssertionError(f"{function.__name__} failed") from None
    process.join()
    assert isinstance(peak, int)
    return peak


def _measure(sender: Connection, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    function(*arguments)
    sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
