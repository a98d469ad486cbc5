"""The command line: results of each command, wrong command lines, failures."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.cli_runs import language_options, translation_options
from support.process import run_python

from llm_ext.cli import main
from llm_ext.cli.checkpoint import Run
from llm_ext.cli.commands.parser import _build_parser
from llm_ext.cli.commands.train import _settings
from llm_ext.cli.training import read_log
from llm_ext.cli.training.config import CONFIGS

CommandLine = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """A function that runs a command line: exit code, standard output, standard error."""

    def run_main(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return run_main


# ---- language models


@pytest.mark.parametrize(("tokens", "cell"), [("bytes", "gru"), ("chars", "lstm"), ("bpe", "rnn")])
def test_train_eval_and_generate(text: Path, tmp_path: Path, run: CommandLine, tokens: str, cell: str) -> None:
    text.write_text("schöne Grüße an alle. " * 300, encoding="utf-8")
    out = tmp_path / "run"
    options = language_options(steps=20, tokens=tokens, cell=cell, vocab_size=300)
    code, said, errors = run("train", text, "--out", out, *options)
    assert (code, errors) == (0, "")
    lines = said.splitlines()
    assert re.match(r"[\d,]+ parameters, \d+ tokens in the vocabulary \(" + tokens, lines[0])
    assert lines[1].startswith("step 10: training ")
    assert lines[-1].startswith("done: step 20; best validation loss ")
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["event"] for record in records].count("validation") == 2
    assert {"step", "loss", "rate", "norm", "tokens_per_second", "seconds"} <= records[0].keys()
    assert (out / "loss.svg").read_text().lstrip().startswith("<?xml")

    code, said, errors = run("eval", out, text)
    assert (code, errors) == (0, "")
    assert [line.split()[-1] for line in said.splitlines()[2:]] == ["token", "character", "byte"]
    code, said, errors = run("generate", out, "--prompt", "Grü", "--length", 20)
    assert (code, errors) == (0, "")
    assert said.startswith("Grü")
    assert len(said) > (20 if tokens == "chars" else len("Grü") + 4)  # a token may be a byte, a character has up to 4
    code, said, errors = run("generate", out, "--length", 5)
    assert (code, errors) == (0, "")
    assert said.startswith(" " if tokens == "chars" else "\n")  # the text has no line break


def test_eval_measures_the_loss_of_the_log(language_model: Path, run: CommandLine, tmp_path: Path) -> None:
    text = (language_model.parent / "text.txt").read_text()
    (tmp_path / "val.txt").write_text(text[int(len(text) * 0.9) :])
    code, said, _ = run("eval", language_model, tmp_path / "val.txt", "--cache", tmp_path)
    assert code == 0
    logged = [r["loss"] for r in read_log(language_model / "log.jsonl") if r["event"] == "validation"]
    assert f"{min(logged):.4f} nats per token, over {len(text) // 10 - 1:,} tokens" in said


def test_a_seed_repeats_a_text(language_model: Path, run: CommandLine) -> None:
    def sample(*options: str) -> str:
        code, said, errors = run("generate", language_model, "--prompt", "ten", "--length", 50, *options)
        assert (code, errors) == (0, "")
        return said

    assert sample("--seed", "1") == sample("--seed", "1") != sample("--seed", "2")
    assert sample("--temperature", "0") == sample("--top-k", "1") == sample("--top-p", "1e-9")
    assert sample() != sample()
    assert len(sample()) == len("ten") + 50 + 1


def test_explain_draws_a_language_model(language_model: Path, run: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "picture.html"
    code, said, _ = run("explain", language_model, "--text", "one two six", "--out", out)
    assert (code, "nats per token over 10 tokens" in said) == (0, True)
    page = out.read_text()
    assert page.count("<td class=none>") == 1  # the first predicted word cannot attend to the second word
    code, _, errors = run("explain", language_model, "--text", "one", "--out", out)
    assert (code, "--text must hold at least two words, got 'one'" in errors) == (1, True)
    assert out.read_text() == page


def test_explain_limits_what_a_picture_shows(
    language_model: Path, translator: Path, run: CommandLine, tmp_path: Path
) -> None:
    """A PNG of 1,000 words would take 8 GB."""
    png, page = tmp_path / "picture.png", tmp_path / "picture.html"
    for model in (language_model, translator):
        for out, count, message in (
            (png, 201, "--text has {} words, but a .png picture shows at most 200; one of .html shows 1,000"),
            (page, 1001, "--text has {} words, but a .html picture shows at most 1,000"),
        ):
            code, _, errors = run("explain", model, "--text", ("six " * count).strip(), "--out", out)
            count += model == translator  # the end of the line
            assert (code, message.format(f"{count:,}") in errors, out.exists()) == (1, True, False)
    code, _, errors = run("explain", language_model, "--text", "s" * 8193, "--out", page)
    assert (code, "--text has 8,193 tokens, but explain reads at most 8,192" in errors) == (1, True)
    arguments = ("explain", translator, "--text", "six", "--target", "six " * 200)
    code, _, errors = run(*arguments, "--out", png)
    assert (code, "--target has 201 words" in errors) == (1, True)
    code, _, errors = run(*arguments, "--out", page)
    assert (code, errors, page.read_text().count("<tr>")) == (0, "", 1 + 201)


# ---- translators


def test_translate_and_eval_a_translator(translator: Path, run: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("one two\n\nsix ten\n")
    assert run("translate", translator, tmp_path / "lines") == (0, "deux, un.\n\ndix, six.\n", "")
    pairs = translator.parent / "pairs.tsv"
    code, said, errors = run("eval", translator, pairs)
    assert (code, errors) == (0, "")
    assert "nats per token, over " in said
    assert "BLEU        100.00 over 128 lines (nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:" in said
    columns = [line.split("\t") for line in pairs.read_text().splitlines()]
    columns += [["", "six"], ["six", ""]]  # no pairs
    for side, name in enumerate(("en", "fr")):
        (tmp_path / name).write_text("\n".join(row[side] for row in columns) + "\n")
    sides = ("--source", tmp_path / "en", "--target", tmp_path / "fr")
    assert run("eval", translator, *sides)[:2] == (0, said)


def test_search_options(translator: Path, run: CommandLine) -> None:
    text, expected = b"one two\n\nten ten\nsix one\n", "deux, un.\n\ndix, dix.\nun, six.\n"
    for options in ("", "--beam 3", "--batch 1", "--batch 2 --beam 2", "--length-penalty 0"):
        assert run("translate", translator, *options.split(), stdin=text) == (0, expected, "")
    options = "--beam 3 --num-return-sequences 2 --max-length 9"
    code, said, errors = run("translate", translator, *options.split(), stdin=text)
    lines = said.split("\n")
    assert (code, errors, len(lines)) == (0, "", 2 * 4 + 1)
    assert (lines[0], lines[4], lines[6]) == ("deux, un.", "dix, dix.", "un, six.")
    assert lines[2] == lines[3] == ""
    assert lines[1] != lines[0]
    assert run("translate", translator) == (0, "", "")
    # One line alone is not streamed where n-grams are blocked.
    blocked = [run("translate", translator, "--batch", n, "--no-repeat-ngram-size", 1, stdin=text) for n in (1, 2)]
    assert blocked[0] == blocked[1]
    assert "dix, dix." not in blocked[0][1]
    assert run("translate", translator, "--max-length", 3, stdin=b"one two\n")[1] == "deu\n"


def test_lines_before_an_error_are_translated(translator: Path, run: CommandLine, tmp_path: Path) -> None:
    text = "one two\nten Ω\nsix six\n".encode()
    message = "llm-ext: line 2: the character 'Ω' (U+03A9) is not among the characters of the training text\n"
    for batch in (1, 32):
        assert run("translate", translator, "--batch", batch, stdin=text) == (1, "deux, un.\n", message)
    (tmp_path / "lines").write_bytes(b"one two\ncaf\xe9\n")
    code, said, errors = run("translate", translator, tmp_path / "lines")
    assert (code, said) == (1, "deux, un.\n")
    assert "lines: line 2: expected UTF-8, got b'\\xe9' at byte 3 of the line" in errors


def test_a_line_much_longer_than_those_of_the_training(translator: Path, run: CommandLine) -> None:
    text = b"one two\n" + b"six " * 100 + b"\n"
    code, said, errors = run("translate", translator, "--max-length", 20, stdin=text)
    assert (code, said[:10], said.count("\n")) == (0, "deux, un.\n", 2)
    assert "line 2: 399 tokens, but the longest source of the training had 7; the result may be poor" in errors


def test_explain_draws_a_translation(translator: Path, run: CommandLine, tmp_path: Path) -> None:
    for suffix in ("html", "png"):
        out = tmp_path / f"picture.{suffix}"
        assert run("explain", translator, "--text", "one two", "--out", out) == (0, f"deux, un.\nsaved in {out}\n", "")
    page = (tmp_path / "picture.html").read_text()
    for word in ("one", "two", "deux,", "un.", "attention: 0 %", "100 %"):
        assert word in page
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    out = tmp_path / "other.html"
    assert run("explain", translator, "--text", "one", "--target", "un six", "--out", out)[1] == (
        f"un six\nsaved in {out}\n"
    )


# ---- summarizers


def test_train_eval_and_summarize(pairs: Path, tmp_path: Path, run: CommandLine) -> None:
    """From pipes, the standard input and a file; long sources are cut everywhere."""
    out = tmp_path / "run"
    options = [*translation_options(), "--steps", 10, "--longest-source", 9, "--task", "summarize"]
    with pipe(pairs.read_bytes()) as training:
        code, said, errors = run("train", training, "--out", out, *options)
    assert (code, errors) == (0, "")
    assert re.search(r"cut \d+ of 200 sources, those of more than 9 tokens", said)
    assert Run(out).checkpoint("best").config["model"]["copy"]
    with pipe(pairs.read_bytes()) as held_out:
        code, said, _ = run("eval", out, held_out, "--beam", 2, "--no-repeat-ngram-size", 2)
    assert (code, [line.split()[0] for line in said.splitlines()[-4:]]) == (
        0,
        ["BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L"],
    )
    lines = b"cat mat sat that\n\nthe cat\n"
    code, said, errors = run("summarize", out, stdin=lines)
    assert (code, said.count("\n"), errors) == (0, 3, "llm-ext: lines cut to at most 9 tokens: 1\n")
    with pipe(lines) as text:
        assert run("summarize", out, text) == (code, said, errors)
    assert run("summarize", out, "--batch", 1, stdin=lines) == (code, said, errors)
    assert run("summarize", out, "--batch", 1, stdin=b"cat mat \n") == (0, said.splitlines()[0] + "\n", "")
    code, _, errors = run("translate", out, stdin=lines)
    assert (code, errors) == (
        1,
        f"llm-ext: {out}: holds a summarizer, not a translator; use it with llm-ext summarize\n",
    )


@contextlib.contextmanager
def pipe(text: bytes) -> Iterator[Path]:
    """The name of a pipe that holds a text, as a shell's <(...) gives it."""
    reader, writer = os.pipe()
    os.write(writer, text)
    os.close(writer)
    yield Path(f"/dev/fd/{reader}")
    os.close(reader)


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "required: COMMAND"),
        ("fly", "invalid choice: 'fly'"),
        ("train text.txt", "required: --out"),
        ("train --out run", "FILE is missing"),
        ("train text.txt --out run --batch 0", "--batch must be at least 1 and at most 1048576, got 0"),
        ("train text.txt --out run --batch many", "invalid int value: 'many'"),
        ("train text.txt --out run --tokens words", "invalid choice: 'words'"),
        ("train text.txt --out run --lr nan", "--lr must be at least 0"),
        ("train text.txt --out run --freeze brain", "--freeze must name some of embedding, encoder"),
        ("train text.txt --out run --accelerator cpu", "unrecognized arguments: --accelerator"),
        ("train text.txt --out run --label-smoothing 0.1", "not for --task lm: --label-smoothing"),
        ("train --out run --source a --target b", "not for --task lm: --source, --target"),
        ("train --resume --out run --cell gru", "leave out --cell"),
        ("train --resume --out run --hidden 7 text.txt", "leave out --hidden, FILE"),
        ("train --resume --out run --task lm --no-tie-head", "leave out --tie-head, --task"),
        ("train --resume --out run --steps 0", "--steps must be at least 1 and at most 1099511627776"),
        ("train --task sing --out run x", "invalid choice: 'sing'"),
        ("train --task translate --out run", "FILE is missing"),
        ("train --task translate --out run a b", "give pairs in one tab-separated file, or in --source and --target"),
        ("train --task translate --out run --target b", "--source and --target must be given together"),
        ("train --task translate --out run x --source a --target b", "give either a tab-separated file, or --source"),
        ("train --task translate --out run x --val-source a", "--val-source and --val-target must be given together"),
        ("train --task translate --out run x --chunk 3", "not for --task translate: --chunk"),
        ("train --resume --out run --config c.toml", "leave out --config"),
        ("tune --out run", "FILE is missing"),
        ("tune text.txt --out run --trials 0", "--trials must be at least 1 and at most 1000000, got 0"),
        ("tune text.txt --out run --folds 0", "--folds must be at least 1 and at most 1000000, got 0"),
        ("tune text.txt --out run --minutes nan", "--minutes must be at least 1e-06 and at most 100000000, got nan"),
        (
            "tune text.txt --out run --trial-steps 0",
            "--trial-steps must be at least 1 and at most 1099511627776, got 0",
        ),
        (
            "tune text.txt --out run --trial-minutes 0",
            "--trial-minutes must be at least 0.001 and at most 100000000, got 0.0",
        ),
        ("tune text.txt --out run --steps 3", "unrecognized arguments: --steps 3"),
        ("tune text.txt --out run --lr -1", "--lr must be at least 0 and at most 1e+38, got -1"),
        ("tune text.txt --out run --label-smoothing 0.1", "not for --task lm: --label-smoothing"),
        ("tune --resume --out run --folds 2 --cell gru text.txt", "leave out --folds, --cell, FILE"),
        ("eval run", "FILE is missing"),
        ("eval run --beam 0 f", "--beam must be at least 1 and at most 4096, got 0"),
        ("eval run --source f", "--source and --target must be given together"),
        ("generate run --length -1", "--length must be at least 0 and at most 1099511627776, got -1"),
        ("generate run --temperature nan", "--temperature must be at least 0 and at most 1e+30, got nan"),
        ("generate run --top-p 0", "--top-p must be above 0 and at most 1, got 0.0"),
        ("generate run --top-k 0", "--top-k must be at least 1 and at most 1099511627776"),
        ("generate run --prompt=", "--prompt must be at least one character, got ''"),
        ("translate run --batch 0", "--batch must be at least 1 and at most 1048576, got 0"),
        ("translate run --max-length 0", "--max-length must be at least 1 and at most 1000000, got 0"),
        ("translate run --length-penalty -1", "--length-penalty must be at least 0 and at most 5, got -1.0"),
        ("translate run --num-return-sequences 2", "from 1 to --beam, which is 1, got 2"),
        (
            "summarize run --no-repeat-ngram-size -1",
            "--no-repeat-ngram-size must be at least 0 and at most 1000000, got -1",
        ),
        ("train --task summarize --out run x --vocabularies two", "--copy needs --vocabularies shared, got 'two'"),
        ("explain run --text x --out x.jpg", "--out must end in .html or .png, got 'x.jpg'"),
        ("explain run --text x", "required: --out"),
        ("export run", "required: --hf"),
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments.split())
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


