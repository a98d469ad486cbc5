"""`make gpu`: build, test and measure on a machine with a GPU that may be taken away at any moment.

The most important comes first, and everything is in a file as soon as it is known: `log.txt` has all output, `steps/`
that of steps which run at the same time, `record.json` each step with its status and time, `headline.json`,
`cpu-threads.json` and `bench.json` the measurements. Every step is a process of its own with a time limit, because a
GPU that hangs does not answer signals.

The order: build for this GPU alone; calls that must raise an exception, again in a debugger if they crash; a small call
of every route, cell and dtype, then calls on two streams; the headline cases; the CPU at several numbers of threads;
the tests; those that expect exceptions; the other cases; compute-sanitizer.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent.parent
GRACE = 5.0  # seconds between the signals that end a process
DIED = "died of"  # begins the status of a step that a signal ended, unless it was this program's
NO_TESTS = 5  # pytest's exit status if it found nothing to run

# ---- the steps


@dataclass(frozen=True)
class Step:
    """A process. Steps of the same `together` run at the same time, as many as its number of processes."""

    name: str
    command: Sequence[str]
    limit: float  # seconds
    environment: dict[str, str] = field(default_factory=dict)
    together: str = ""
    debug: bool = False  # whether to run it once more in a debugger if a signal ends it


PROCESSES = {"throws": 8, "smoke": 8, "tests": 6}
AT_A_CRASH = ("run", "bt 60", "info sharedlibrary", "info registers", "x/8i $pc")  # commands of the debugger
# H for each route and cell, such that a GPU with 132 multiprocessors takes the route for every dtype, forward and
# backward. tests/cuda/test_gpu_run.py asks the plan.
CELLS = ("RNN", "GRU", "LSTM")
ROUTES = {"block": (64, 64, 64), "cluster": (512, 160, 160), "grid": (1536, 1536, 1536), "generic": (33, 33, 33)}
SIZES = 9, 8, 16  # T, B, I
DTYPES = {"generic": ("float32", "float64", "bfloat16", "float16")}
TILE_DTYPES = ("float32", "tf32", "bfloat16", "float16")
ATTENTION = ("attention_pool", "prefix_pool", "additive_attention")
STREAMS = ("cluster", "grid", "graph")
# The slowest cases of bench/cases/cuda.py, compared with their targets or with others, and the largest.
HEADLINE = (
    "cuda/bfloat16-*/B32-T128-I256-H512-L2",
    "cuda/float32-*/B32-T128-I256-H512-L2",
    "cuda/gru-bfloat16-*/B32-T512-I512-H512",
    "cuda/lstm-bfloat16-*/B16-T1024-I768-H768",
    "cuda/lstm-float16-*/B16-T1024-I768-H768",
    "cuda/lstm-bfloat16-*/B64-T256-I512-H512-L2-bidirectional",
    "cuda/pooling-op-bfloat16-*/B8-T4096-D1024",
    "cuda/prefix-op-bfloat16-*/B8-T4096-D1024",
    "cuda/additive-bfloat16-*/B1280-Tq1-Tk66-A1024",
    "cuda/additive-bfloat16-training/B128-Tq50-Tk50-A1024",
)
THREADS = (1, 2, 4, 8, 16)


def raising(call: str, *before: str) -> str:
    """Python code that fails unless the call raises an exception."""
    lines = ["import torch", *before, "try:", f"    {call}", "except Exception as error:"]
    lines += ["    print(type(error).__name__, error)", "else:", "    raise SystemExit('nothing was raised')"]
    return "\n".join(lines) + "\n"


# Several processes of the first run on a GPU died of segmentation faults in calls that raise an exception
# (docs/lab/cuda-h200.md). Each of these adds something to one before it, so those that die say where to look.
LIBRARY = raising(
    "torch.ops.llm_ext.linear_forward(torch.ones(2, 3), torch.ones(2, 4), None)",
    f"torch.ops.load_library({str(ROOT / 'llm_ext' / 'lib' / 'libllm_ext.so')!r})",
)
IN_A_THREAD = f"""import threading
threading.stack_size(64 << 20)
thread = threading.Thread(target=exec, args=({LIBRARY!r}, {{}}))
thread.start()
thread.join()
"""
_OURS = ("import llm_ext", "from llm_ext import ops", "new = dict(device='cuda')")
RAISING = {
    # The unwinder, the CPU, the machine.
    "torch": raising("torch.mm(torch.ones(2, 3), torch.ones(2, 3))"),
    # The driver is loaded.
    "torch on cuda": raising("torch.mm(torch.ones(2, 3, **new), torch.ones(2, 3, **new))", *_OURS[2:]),
    # This library, without Python, autograd or a GPU.
    "library": LIBRARY,
    # The size of the main stack.
    "thread": IN_A_THREAD,
    # The compiled module and what Python registers.
    "package": raising("ops.rnn(torch.ones(2, 2, 3), None, torch.ones(4, 3), torch.ones(4, 5))", *_OURS[:2]),
    # CUDA's dispatch key, and checks before the device is entered.
    "checks": raising(
        "ops.rnn(torch.ones(2, 2, 3, **new), None, torch.ones(4, 3, **new), torch.ones(4, 5, **new))", *_OURS
    ),
    # After it: the device guard, the loaded kernels.
    "device": raising(
        "ops.rnn(torch.ones(1, 1 << 31, 0, **new), None, torch.ones(4, 0, **new), torch.ones(4, 4, **new))", *_OURS
    ),
    # An exception of torch that passes its C interface first: the result would have 2^42 bytes.
    "memory": raising(
        "ops.rnn(torch.ones(1 << 20, 1 << 10, 0, **new), None, torch.ones(1024, 0, **new), "
        "torch.ones(1024, 1024, **new))",
        *_OURS,
    ),
}
# The library in other environments: symbols bound at the start, no shadow stacks, one OpenMP thread.
ENVIRONMENTS = {
    "bound now": {"LD_BIND_NOW": "1"},
    "no shadow stack": {"GLIBC_TUNABLES": "glibc.cpu.x86_shstk=off"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def smoke_names() -> list[tuple[str, str, str]]:
    """The route (or op), the cell and the dtype of each small call; the fastest kernels come first."""
    recurrences = [
        (route, cell, dtype) for route in ROUTES for cell in CELLS for dtype in DTYPES.get(route, TILE_DTYPES)
    ]
    return recurrences + [(op, "", dtype) for op in ATTENTION for dtype in DTYPES["generic"]]


def throwing_steps(python: str) -> list[Step]:
    """Calls that raise exceptions, and what they depend on."""
    code = [python, "-X", "faulthandler", "-c"]
    test = [python, "-X", "faulthandler", "-m", "pytest", str(Path(__file__).resolve()), "-o"]
    test.append(f"python_functions={library_raises.__name__}")
    found = [Step("throws facts", [python, str(Path(__file__).resolve()), "--facts"], 30, together="throws")]
    for name, text in RAISING.items():
        found.append(Step(f"throws {name}", [*code, text], 15, together="throws", debug=True))
    for name, environment in ENVIRONMENTS.items():
        found.append(Step(f"throws library, {name}", [*code, LIBRARY], 15, environment, "throws", debug=True))
    # Plug-ins of pytest load other libraries.
    for name, environment in (("pytest", {}), ("bare pytest", {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})):
        found.append(Step(f"throws library, {name}", test, 15, environment, "throws", debug=True))
    return found


def steps(python: str, out: Path, architecture: str) -> list[Step]:
    """All steps in their order."""
    this, test = [python, str(Path(__file__).resolve())], [python, "-X", "faulthandler", "-m", "pytest", "-rs"]
    bench = [python, "-m", "bench", "--device", "cuda", "--seconds", "0.1", "--rounds", "5", "--peers", "torch"]
    build = {"LLM_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture, "MAX_JOBS": str(os.cpu_count() or 1)}
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-build-isolation"]
    found = [Step("build", [*pip, "--no-deps", "--editable", str(ROOT)], 240, build)]
    found.append(Step("what was built", [python, "-c", "import llm_ext; print(llm_ext.build_info())"], 30))
    found += throwing_steps(python)
    for names in smoke_names():
        words = [word for word in names if word]
        found.append(Step(f"smoke {' '.join(words)}", [*this, "--smoke", *words], 20, together="smoke"))
    # Alone, because they may hang.
    found += [Step(f"two streams {what}", [*this, "--streams", what], 20) for what in STREAMS]
    found.append(Step("headline", [*bench, "--json", str(out / "headline.json"), *HEADLINE], 120))
    found.append(Step("cpu threads", [*this, "--cpu-threads", str(out / "cpu-threads.json")], 60))
    on_gpu = ["-k", "(cuda or gpu) and not sanitizer", "-o", "faulthandler_timeout=30"]
    op_tests = [path for folder in ("ops", "nn") for path in sorted((ROOT / "tests" / folder).glob("test_*.py"))]
    gpu_tests = sorted((ROOT / "tests" / "cuda").glob("test_gpu*.py"))
    gpu_tests = [path for path in gpu_tests if path.name != "test_gpu_run.py"]
    # Tests that expect exceptions are apart and last: a crash would end the others of their file.
    for kind, throwing in (("test", "none"), ("throwing test", "only")):
        for path in (*op_tests, *gpu_tests):
            if throwing == "only" and "pytest.raises" not in path.read_text():
                continue
            name = f"{kind} {path.parent.name}/{path.name}"
            command = [*test, *on_gpu, "--throwing", throwing, str(path)]
            # Those of cuda run one after the other: they measure memory, and take all of it.
            alone = path in gpu_tests
            found.append(Step(name, command, 90 if alone else 60, together="" if alone else "tests"))
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
                    running.append(Process(step, min(time.monotonic() + step.limit, self.end), self.log, self.out))
                continue
            for process in [*running]:
                if (status := process.status()) is not None:
                    step = process.step
                    running.remove(process)
                    process.copy_output()
                    self.note(step, status, time.monotonic() - process.start)
                    if step.debug and status.startswith(DIED) and (debugger := find_debugger()) is not None:
                        commands = [word for command in AT_A_CRASH for word in ("-ex", command)]
                        command = [debugger, "-batch", *commands, "--args", *step.command]
                        waiting.insert(0, Step(f"{step.name}, in a debugger", command, 60, step.environment))
                    if process.step.name == "build" and status != "passed":
                        return 1
            time.sleep(0.02)
        return int(any(step["status"] not in ("passed", "no tests", "left out") for step in self.record["steps"]))

    @staticmethod
    def may_start(step: Step, running: Sequence[Process]) -> bool:
        """Whether what runs leaves room for the step."""
        alike = all(process.step.together == step.together for process in running)
        return not running or (step.together != "" and alike and len(running) < PROCESSES[step.together])


class Process:
    """A step that runs. At its limit it is interrupted, as by Ctrl-C, so that it can say what it knows; then killed."""

    def __init__(self, step: Step, limit: float, log: IO[str], out: Path) -> None:
        self.step, self.limit, self.log = step, limit, log
        self.signals = 0
        # A step that runs alone writes to the log itself, others to a file of their own: the last lines survive the end
        # of this process.
        self.output: IO[str] = log
        if step.together != "":
            path = out / "steps" / f"{re.sub('[^a-zA-Z0-9.]+', '-', step.name)}.txt"
            path.parent.mkdir(exist_ok=True)
            self.output = path.open("w+")
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
        if code < 0:
            return f"{DIED} {signal.Signals(-code).name}"
        if code == NO_TESTS and "pytest" in self.step.command:
            return "no tests"
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


def library_raises() -> None:
    """The call of `throws library` as a test of pytest."""
    exec(LIBRARY, {})


def facts() -> None:
    """Print what exceptions depend on: the machine, the process, its libraries, where their symbols are bound."""
    sys.path.insert(0, str(ROOT))
    import torch

    import llm_ext

    pybind11 = next((d.version for d in metadata.distributions() if d.metadata["Name"] == "pybind11"), None)
    print("torch", torch.__version__, "pybind11", pybind11, llm_ext.build_info())
    print("CUDA", torch.cuda.is_available(), "stack", resource.getrlimit(resource.RLIMIT_STACK))
    print({name: sysconfig.get_config_var(name) for name in ("LDSHARED", "LDCXXSHARED", "CFLAGS")})
    print({name: value for name, value in os.environ.items() if re.search("TORCH|LD_|GLIBC|OMP", name)})
    print("plug-ins of pytest:", sorted(entry.name for entry in metadata.entry_points(group="pytest11")))
    for path, wanted in (
        ("/proc/self/status", "hread_features|^Threads"),
        ("/proc/meminfo", "Commit|MemAvailable"),
        ("/proc/sys/vm/overcommit_memory", ""),
        ("/proc/self/maps", "gomp|iomp|cudart|stdc|gcc_s|unwind"),
    ):
        lines = Path(path).read_text().splitlines()
        found = [line.split()[-1] if "maps" in path else line for line in lines if re.search(wanted, line)]
        print(path, *dict.fromkeys(found), sep="\n  ")
    # Where this library's exceptions are bound, and all that do not go to libgcc_s and libstdc++.
    symbols = re.compile(r"symbol .(_Unwind_|__cxa_(throw|begin)|__gxx_personality|__register_frame)")
    expected = re.compile(r" to \S*/(libgcc_s\.so\.1|libstdc\+\+\.so\.6) ")
    environment = os.environ | {"LD_DEBUG": "bindings"}
    done = subprocess.run([sys.executable, "-c", LIBRARY], env=environment, capture_output=True, text=True, check=False)
    bindings = {line.partition(":")[2].strip() for line in done.stderr.splitlines() if symbols.search(line)}
    told = sorted(line for line in bindings if "libllm_ext" in line or not expected.search(line))
    print(f"{len(bindings)} bindings, exit status {done.returncode}", *told, sep="\n  ")


def find_debugger() -> str | None:
    """The path of cuda-gdb, which debugs host code as well, or of gdb."""
    places = (None, "/usr/local/cuda/bin")
    return next(filter(None, (shutil.which("cuda-gdb", path=place) for place in places)), shutil.which("gdb"))


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
    add("--facts", action="store_true", help=argparse.SUPPRESS)
    add("--smoke", nargs="+", metavar="NAME", help=argparse.SUPPRESS)
    add("--streams", metavar="NAME", help=argparse.SUPPRESS)
    add("--cpu-threads", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.facts:
        facts()
        return 0
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
