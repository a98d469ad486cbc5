"""`make gpu`: build, test and measure on a machine with a GPU that may be taken away at any moment.

The most important comes first, and everything is in a file as soon as it is known: `log.txt` has all output,
`record.json` each step with its status and time, `headline.json`, `cpu-threads.json` and `bench.json` the measurements.
Every step is a process of its own with a time limit, because a GPU that hangs does not answer signals.

The order: build for this GPU alone; a small call of every route, cell and dtype, then calls on two streams; the
headline cases; the CPU at several numbers of threads; the tests; the other cases; compute-sanitizer.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent.parent
GRACE = 5.0  # seconds between the signals that end a process

# ---- the steps


@dataclass(frozen=True)
class Step:
    """A process. Steps of the same `together` run at the same time, as many as its number of processes."""

    name: str
    command: Sequence[str]
    limit: float  # seconds
    environment: dict[str, str] = field(default_factory=dict)
    together: str = ""


PROCESSES = {"smoke": 8, "tests": 6}
# H for each route and cell, such that a GPU with 132 multiprocessors takes the route for every dtype, forward and
# backward. tests/cuda/test_gpu_run.py asks the plan.
CELLS = ("RNN", "GRU", "LSTM")
ROUTES = {"block": (64, 64, 64), "cluster": (512, 160, 160), "grid": (1536, 1536, 1536), "generic": (33, 33, 33)}
SIZES = 9, 8, 16  # T, B, I
DTYPES = {"generic": ("float32", "float64", "bfloat16", "float16")}
TILE_DTYPES = ("float32", "tf32", "bfloat16", "float16")
ATTENTION = ("attention_pool", "prefix_pool", "additive_attention")
STREAMS = ("cluster", "grid", "prefix_pool", "graph")
# The cases of bench/cases/cuda.py with a target, inference and training.
HEADLINE = (
    "cuda/bfloat16-*/B32-T128-I256-H512-L2",
    "cuda/float32-*/B32-T128-I256-H512-L2",
    "cuda/gru-bfloat16-*/B32-T512-I512-H512",
    "cuda/lstm-bfloat16-*/B16-T1024-I768-H768",
    "cuda/lstm-float16-*/B16-T1024-I768-H768",
    "cuda/lstm-bfloat16-*/B64-T256-I512-H512-L2-bidirectional",
)
THREADS = (1, 2, 4, 8, 16)


def smoke_names() -> list[tuple[str, str, str]]:
    """The route (or op), the cell and the dtype of each small call; the fastest kernels come first."""
    recurrences = [
        (route, cell, dtype) for route in ROUTES for cell in CELLS for dtype in DTYPES.get(route, TILE_DTYPES)
    ]
    return recurrences + [(op, "", dtype) for op in ATTENTION for dtype in DTYPES["generic"]]


def steps(python: str, out: Path, architecture: str) -> list[Step]:
    """All steps in their order."""
    this, test = [python, str(Path(__file__).resolve())], [python, "-X", "faulthandler", "-m", "pytest", "-rs"]
    bench = [python, "-m", "bench", "--device", "cuda", "--seconds", "0.1", "--rounds", "5", "--peers", "torch"]
    build = {"LLM_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture, "MAX_JOBS": str(os.cpu_count() or 1)}
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-build-isolation"]
    found = [Step("build", [*pip, "--no-deps", "--editable", str(ROOT)], 240, build)]
    found.append(Step("what was built", [python, "-c", "import llm_ext; print(llm_ext.build_info())"], 30))
    for names in smoke_names():
        words = [word for word in names if word]
        found.append(Step(f"smoke {' '.join(words)}", [*this, "--smoke", *words], 20, together="smoke"))
    # Alone, because they may hang.
    found += [Step(f"two streams {what}", [*this, "--streams", what], 20) for what in STREAMS]
    found.append(Step("headline", [*bench, "--json", str(out / "headline.json"), *HEADLINE], 90))
    found.append(Step("cpu threads", [*this, "--cpu-threads", str(out / "cpu-threads.json")], 60))
    on_gpu = ["-k", "(cuda or gpu) and not sanitizer", "-o", "faulthandler_timeout=30"]
    for folder in ("ops", "nn"):
        for path in sorted((ROOT / "tests" / folder).glob("test_*.py")):
            command = [*test, *on_gpu, str(path)]
            found.append(Step(f"test {folder}/{path.name}", command, 60, together="tests"))
    # One after the other: they measure memory, and take all of it.
    gpu_tests = sorted((ROOT / "tests" / "cuda").glob("test_gpu*.py"))
    gpu_tests = [path for path in gpu_tests if path.name != "test_gpu_run.py"]
    found += [Step(f"test cuda/{path.name}", [*test, *on_gpu, str(path)], 90) for path in gpu_tests]
    found.append(Step("bench", [*bench, "--json", str(out / "bench.json")], 150))
    found.append(Step("sanitizer", [*test, str(ROOT / "tests/cuda/test_gpu.py"), "-k", "sanitizer"], 120))
    return found


# ---- running them


class Run:
    """Runs steps until the time is over. Whatever ends this process, the files hold what was known before."""

    def __init__(self, out: Path, seconds: float) -> None:
        # Processes that a shell starts in the background ignore the signal, and the steps would inherit that.
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.start = time.monotonic()
        self.end = self.start + seconds
        self.record: dict[str, Any] = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "steps": []}
        self.save()
        self.log = (out / "log.txt").open("a")

    def save(self) -> None:
        """Replace the record by a whole one."""
        partial = self.out / "record.json.partial"
        partial.write_text(json.dumps(self.record, indent=1) + "\n")
        partial.replace(self.out / "record.json")

    def say(self, text: str) -> None:
        """Write a line with the time to the log and to the terminal."""
        line = f"[{time.monotonic() - self.start:6.1f} s] {text}"
        self.log.write(line + "\n")
        self.log.flush()
        print(line, flush=True)

    def note(self, step: Step, status: str, seconds: float) -> None:
        """Add a step to the record."""
        self.record["steps"].append({"name": step.name, "status": status, "seconds": round(seconds, 1)})
        self.save()
        self.say(f"{step.name}: {status}, {seconds:.1f} s")

    def all(self, all_steps: Sequence[Step]) -> int:
        """Run the steps in order; return 1 if one failed. Nothing follows a build that failed."""
        waiting, running = [*all_steps], list[Process]()
        while waiting or running:
            if waiting and self.may_start(waiting[0], running):
                step = waiting.pop(0)
                if time.monotonic() >= self.end:
                    self.note(step, "left out", 0.0)
                else:
                    running.append(Process(step, min(time.monotonic() + step.limit, self.end), self.log))
                continue
            for process in [*running]:
                if (status := process.status()) is not None:
                    running.remove(process)
                    process.copy_output()
                    self.note(process.step, status, time.monotonic() - process.start)
                    if process.step.name == "build" and status != "passed":
                        return 1
            time.sleep(0.02)
        return int(any(step["status"] not in ("passed", "left out") for step in self.record["steps"]))

    @staticmethod
    def may_start(step: Step, running: Sequence[Process]) -> bool:
        """Whether what runs leaves room for the step."""
        alike = all(process.step.together == step.together for process in running)
        return not running or (step.together != "" and alike and len(running) < PROCESSES[step.together])


class Process:
    """A step that runs. At its limit it is interrupted, as by Ctrl-C, so that it can say what it knows; then killed."""

    def __init__(self, step: Step, limit: float, log: IO[str]) -> None:
        self.step, self.limit, self.log = step, limit, log
        self.signals = 0
        # A step that runs alone writes to the log itself, so that its last line survives the end of this process.
        self.output: IO[str] = log if step.together == "" else tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"} | step.environment
        self.start = time.monotonic()
        self.child = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def status(self) -> str | None:
        """How the process ended; None: it runs."""
        code = self.child.poll()
        if code is None:
            if time.monotonic() > self.limit + self.signals * GRACE:
                # Its children get the last one, too.
                what = (signal.SIGINT, signal.SIGABRT, signal.SIGKILL)[min(self.signals, 2)]
                os.killpg(self.child.pid, what)
                self.signals += 1
                if what == signal.SIGKILL and self.signals > 4:
                    return "does not end"  # in the driver
            return None
        if self.signals:
            return "took too long"
        return "passed" if code == 0 else f"failed with {code}"

    def copy_output(self) -> None:
        """Append the output to the log."""
        if self.output is not self.log:
            self.output.seek(0)
            self.log.write(f"---- {self.step.name}\n{self.output.read()}")
            self.log.flush()
            self.output.close()


# ---- what the steps of this file do; each imports torch in its own process


def smoke(route: str, *words: str) -> None:
    """Compare a small call, forward and backward, with the reference."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from support import additive_attention, pooling, recurrences
    from support.comparison import compare

    dtype = getattr(torch, {"tf32": "float32"}.get(words[-1], words[-1]))
    torch.backends.cuda.matmul.fp32_precision = "tf32" if words[-1] == "tf32" else "ieee"
    torch.manual_seed(0)
    if route in ROUTES:
        (T, B, I), H = SIZES, ROUTES[route][CELLS.index(words[0])]  # noqa: E741
        recurrence = {"RNN": recurrences.RNN, "GRU": recurrences.GRU, "LSTM": recurrences.LSTM}[words[0]]
        inputs = recurrences.recurrence_inputs(recurrence, (T, B, I), B, H, dtype, device="cuda")
        lengths = torch.randint(0, T + 1, (B,)).cuda()
        name = f"{recurrence.op}_tf32" if words[-1] == "tf32" else recurrence.op
        for options in ({}, {"lengths": lengths, "reverse": True}):
            compare(name, recurrences.recurrence_functions(recurrence, **options), inputs)
    elif route == "additive_attention":
        for Tq in (1, 10):
            inputs = additive_attention.additive_inputs(4, Tq, 66, 130, 64, dtype, device="cuda")
            compare(route, additive_attention.additive_functions(), inputs)
    else:
        prefix = route == "prefix_pool"
        sizes = [(3, 90, 1024), (300, 40, 64), (2, 50, 33)]
        for B, T, D in [*sizes, (2, 4300, 1024)] if prefix else sizes:
            inputs = pooling.pool_inputs(B, T, D, dtype, folded=True, state=prefix, device="cuda")
            compare(route, pooling.pool_functions(prefix), inputs)
    torch.cuda.synchronize()
    print("right")