COMMANDS = {
    **{f"train --task {task}": "train --out run x --task " + task for task in CONFIGS},
    "tune": "tune --out run x",
    "eval": "eval run x",
    "generate": "generate run",
    "translate": "translate run",
    "summarize": "summarize run",
    "predict": "predict run x",
    "explain": "explain run --text x --out x.png",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_a_range(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is checked before a file is read."""
    line = COMMANDS[command].split()
    (subparsers,) = (each for each in _build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    numbers = [each for each in subparsers.choices[line[0]]._actions if each.type in (int, float)]
    assert len(numbers) >= (20 if "train" in command else 1)
    settings = _settings()
    for action in numbers:
        task = line[-1] if "train" in command else "lm"
        if action.dest in settings and task not in settings[action.dest]:
            continue
        for value in ("-1" + "0" * 22, "1" + "0" * 4000, *(("1e300", "nan", "-inf") if action.type is float else ())):
            with pytest.raises(SystemExit) as exit:
                main([*line, f"{action.option_strings[0]}={value}"])
            assert exit.value.code == 2
            assert f"{action.option_strings[0]} must be " in capsys.readouterr().err


def test_failures_exit_with_1_and_a_message(
    language_model: Path, translator: Path, tmp_path: Path, run: CommandLine
) -> None:
    latin, empty, good, short = (tmp_path / name for name in ("latin.txt", "empty.txt", "good.txt", "short"))
    latin.write_bytes(b"caf\xe9 " * 500)
    empty.touch()
    good.write_text("some text, " * 300)
    short.write_text("one line\n")
    plain, nowhere, new = tmp_path / "plain", tmp_path / "nowhere", tmp_path / "new"
    plain.mkdir()
    pairs = translator.parent / "pairs.tsv"
    translate = ("train", "--out", new, *translation_options())
    cases: list[tuple[tuple[object, ...], str]] = [
        (("train", latin, "--out", new, *language_options()), "latin.txt: expected UTF-8, got b'\\xe9' at byte 3"),
        (("train", empty, "--out", new), "empty.txt: expected text, got an empty file"),
        (("train", tmp_path / "no.txt", "--out", new), "no.txt: no such file"),
        (("train", good, "--out", language_model), "holds a run already"),
        (("train", good, "--out", good), "good.txt"),
        (("train", good, "--out", new, "--batch", 900), "more than batch × chunk = 900 × 64"),
        (("train", good, "--out", new, "--device", "cuda:99"), "cannot be used"),
        (("train", "--resume", "--out", plain), "holds no checkpoint"),
        (("train", "--resume", "--out", nowhere), "no such run directory"),
        ((*translate, "--source", pairs, "--target", short), f"pairs.tsv has 128 lines, {short} has 1; each line"),
        ((*translate, short), "short: line 1: expected source and target separated by a tab, got no tab"),
        (
            (*translate, pairs, "--val", pairs, "--batch", 999),
            "at least one batch of 999 pairs to train on, got ",
        ),
        (("eval", plain, good), "holds no checkpoint"),
        (("eval", language_model, tmp_path / "no.txt"), "no.txt: no such file"),
        (("eval", language_model, good, "--device", "warp"), "device 'warp' cannot be used"),
        (("generate", language_model, "--device", "meta"), "device 'meta' cannot be used: expected cpu, cuda or auto"),
        (("train", good, "--out", new, "--device", "tpu"), "device 'tpu' cannot be used: expected cpu, cuda or auto"),
        (("train", good, "--out", new, "--hidden", 1 << 20), "not enough memory; try a smaller model"),
        (("eval", language_model, good, "--cache", tmp_path), "not among the characters of the training text"),
        (("eval", language_model, "--source", good, "--target", good), "holds a language model: give it text"),
        (("eval", translator, good), "good.txt: line 1: expected source and target separated by a tab"),
        (("generate", nowhere), "no such run directory"),
        (("generate", language_model, "--prompt", "Ω"), "'Ω' (U+03A9) is not among the characters"),
        (("generate", translator), "holds a translator, not a language model; use it with llm-ext translate"),
        (("translate", language_model, good), "holds a language model, not a translator; use it with llm-ext generate"),
        (("explain", language_model, "--text", "a", "--target", "b", "--out", tmp_path / "x.png"), "has no --target"),
    ]
    for arguments, message in cases:
        code, _, errors = run(*arguments)
        assert (code, errors[:9]) == (1, "llm-ext: "), arguments
        assert message in errors, arguments
        assert "Traceback" not in errors


def test_a_bug_is_reported_in_one_line(language_model: Path, run: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(Run, "load_language_model", fail)
    code, _, errors = run("generate", language_model)
    assert (code, errors) == (1, "llm-ext: ZeroDivisionError: oops (--traceback shows where)\n")
    with pytest.raises(ZeroDivisionError):
        run("generate", language_model, "--traceback")


def test_an_interrupt_exits_with_130(language_model: Path, run: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "load_language_model", interrupt)
    assert run("generate", language_model) == (130, "", "llm-ext: interrupted\n")


def test_a_missing_package_is_named() -> None:
    code = "import sys; sys.modules['tokenizers'] = None; from llm_ext.cli import main; sys.exit(main([]))"
    done = run_python(code)
    assert done.returncode == 1
    assert done.stderr == "llm-ext: tokenizers is not installed: pip install 'llm_ext[cli]'\n"


@pytest.mark.parametrize(
    "command", [None, "train", "tune", "eval", "generate", "translate", "summarize", "predict", "explain", "export"]
)
def test_help_names_every_option_with_its_default(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*([command] if command else []), "--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "None" not in text
    if command == "train":
        for name in _settings():
            assert f"--{name.replace('_', '-')}" in text
        assert "(default: rnn for lm; gru for translate, summarize, classify and transcribe)" in text
        options = text[text.index("data:") :]
        assert options.count("(default: ") == len(_settings())
