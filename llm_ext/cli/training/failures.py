"""The failure of one of several processes ends all of them, with one message."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from datetime import timedelta
from types import TracebackType

from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.parallel import ParallelStrategy
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from llm_ext.cli.errors import CommandError

__all__ = ["Failures"]

# Seconds between two looks at the store; and after which a process ends that does not report the failure, so that
# torchrun, which then ends the others, finds it reported.
INTERVAL, DELAY = 0.2, 1.0


class Failures:
    """Context manager of one process of a training: lets its exception pass if no other process has failed before.

    Otherwise the process exits without a message. A process that waits for one that failed, in a collective operation,
    does not notice it on all backends, so a thread looks for failures of others.

    Args:
        alone: The training has this process only, whatever others torchrun has started.
    """

    def __init__(self, alone: bool = False) -> None:
        # Before the processes are connected all of them find the same errors, and the first one reports them.
        self._rank = 0 if alone or not TorchElasticEnvironment.detect() else TorchElasticEnvironment().global_rank()
        self._size = 1
        self._store: TCPStore | None = None
        # Keys of the store: number of processes that failed by themselves, and of the others that know of it.
        self._failed = self._told = ""
        self._ended = threading.Event()

    def watch(self, fabric: Fabric) -> None:
        """Look for failures of the other processes from now on."""
        self._rank, self._size = fabric.global_rank, fabric.world_size
        strategy = fabric.strategy
        if self._size == 1 or not isinstance(strategy, ParallelStrategy):
            return
        environment = strategy.cluster_environment
        assert environment is not None
        # A connection of its own to the store with which torch.distributed has started.
        self._store = TCPStore(
            environment.main_address, environment.main_port, is_master=False, timeout=timedelta(seconds=30)
        )
        # Keys of this start, because torchrun keeps its store when it starts processes again.
        self._failed, self._told = fabric.broadcast([f"llm_ext/{key}/{time.time_ns()}" for key in ("failed", "told")])
        threading.Thread(target=self._look, daemon=True).start()

    def __enter__(self) -> Failures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if not isinstance(error, (Exception, KeyboardInterrupt)):
            return
        if not self._is_first():
            self._leave()
            raise SystemExit(1) from error
        if self._rank == 0:
            self._keep_store()
        if self._store is not None and isinstance(error, RuntimeError) and "gloo" in str(error):
            raise CommandError("another process has ended; the last checkpoint, if there is one, is kept") from error

    def _is_first(self) -> bool:
        """Announce that this process has failed; return whether it reports the failure."""
        if self._store is None:
            return self._rank == 0
        try:
            return self._store.add(self._failed, 1) == 1
        except RuntimeError:
            return True  # the first process, which has the store, was killed

    def _look(self) -> None:
        """Exit when another process has failed."""
        assert self._store is not None
        while not self._ended.wait(INTERVAL):
            try:
                failed = self._store.check([self._failed])
            except RuntimeError:
                return
            # A process that is about to notice by itself comes first.
            if failed and not self._ended.wait(INTERVAL):
                self._leave()
                os._exit(1)

    def _leave(self) -> None:
        """Prepare to exit without a message."""
        if self._rank == 0:
            self._keep_store()
        elif self._store is not None:
            with contextlib.suppress(RuntimeError):  # the first process has ended already
                self._store.add(self._told, 1)
        time.sleep(DELAY)

    def _keep_store(self) -> None:
        """Let the others learn of the failure before the store ends with this process."""
        deadline = time.monotonic() + 2 * DELAY
        while self._store is not None and time.monotonic() < deadline:
            if self._store.add(self._told, 0) >= self._size - 1:
                return
            time.sleep(INTERVAL / 4)