def streams(what: str) -> None:
    """Two streams at the same time, each with many calls whose blocks wait for each other."""
    import torch

    import llm_ext

    if what == "prefix_pool":
        layer: Any = llm_ext.AttentionPool(1024, 8, causal=True, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(2, 4300, 1024, device="cuda", dtype=torch.bfloat16)
    else:
        H = ROUTES["cluster" if what == "cluster" else "grid"][2]
        layer = llm_ext.LSTM(16, H, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(64, 8, 16, device="cuda", dtype=torch.bfloat16)
    two: list[Any] = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]

    def both(calls: int) -> list[list[Any]]:
        results: list[list[Any]] = [[], []]
        for _ in range(calls):
            for stream, of_stream in zip(two, results, strict=True):
                with torch.cuda.stream(stream):
                    of_stream.append(layer(x)[0])
        return results

    with torch.no_grad():
        expected = layer(x)[0]
        torch.cuda.synchronize()
        if what == "graph":
            both(1)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for stream in two:
                    stream.wait_stream(torch.cuda.current_stream())
                results = both(20)
                for stream in two:
                    torch.cuda.current_stream().wait_stream(stream)
            graph.replay()
        else:
            results = both(100)
        torch.cuda.synchronize()
    for result in [*results[0], *results[1]]:
        assert torch.equal(result, expected)
    print("right")


def cpu_threads(path: Path) -> None:
    """Time a sequence on the CPU with 1 to 16 threads, ours and torch's; rewrite the file after each measurement."""
    import torch

    from bench import recording, timing
    from bench.cells import CELLS as BENCH_CELLS

    T = H = 128
    run: dict[str, Any] = {"machine": recording.machine(), "T": T, "I": H, "H": H, "unit": "seconds", "cases": []}
    cores = len(os.sched_getaffinity(0))
    counts = [count for count in THREADS if count <= cores]
    for cell in BENCH_CELLS:
        for B in (1, 8, 32, 128):
            ours, other = cell.our_layer(H, H), cell.torch_layer(H, H)
            other.load_state_dict(ours.state_dict())
            x = torch.randn(T, B, H)
            for threads in counts:
                torch.set_num_threads(threads)
                with torch.inference_mode():
                    torch.testing.assert_close(ours(x)[0], other(x)[0], rtol=1e-4, atol=1e-4)
                    calls = {"llm_ext": functools.partial(ours, x), "torch": functools.partial(other, x)}
                    turns = timing.take_turns(calls, 0.4, 5)
                times = {name: timing.spread(seconds).median for name, seconds in turns.seconds.items()}
                run["cases"].append({"cell": cell.name, "B": B, "threads": threads} | times)
                path.write_text(json.dumps(run, indent=1) + "\n")
                print(run["cases"][-1], flush=True)


def architecture_of_gpu(python: str) -> str:
    """The GPU as TORCH_CUDA_ARCH_LIST names it, with its own instructions from 9.0 on."""
    code = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        sys.exit(f"gpu: torch finds no GPU: {done.stderr.strip().rpartition(chr(10))[2]}")
    capability = done.stdout.split()[-1]
    return capability + "a" * (float(capability) >= 9.0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_run.py", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the results")
    add("--minutes", type=float, default=8.0, help="time for everything")
    add("--python", default=sys.executable, help="the interpreter with torch")
    add("--smoke", nargs="+", metavar="NAME", help=argparse.SUPPRESS)
    add("--streams", metavar="NAME", help=argparse.SUPPRESS)
    add("--cpu-threads", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.smoke or options.streams or options.cpu_threads:
        sys.path.insert(0, str(ROOT))
        if options.smoke:
            smoke(*options.smoke)
        elif options.streams:
            streams(options.streams)
        else:
            cpu_threads(options.cpu_threads)
        return 0
    run = Run(options.out.resolve(), 60 * options.minutes)
    return run.all(steps(options.python, run.out, architecture_of_gpu(options.python)))


if __name__ == "__main__":
    sys.exit(main())
