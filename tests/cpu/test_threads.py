"""The threads of a call: any number, from anywhere, without deadlock. What could hang runs in its own process."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.devices import num_threads
from support.process import check_fork, check_python

import llm_ext

TIMEOUT = 120  # seconds

SETUP = """
import os, threading
import torch, llm_ext
torch.manual_seed(0)
layers = [llm_ext.RNN(16, 128), llm_ext.GRU(16, 96), llm_ext.LSTM(16, 128, proj_size=40)]
# Partitioned by rows, by columns (one row, and rows of unequal lengths), and few steps.
inputs = [torch.randn(30, 16, 16), torch.randn(60, 1, 16), torch.randn(2, 3, 16)]
lengths = torch.tensor([30, 22, 9, 9, 4])
inputs.append(torch.nn.utils.rnn.pack_padded_sequence(torch.randn(30, 5, 16), lengths))

def run():
    results = []
    for layer in layers:
        for x in inputs:
            y = layer(x)[0]
            y = y.data if isinstance(y, torch.nn.utils.rnn.PackedSequence) else y
            gradients = torch.autograd.grad(y.sum(), list(layer.parameters()))
            results += [y.detach(), *gradients]
    return results

def check(results, expected):
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)

torch.set_num_threads(1)
expected = run()
"""


def run_code(code: str, run: Callable[..., str] = check_fork) -> None:
    assert run(SETUP + code + "\nprint('done')", timeout=TIMEOUT) == "done\n"


def test_number_changes_between_calls() -> None:
    """In a new process, so that the end of an interpreter with threads is tested, too."""
    run_code(
        """
for threads in (2, 8, 1, 3, 16, 2, 1, 5):
    torch.set_num_threads(threads)
    check(run(), expected)
""",
        check_python,
    )


def test_more_threads_than_cores() -> None:
    """Sixteen threads on one core, as under a quota: a thread team has no more threads than there are cores."""
    run_code(
        """
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
torch.set_num_threads(16)
check(run(), expected)
"""
    )


def test_fewer_threads_than_asked_for() -> None:
    """A thread team has as many threads as OpenMP gives, and waits for no other."""
    limit = "import os\nos.environ['OMP_THREAD_LIMIT'] = '1'\n"
    code = "\ntorch.set_num_threads(4)\ncheck(run(), expected)\nprint('done')"
    assert check_python(limit + SETUP + code, timeout=TIMEOUT) == "done\n"


def test_calls_from_several_threads() -> None:
    """Together the calls have more threads than there are cores: threads that wait yield to the others."""
    run_code(
        """
torch.set_num_threads(3)
failures = []

def call(i):
    try:
        if i % 2:
            torch.set_num_threads(1 + i)
        for _ in range(5):
            check(run(), expected)
    except Exception as failure:
        failures.append(failure)

threads = [threading.Thread(target=call, args=(i,)) for i in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
if failures:
    raise failures[0]
"""
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_process() -> None:
    """It has none of the parent's threads, and begins with one for llm_ext and torch; the parent goes on with all."""
    run_code(
        """
torch.set_num_threads(4)
check(run(), expected)
# Both directions at once, and layers as a wavefront, have teams of their own.
small = [llm_ext.GRU(16, 96, 3, bidirectional=both) for both in (False, True)]
x = torch.randn(200, 1, 16)
with torch.no_grad():
    before = [layer(x)[0] for layer in small]
child = os.fork()
assert torch.get_num_threads() == (4 if child else 1)
check(run(), expected)
with torch.no_grad():
    check([layer(x)[0] for layer in small], before)
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    )


def test_workers_of_a_data_loader() -> None:
    """Forked while the parent's threads exist."""
    run_code(
        """
torch.set_num_threads(4)
check(run(), expected)

class Results(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return [result.clone() for result in run()]

loader = torch.utils.data.DataLoader(
    Results(), batch_size=None, num_workers=2, multiprocessing_context="fork" if os.name == "posix" else None
)
for results in loader:
    check(results, expected)
check(run(), expected)
"""
    )


def test_one_thread_stays_in_the_caller() -> None:
    """With one thread, no other thread of the process is busy."""
    run_code(
        """
import time
layer = llm_ext.LSTM(64, 256)
x = torch.randn(200, 16, 64)
with torch.no_grad():
    layer(x)
    cpu, own = time.process_time(), time.thread_time()
    for _ in range(10):
        layer(x)
assert time.process_time() - cpu < 1.2 * (time.thread_time() - own) + 0.01
"""
    )


@pytest.mark.parametrize("threads", [2, 3])
def test_call_within_a_call(threads: int) -> None:
    """From a hook in autograd's own threads, beside calls of the main thread."""
    with num_threads(threads):
        layer = llm_ext.GRU(8, 64)
        x = torch.randn(40, 8, 8, requires_grad=True)
        inner: list[torch.Tensor] = []
        y = layer(x)[0]
        y.register_hook(lambda grad: inner.append(layer(x.detach())[0].detach()))
        thread = threading.Thread(target=lambda: y.sum().backward())
        thread.start()
        outer = layer(x.detach())[0].detach()
        thread.join(TIMEOUT)
        assert not thread.is_alive()
        assert torch.equal(inner[0], outer)


QUOTA = """
#include <cstdio>
#include "torch/threads/usable_cores.h"
int main(int, char** arguments) { std::printf("%d", llm_ext::smallest_quota(arguments[1], arguments[2])); }
"""


def test_quota_of_a_control_group(tmp_path: Path) -> None:
    """The smallest from the group of the process up to the root, in both versions of control groups."""
    source, program = tmp_path / "quota.cpp", tmp_path / "quota"
    source.write_text(QUOTA)
    csrc = Path(__file__).parents[2] / "csrc"
    usable_cores = csrc / "torch" / "threads" / "usable_cores.cpp"
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-std=c++17", f"-I{csrc}", source, usable_cores, "-o", program], check=True)

    def quota(groups: str, **limits: str) -> int:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in limits.items():
            folder = root / name.replace("_", "/")
            folder.mkdir(parents=True)
            if "cpu" in name.split("_"):
                (folder / "cpu.cfs_quota_us").write_text(text)
                (folder / "cpu.cfs_period_us").write_text("100000")
            else:
                (folder / "cpu.max").write_text(text)
        own = tmp_path / "own"
        own.write_text(groups)
        return int(subprocess.check_output([program, root, own], text=True))

    first = "12:memory:/x\n4:cpuacct,cpu:/a/b\n1:name=systemd:/\n"
    assert quota(first, cpu="-1", cpu_a="-1", cpu_a_b="150000") == 2
    assert quota(first, cpu="-1", cpu_a="100000", cpu_a_b="400000") == 1
    assert quota(first, cpu_a_b="-1") == 0
    assert quota("4:cpu:/of/the/host\n", cpu="300000") == 3  # in a container, which sees its own group as the root
    assert quota("4:cpuset:/\n3:cpuacct:/\n", cpu="300000") == 0
    second = "0::/a/b\n"
    assert quota(second, a="max 100000", a_b="250000 100000") == 3
    assert quota(second, a="100000 100000", a_b="250000 100000") == 1
    assert quota("0::/\n") == 0
