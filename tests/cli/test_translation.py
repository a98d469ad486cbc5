from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_ext import Seq2Seq
from llm_ext.text import cli, translation
from llm_ext.text import train as training
from llm_ext.text.checkpoint import STATE, WEIGHTS, Run
from llm_ext.text.errors import TextError
from llm_ext.text.report import read_log
from llm_ext.text.train import resume, train
from llm_ext.text.translation import Translator, bleu

from .conftest import environment, options, pair_options, small, small_pairs, start
from .test_train import assert_same, log, signal_at

Command = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a translator that knows a few words, with its pairs beside it."""
    folder = tmp_path_factory.mktemp("trained")
    words = {"one": "un", "two": "deux", "six": "six", "ten": "dix"}
    lines = [(a, b) for a in words for b in words]
    (folder / "pairs.tsv").write_text("".join(f"{a} {b}\t{words[b]}, {words[a]}.\n" for a, b in lines * 8))
    settings = pair_options(
        steps=300, batch=16, hidden=32, embedding=16, lr=1e-2, dropout=0.0, validate_every=150, label_smoothing=0.0
    )
    out = folder / "run"
    assert cli.main(["train", str(folder / "pairs.tsv"), "--val", str(folder / "pairs.tsv"), "--out", str(out),
                     *settings]) == 0  # fmt: skip
    return out


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    (folder / "text.txt").write_text("one two six ten. " * 100)
    out = folder / "run"
    assert cli.main(["train", str(folder / "text.txt"), "--out", str(out), *options(steps=20)]) == 0
    return out


def translate(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], text: bytes, *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    capfd.readouterr()
    code = cli.main(["translate", *map(str, arguments)])
    return code, *capfd.readouterr()


# ---- training


@pytest.mark.parametrize(
    "settings",
    [
        {"cell": "gru"},
        {"cell": "lstm", "layers": 2, "vocabularies": "two", "tie_head": False},
        {"cell": "rnn", "input_feeding": True, "tokens": "bpe", "vocab_size": 300},
    ],
)
def test_resuming_gives_the_numbers_of_a_run_that_never_stopped(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    config = small_pairs(**settings, steps=45, patience=20)  # two passes over the pairs
    assert train(config, [pairs], tmp_path / "whole").signal == 0
    out = tmp_path / "parts"
    with monkeypatch.context() as context:
        signal_at(context, 7)
        assert train(config, [pairs], out).signal == signal.SIGINT
    assert Run(out).checkpoint("last").step == 8
    with monkeypatch.context() as context:
        signal_at(context, 20, signal.SIGTERM, during="_validate")
        assert resume(out, {}).signal == signal.SIGTERM
    with monkeypatch.context() as context:
        signal_at(context, 33)
        assert resume(out, {}).signal == signal.SIGINT
    assert resume(out, {}).signal == 0
    assert_same(tmp_path / "whole", out)
    assert len(log(out)) == 9 + 5


def test_one_file_or_two_sides(pairs: Path, tmp_path: Path) -> None:
    columns = [line.split("\t") for line in pairs.read_text().splitlines()]
    for side, name in enumerate(("en", "fr")):
        (tmp_path / name).write_text("\n".join(row[side] for row in columns))
    outs = [tmp_path / "one", tmp_path / "two"]
    train(small_pairs(), [pairs], outs[0])
    train(small_pairs(), [tmp_path / "en", tmp_path / "fr"], outs[1])
    assert log(outs[0]) == log(outs[1])


def test_two_processes_train_like_one_with_the_doubled_batch(pairs: Path, tmp_path: Path, command: Command) -> None:
    def losses(out: Path) -> list[float]:
        return [record["loss"] for record in read_log(out / "log.jsonl")]

    two, one = tmp_path / "two", tmp_path / "one"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    arguments = ["llm_ext.text.cli", "train", str(pairs), "--out", str(two), *pair_options(steps=20, dropout=0.0)]
    done = subprocess.run([*launch, *arguments], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert command("train", pairs, "--out", one, *pair_options(steps=20, batch=16, dropout=0.0))[0] == 0
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


def test_kills_lose_nothing(pairs: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "run"
    process = start("train", pairs, "--out", out, *pair_options(steps=10**6, validate_every=2))
    while not (Run(out).exists() and Run(out).checkpoint("last").step > 4):
        assert process.poll() is None, process.communicate()[1]
    process.kill()
    process.communicate()
    step = Run(out).checkpoint("last").step
    code, said, errors = command("train", "--resume", "--out", out, "--steps", step + 5)
    assert (code, errors) == (0, "")
    assert f"done: step {step + 5}; " in said


def test_another_batch_or_text_cannot_be_resumed(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(small_pairs(), [pairs], out)
    config = Run(out).checkpoint("last").path / "config.json"
    saved = config.read_text()
    value = json.loads(saved)
    value["training"]["config"]["batch"] = 5
    config.write_text(json.dumps(value))
    with pytest.raises(TextError, match="batch × processes must be 8 as before, got 5"):
        resume(out, {"steps": 40})
    config.write_text(saved)
    pairs.write_text(pairs.read_text()[:4000])
    with pytest.raises(TextError, match="the text has changed"):
        resume(out, {"steps": 40})


def test_nothing_to_validate_on(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("a\tb\n" * 20)
    with pytest.raises(TextError, match="at least one pair for validation, got none"):
        train(small_pairs(val_fraction=0.0), [tmp_path / "pairs.tsv"], tmp_path / "run")


def test_weights_that_stand_in_two_places_are_saved_once(trained: Path) -> None:
    checkpoint = Run(trained).checkpoint("best")
    weights = checkpoint.tensors(WEIGHTS)
    assert "head.weight" not in weights
    assert "target_embedding.weight" not in weights
    model = checkpoint.model()
    assert isinstance(model, Seq2Seq)
    assert model.head.weight is model.source_embedding.weight
    assert checkpoint.tensors(STATE).keys() >= {"batch", "exp_avg.readout.weight"}


# ---- translating


def test_from_pairs_to_translations(trained: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("one two\n\nsix ten\n")
    code, said, errors = command("translate", trained, tmp_path / "lines")
    assert (code, said, errors) == (0, "deux, un.\n\ndix, six.\n", "")
    code, said, errors = command("eval", trained, trained.parent / "pairs.tsv")
    assert (code, errors) == (0, "")
    assert "nats a token, over " in said
    assert "BLEU        100.00 over 128 lines (nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:" in said


def test_the_options_of_a_search(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = b"one two\n\nten ten\nsix one\n"
    expected = "deux, un.\n\ndix, dix.\nun, six.\n"
    for arguments in ((), ("--beam", 3), ("--batch", 1), ("--batch", 2, "--beam", 2), ("--length-penalty", 0)):
        assert translate(monkeypatch, capfd, text, trained, *arguments) == (0, expected, "")
    code, said, errors = translate(
        monkeypatch, capfd, text, trained, "--beam", 3, "--num-return-sequences", 2, "--max-length", 9
    )
    lines = said.split("\n")
    assert (code, errors, len(lines)) == (0, "", 2 * 4 + 1)
    assert (lines[0], lines[4], lines[6]) == ("deux, un.", "dix, dix.", "un, six.")
    assert lines[2] == lines[3] == ""
    assert lines[1] != lines[0]
    assert translate(monkeypatch, capfd, b"", trained) == (0, "", "")
    assert translate(monkeypatch, capfd, b"one two\n", trained, "--max-length", 3)[1] == "deu\n"


def test_many_lines_keep_their_order(trained: Path) -> None:
    """More than are read ahead, of lengths that batches mix."""
    translator = Translator.load(Run(trained), "best", CPU)
    lines = [(f"line {n}", "one two" if n % 3 else "six") for n in range(1100)]
    alone = {text: next(translator.lines([("", text)], 1, print))[0] for text in ("one two", "six")}
    assert [row[0] for row in translator.lines(lines, 32, print)] == [alone[text] for _, text in lines]


def test_many_tokens_are_looked_up_in_tables(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are made once, and not for less than a vocabulary or of more memory than is meant for them."""
    translator = Translator.load(Run(trained), "best", CPU)
    made: list[object] = []
    tables = translator.model.tables
    monkeypatch.setattr(translator.model, "tables", lambda: made.append(1) or tables())
    lines = [("", text) for text in ("one two", "six", "ten ten") * 700]

    def translations(count: int, **options: Any) -> list[str]:
        made.clear()
        return [row[0] for row in translator.lines(lines[:count], 32, print, **options)]

    assert translations(1) == ["deux, un."]
    assert made == []
    few = translations(3)
    assert few[0] == "deux, un."
    assert made == [1]
    assert translations(len(lines)) == few * 700
    assert len(made) == 1
    assert translations(len(lines), beam=2) == few * 700
    assert len(made) == 1
    monkeypatch.setattr(translation, "TABLE_BYTES", 1000)
    assert translations(len(lines)) == few * 700
    assert made == []


