from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_ext.text import cli
from llm_ext.text.checkpoint import Run
from llm_ext.text.report import read_log

from .conftest import environment, options, start

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a text beside it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("the cat sat on the mat. " * 100)
    assert cli.main(["train", str(folder / "text.txt"), "--out", str(folder / "run"), *options(steps=20)]) == 0
    return folder / "run"


def test_from_text_to_text(text: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "run"
    settings = options(steps=20, tokens="bpe", vocab_size=300)
    code, said, errors = command("train", text, "--out", run, *settings)
    assert (code, errors) == (0, "")
    lines = said.splitlines()
    assert lines[1].startswith("step 10: training ")
    assert lines[-1].startswith("done: step 20; best validation loss ")
    code, said, errors = command("eval", run, text)
    assert (code, errors) == (0, "")
    assert "nats a token" in said
    assert "a character" in said
    code, said, errors = command("generate", run, "--prompt", "the", "--length", 20, "--seed", 1)
    assert (code, errors) == (0, "")
    assert said.startswith("the")
    assert len(said) > 20


@pytest.mark.parametrize(("tokens", "cell"), [("bytes", "gru"), ("chars", "lstm")])
def test_other_tokens_and_cells(
    text: Path, tmp_path: Path, tokens: str, cell: str, capfd: pytest.CaptureFixture[str]
) -> None:
    text.write_text("schöne Grüße " * 300, encoding="utf-8")
    run = str(tmp_path / "run")
    assert cli.main(["train", str(text), "--out", run, *options(steps=20, tokens=tokens, cell=cell)]) == 0
    assert Run(tmp_path / "run").load("best")[0].config()["cell"] == cell
    assert cli.main(["eval", run, str(text)]) == 0
    assert cli.main(["generate", run, "--prompt", "Grü", "--length", "20"]) == 0
    assert "\nGrü" in capfd.readouterr().out


def test_eval_gives_the_loss_of_the_log(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = (trained.parent / "text.txt").read_text()
    (tmp_path / "val.txt").write_text(text[int(len(text) * 0.9) :])
    assert cli.main(["eval", str(trained), str(tmp_path / "val.txt"), "--cache", str(tmp_path)]) == 0
    logged = [record["loss"] for record in read_log(trained / "log.jsonl") if record["event"] == "validation"]
    assert f"{min(logged):.4f} nats a token, over {len(text) // 10 - 1:,} tokens" in capsys.readouterr().out


def test_generating_is_reproducible_by_its_seed(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(*arguments: str) -> str:
        assert cli.main(["generate", str(trained), "--prompt", "the", "--length", "50", *arguments]) == 0
        return capsys.readouterr().out

    assert sample("--seed", "1") == sample("--seed", "1") != sample("--seed", "2")
    assert sample("--temperature", "0") == sample("--top-k", "1") == sample("--top-p", "1e-9")
    assert sample() != sample()
    assert len(sample()) == len("the") + 50 + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "text.txt"], "required: --out"),
        (["train", "--out", "run"], "FILE is missing"),
        (["train", "text.txt", "--out", "run", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["train", "text.txt", "--out", "run", "--batch", "many"], "invalid int value: 'many'"),
        (["train", "text.txt", "--out", "run", "--tokens", "words"], "invalid choice: 'words'"),
        (["train", "text.txt", "--out", "run", "--cell", "elman"], "argument --cell: invalid choice: 'elman'"),
        (["train", "--resume", "--out", "run", "--cell", "gru"], "leave out --cell"),
        (["train", "text.txt", "--out", "run", "--lr", "nan"], "--lr must be at least 0"),
        (["train", "--resume", "--out", "run", "--hidden", "7", "text.txt"], "leave out --hidden, FILE"),
        (["eval", "run"], "FILE is missing"),
        (["generate", "run", "--length", "-1"], "--length must be at least 0, got -1"),
        (["generate", "run", "--temperature", "nan"], "--temperature must be at least 0, got nan"),
        (["generate", "run", "--top-p", "0"], "--top-p must be above 0 and at most 1, got 0.0"),
        (["generate", "run", "--top-k", "0"], "--top-k must be at least 1, got 0"),
        (["generate", "run", "--prompt", ""], "--prompt must be at least one character, got ''"),
    ],
)
def test_a_wrong_command_line_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_failures_exit_with_1_and_a_message(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latin, empty, good = tmp_path / "latin.txt", tmp_path / "empty.txt", tmp_path / "good.txt"
    latin.write_bytes(b"caf\xe9 " * 500)
    empty.touch()
    good.write_text("some text, " * 300)
    plain = tmp_path / "plain"
    plain.mkdir()
    cases: list[tuple[list[object], str]] = [
        (
            ["train", latin, "--out", tmp_path / "a", *options()],
            "latin.txt: expected UTF-8, got b'\\xe9' at byte 3",
        ),
        (["train", empty, "--out", tmp_path / "b"], "empty.txt: expected text, got an empty file"),
        (["train", tmp_path / "no.txt", "--out", tmp_path / "b"], "no.txt: no such file"),
        (["train", good, "--out", trained], "holds a run already"),
        (["train", good, "--out", good], "good.txt"),
        (["train", good, "--out", tmp_path / "c", "--batch", "900"], "more than batch × chunk = 900 × 64"),
        (["train", good, "--out", tmp_path / "d", "--accelerator", "cuda:99"], "cannot be used"),
        (["train", "--resume", "--out", plain], "holds no checkpoint"),
        (["train", "--resume", "--out", tmp_path / "nowhere"], "no such run directory"),
        (["eval", plain, good], "holds no checkpoint"),
        (["eval", trained, tmp_path / "no.txt"], "no.txt: no such file"),
        (["eval", trained, good, "--device", "warp"], "device 'warp' cannot be used"),
        (["eval", trained, good, "--cache", tmp_path / "e"], "not among the characters of the training text"),
        (["generate", tmp_path / "nowhere"], "no such run directory"),
        (["generate", trained, "--prompt", "Ω"], "'Ω' (U+03A9) is not among the characters"),
    ]
    for arguments, message in cases:
        assert cli.main([str(argument) for argument in arguments]) == 1, arguments
        errors = capsys.readouterr().err
        assert errors.startswith("llm-ext: "), arguments
        assert message in errors, arguments
        assert "Traceback" not in errors


def test_a_failure_of_ours_is_no_traceback_either(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(Run, "load", fail)
    assert cli.main(["generate", str(trained)]) == 1
    assert "ZeroDivisionError: oops" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        cli.main(["generate", str(trained), "--traceback"])


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['tokenizers'] = None; from llm_ext.text.cli import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "llm-ext: tokenizers is not installed: pip install --no-build-isolation '.[text]'\n"


def test_nobody_reads_on(trained: Path) -> None:
    process = start("generate", trained, "--prompt", "the", "--length", 100_000)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(3) == "the"
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""


def test_text_comes_as_it_is_sampled(trained: Path) -> None:
    process = start("generate", trained, "--prompt", "the", "--length", 10**9)
    assert process.stdout is not None
    assert process.stderr is not None
    assert len(process.stdout.read(200)) == 200
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "llm-ext: interrupted\n")


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if condition():
            return
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode}: {process.communicate()[1]}")
        time.sleep(0.05)
    pytest.fail("nothing happened in a minute")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(text: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    process = start("train", text, "--out", out, *options(steps=10**7, validate_every=10**6))
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size > 0, process)
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + number, "")
    step = Run(out).checkpoint("last").step
    assert step > 0
    assert f"stopped by {signal.Signals(number).name} at step {step}; saved; " in said
    Run(out).load("last")