def test_a_token_never_seen_is_named_and_the_lines_before_it_come(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = "one two\nten Ω\nsix six\n".encode()
    for batch in (1, 32):
        code, said, errors = translate(monkeypatch, capfd, text, trained, "--batch", batch)
        assert (code, said) == (1, "deux, un.\n")
        assert errors == "llm-ext: line 2: 'Ω' (U+03A9) is not among the characters of the training text\n".replace(
            "'Ω'", "the character 'Ω'"
        )
    (tmp_path / "lines").write_bytes(b"one two\ncaf\xe9\n")
    code, said, errors = translate(monkeypatch, capfd, b"", trained, tmp_path / "lines")
    assert (code, said) == (1, "deux, un.\n")
    assert "lines: line 2: expected UTF-8, got b'\\xe9' at byte 3 of the line" in errors


def test_a_line_far_longer_than_any_seen(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = b"one two\n" + b"six " * 100 + b"\n"
    code, said, errors = translate(monkeypatch, capfd, text, trained, "--max-length", 20)
    assert code == 0
    assert said.startswith("deux, un.\n")
    assert said.count("\n") == 2
    assert "line 2: 399 tokens, where the longest source of the training had 7; the translation may be poor" in errors


def test_text_comes_as_it_is_found(trained: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_ext.text.cli", "translate", str(trained), "--batch", "1"],
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    for line, expected in (("one two", "deux, un."), ("ten six", "six, dix.")):
        process.stdin.write(f"{line}\n")
        assert process.stdout.readline() == f"{expected}\n"  # though the input has not ended
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    translator = Translator.load(Run(trained), "best", CPU)
    assert len(list(translator.stream(translator.encode("one two", "", print)))) > 3


def test_bleu_with_several_references() -> None:
    assert bleu(["a b c d e"], [["a b c d e"]])[0] == pytest.approx(100)
    assert bleu(["a b c d e", "x y z u v"], [["q", "x y z u v"], ["a b c d e", None]])[0] == pytest.approx(100)
    assert bleu(["a b c d e"], [["f g h i j"]])[0] < 20


# ---- the other task, and wrong command lines


def test_a_checkpoint_of_the_other_task(
    trained: Path, language_model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pairs, text = str(trained.parent / "pairs.tsv"), str(language_model.parent / "text.txt")
    for arguments, message in (
        (["generate", trained], f"{trained}: holds a translator, not a language model; llm-ext translate uses it"),
        (["translate", language_model, text], "holds a language model, which cannot translate; llm-ext generate uses"),
        (["eval", language_model, "--source", text, "--target", text], "holds a language model: give it text"),
        (["eval", trained, text], "text.txt: line 1: expected source and target with a tab between"),
        (["explain", language_model, "--text", "a", "--target", "b", "--out", tmp_path / "x.png"], "has no --target"),
        (["eval", tmp_path, pairs], "holds no checkpoint"),
        (["translate", tmp_path / "nowhere", pairs], "no such run directory"),
    ):
        assert cli.main([str(argument) for argument in arguments]) == 1, arguments
        errors = capsys.readouterr().err
        assert errors.startswith("llm-ext: ")
        assert message in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["translate", "run", "--beam", "0"], "--beam must be at least 1, got 0"),
        (["translate", "run", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["translate", "run", "--max-length", "0"], "--max-length must be at least 1, got 0"),
        (["translate", "run", "--length-penalty", "-1"], "--length-penalty must be at least 0, got -1.0"),
        (["translate", "run", "--num-return-sequences", "2"], "from 1 to --beam, which is 1, got 2"),
        (["eval", "run", "--beam", "0", "f"], "--beam must be at least 1, got 0"),
        (["eval", "run", "--source", "f"], "--source and --target belong together"),
        (["explain", "run", "--text", "x", "--out", "x.jpg"], "--out must end in .html or .png, got 'x.jpg'"),
        (["explain", "run", "--text", "x"], "required: --out"),
        (["train", "--task", "translate", "--out", "run"], "FILE is missing"),
        (["train", "--task", "translate", "--out", "run", "a", "b"], "pairs come in one tab-separated file or in"),
        (["train", "--task", "translate", "--out", "run", "--target", "b"], "--source and --target belong together"),
        (["train", "--task", "translate", "--out", "r", "x", "--source", "a", "--target", "b"], "give either"),
        (["train", "--task", "translate", "--out", "run", "x", "--chunk", "3"], "not for --task translate: --chunk"),
        (["train", "--out", "run", "x", "--label-smoothing", "0.1"], "not for --task lm: --label-smoothing"),
        (["train", "--out", "run", "--source", "a", "--target", "b"], "not for --task lm: --source, --target"),
        (["train", "--task", "sing", "--out", "run", "x"], "invalid choice: 'sing'"),
        (["train", "--resume", "--out", "run", "--task", "lm"], "leave out --task"),
        (["train", "--resume", "--out", "run", "--no-tie-head"], "leave out --tie-head"),
        (["train", "--out", "run", "x", "--freeze", "brain"], "--freeze must name some of embedding, encoder"),
    ],
)
def test_a_wrong_command_line_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_failures_of_training_say_what_and_where(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short"
    short.write_text("one line\n")
    for arguments, message in (
        (["--source", pairs, "--target", short], "pairs.tsv has 200 lines, " + str(short) + " has 1; each line"),
        ([short], "short: line 1: expected source and target with a tab between, got no tab"),
        ([pairs, "--batch", "999"], "at least batch × processes = 999 pairs to train on, got "),
        ([tmp_path / "no"], "no: no such file"),
        ([pairs, "--init-from", tmp_path / "nowhere"], "no such run directory"),
    ):
        out = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        command = ["train", "--out", out, *pair_options(), *arguments]
        assert cli.main([str(argument) for argument in command]) == 1
        assert message in capsys.readouterr().err


# ---- from one run to another


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(Run(out).checkpoint("last").model().named_parameters(remove_duplicate=False))


def before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop every training before its first step, so that what it starts with is saved."""
    monkeypatch.setattr(training._Trainer, "_introduce", lambda self: os.kill(os.getpid(), signal.SIGTERM))


@pytest.mark.parametrize("part", ["all", "encoder", "embedding"])
def test_weights_are_taken_over_by_token(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Into a vocabulary with other characters, in other places."""
    (tmp_path / "pairs.tsv").write_text("".join(f"{a} zone\tUN {a}\n" for a in ("one", "two", "six") * 9))
    before_training(monkeypatch)
    common = {"hidden": 32, "embedding": 16}
    files = [tmp_path / "pairs.tsv"]
    train(small_pairs(**common), files, tmp_path / "new", val=files)
    train(small_pairs(**common, init_from=str(trained), init=part), files, tmp_path / "run", val=files)
    new, got, given = (weights(path) for path in (tmp_path / "new", tmp_path / "run", trained))
    characters = [
        json.loads((path / "vocabulary.json").read_text())["characters"] for path in (tmp_path / "run", trained)
    ]
    assert characters[0] != characters[1]
    for row, character in enumerate(characters[0] + "\n"):  # the last row is the end of a line
        there = (characters[1] + "\n").find(character)
        expected = given["source_embedding.weight"][there] if there >= 0 else new["source_embedding.weight"][row]
        assert torch.equal(got["source_embedding.weight"][row], expected)
    for name in ("encoder.weight_hh_l0_reverse", "decoder.weight_ih_l0", "attention.v", "head.bias"):
        taken = part == "all" or (part == "encoder" and name.startswith("encoder"))
        if name == "head.bias":
            row, there = (text.index("x") for text in characters)
            assert torch.equal(got[name][row], (given[name][there] if taken else new[name][row]))
        else:
            assert torch.equal(got[name], (given if taken else new)[name])


def test_what_a_language_model_learnt_serves_a_translator_and_back(
    trained: Path, language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_training(monkeypatch)
    pairs, text = trained.parent / "pairs.tsv", language_model.parent / "text.txt"
    sizes = {"hidden": 16, "embedding": 8, "cell": "rnn", "init": "encoder"}
    train(small_pairs(**sizes, init_from=str(language_model)), [pairs], tmp_path / "a", val=[pairs])
    there, here = weights(language_model), weights(tmp_path / "a")
    assert torch.equal(here["encoder.weight_hh_l0"], there["rnn.weight_hh_l0"])
    assert not torch.equal(here["encoder.weight_hh_l0_reverse"], there["rnn.weight_hh_l0"])
    sizes = {"hidden": 32, "embedding": 16, "cell": "gru", "init": "encoder"}
    train(small(**sizes, init_from=str(trained)), [text], tmp_path / "b")
    there, here = weights(trained), weights(tmp_path / "b")
    assert torch.equal(here["rnn.weight_hh_l0"], there["encoder.weight_hh_l0"])
    sides = [
        Run(path).vocabularies(Run(path).checkpoint("last").model())[0].pieces for path in (tmp_path / "b", trained)
    ]
    assert torch.equal(
        here["embedding.weight"][sides[0].index(b"x")], there["source_embedding.weight"][sides[1].index(b"x")]
    )
    with pytest.raises(TextError, match="holds a translator, this is a language model; --init encoder or"):
        train(small(init_from=str(trained)), [text], tmp_path / "c")
    with pytest.raises(
        TextError, match=r"encoder.weight_ih_l0 is \[96, 16\] there, encoder.weight_ih_l0 is \[48, 16\]"
    ):
        train(small_pairs(embedding=16, init_from=str(trained)), [pairs], tmp_path / "d", val=[pairs])
    config = small_pairs(embedding=16, hidden=32, layers=2, init_from=str(trained), init="encoder")
    with pytest.raises(TextError, match=r"encoder.weight_ih_l1 is missing there"):
        train(config, [pairs], tmp_path / "e", val=[pairs])


def test_a_run_goes_on_from_what_it_took_over(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What one task taught is there: the loss starts where the other run's ended."""
    pairs = trained.parent / "pairs.tsv"
    config = small_pairs(hidden=32, embedding=16, steps=10, lr=1e-6, dropout=0.0, init_from=str(trained))
    outcome = train(config, [pairs], tmp_path / "run", val=[pairs])
    taught = Run(trained).checkpoint("best").config["training"]["progress"]["best_loss"]
    assert outcome.progress.best_loss == pytest.approx(taught, abs=1e-3)
    assert f"tensors from {trained}; of " in capfd.readouterr().out


def test_what_is_frozen_stays(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_pairs(freeze="encoder,embedding", tie_head=False, steps=20)
    with monkeypatch.context() as context:
        before_training(context)
        train(config, [pairs], tmp_path / "start")
    out = tmp_path / "run"
    with monkeypatch.context() as context:
        signal_at(context, 7)
        train(config, [pairs], out)
    resume(out, {})
    start, end = weights(tmp_path / "start"), weights(out)
    for name, parameter in end.items():
        frozen = name.startswith(("encoder.", "source_embedding.", "target_embedding."))
        assert torch.equal(parameter, start[name]) == frozen, name
    train(config, [pairs], tmp_path / "whole")
    assert_same(out, tmp_path / "whole")


def test_what_cannot_be_frozen(pairs: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="this model has no decoder; it has embedding, encoder, attention, head"):
        train(small(freeze="decoder"), [text], tmp_path / "a")
    with pytest.raises(TextError, match="leaves nothing to train"):
        train(small_pairs(freeze="embedding,encoder,attention,decoder,head"), [pairs], tmp_path / "b")


# ---- pictures


def test_a_picture_of_a_translation(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ending in ("html", "png"):
        out = tmp_path / f"picture.{ending}"
        assert cli.main(["explain", str(trained), "--text", "one two", "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"deux, un.\nsaved in {out}\n"
    page = (tmp_path / "picture.html").read_text()
    for word in ("one", "two", "deux,", "un.", "attention: 0 %", "100 %"):
        assert word in page
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_a_language_model(
    language_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "picture.html"
    assert cli.main(["explain", str(language_model), "--text", "one two six", "--out", str(out)]) == 0
    assert "nats a token over 10 tokens" in capsys.readouterr().out
    page = out.read_text()
    assert page.count("<td class=none>") == 1  # of two predicted words, the first has not seen the second
    assert cli.main(["explain", str(language_model), "--text", "one", "--out", str(out)]) == 1
    assert "--text must hold at least two words, got 'one'" in capsys.readouterr().err
    assert out.read_text() == page


@pytest.mark.parametrize("settings", [{}, {"cell": "lstm", "layers": 2, "input_feeding": True}])
def test_bf16(pairs: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    outcome = train(small_pairs(precision="bf16-mixed", dropout=0.0, **settings), [pairs], tmp_path / "run")
    exact = train(small_pairs(dropout=0.0, **settings), [pairs], tmp_path / "exact")
    assert outcome.progress.best_loss == pytest.approx(exact.progress.best_loss, abs=0.03)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run").values())