def test_kills_at_random_moments_lose_nothing(text: Path, tmp_path: Path, command: Command) -> None:
    """Saves are made all the time, so that kills hit them; in the end the results are those of one run."""
    settings = options(steps=400, validate_every=2, dropout=0.1)
    assert command("train", text, "--out", tmp_path / "whole", *settings)[0] == 0
    out, draw = tmp_path / "run", random.Random(1)
    arguments: list[object] = ["train", text, "--out", out, *settings]
    steps = [0]
    for _ in range(5):
        process = start(*arguments)
        wait_for(lambda: Run(out).exists() and Run(out).checkpoint("last").step > steps[-1], process)
        time.sleep(draw.random() * 0.2)
        process.kill()
        process.communicate()
        Run(out).load("last")
        Run(out).load("best")
        steps.append(Run(out).checkpoint("last").step)
        arguments = ["train", "--resume", "--out", out]
    assert steps == sorted(set(steps))
    code, _, errors = command(*arguments)
    assert (code, errors) == (0, "")
    whole, killed = (Run(path).checkpoint("last") for path in (tmp_path / "whole", out))
    assert killed.step == whole.step == 400
    assert killed.config["files"] == whole.config["files"]  # checksums of weights and state
    logs = [list(read_log(path / "log.jsonl")) for path in (tmp_path / "whole", out)]
    for record in (*logs[0], *logs[1]):
        del record["seconds"], record["tokens_per_second"]
    assert logs[0] == logs[1]
    assert {path.name for path in out.iterdir() if path.name.startswith((".", "step"))} == {
        Run(out).checkpoint(which).path.name for which in ("last", "best")
    }


def test_two_processes_train_like_one_with_the_doubled_batch(text: Path, tmp_path: Path, command: Command) -> None:
    def torchrun(*arguments: object) -> None:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        process = subprocess.run(
            [*launch, "-m", "llm_ext.text.cli", *map(str, arguments)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert process.returncode == 0, process.stderr

    def losses(out: Path) -> list[float]:
        return [record["loss"] for record in read_log(out / "log.jsonl")]

    two, one = tmp_path / "two", tmp_path / "one"
    settings = {"steps": 20, "layers": 2, "cell": "lstm"}  # its state is all that a state can be
    torchrun("train", text, "--out", two, *options(batch=4, **settings))
    assert command("train", text, "--out", one, *options(batch=8, **settings))[0] == 0
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)

    # The state of both processes' streams was saved: going on is the same as not having stopped.
    torchrun("train", "--resume", "--out", two, "--steps", 30)
    assert command("train", "--resume", "--out", one, "--steps", 30)[0] == 0
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_the_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["eval"], ["generate"], ["translate"], ["explain"], ["train"]):
        with pytest.raises(SystemExit) as exit:
            cli.main([*command, "--help"])
        assert exit.value.code == 0
    assert "--validate-every N" in capsys.readouterr().out


def test_the_log_is_json_lines(trained: Path) -> None:
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [record["event"] for record in records].count("validation") == 2
    assert {"step", "loss", "rate", "norm", "tokens_per_second", "seconds"} <= records[0].keys()
    assert os.path.getsize(trained / "loss.svg") > 1000
