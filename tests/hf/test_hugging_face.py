"""llm_ext.hf: the models in transformers compared with `LLM` and `Seq2Seq` themselves, and `llm-ext export`."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cli_runs import ROOT, language_config, translation_config
from support.comparison import assert_close, assert_same_bits
from torch import Tensor

import llm_ext

transformers = pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("accelerate", reason="transformers.Trainer needs it")

from llm_ext import hf  # noqa: E402
from llm_ext.cli import CommandError, main  # noqa: E402
from llm_ext.cli.checkpoint import Checkpoint, Run  # noqa: E402
from llm_ext.cli.data import LineTokenizer  # noqa: E402
from llm_ext.cli.data.tokenizer import tokenizer_from_texts  # noqa: E402
from llm_ext.cli.inference import Translator  # noqa: E402
from llm_ext.cli.inference.hugging_face import export, fast_line_tokenizer, fast_tokenizer  # noqa: E402
from llm_ext.cli.training import train  # noqa: E402
from llm_ext.models.beam_search import length_limits  # noqa: E402

V, END = 13, 12
# An id outside of the vocabulary: padding is never read.
PAD = 99
every_cell = pytest.mark.parametrize(("cell", "attention"), [("rnn", "hidden"), ("gru", "embedding"), ("lstm", "none")])
every_translator = pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_embedding": True, "tie_head": True, "cell": "rnn"},
        {"tie_head": True, "input_feeding": True, "cell": "lstm"},
        {"share_embedding": True, "copy": True},
    ],
    ids=("separate", "shared and tied", "input feeding", "copying"),
)


def language_model(**options: Any) -> tuple[llm_ext.LLM, hf.LLMForCausalLM]:
    model = llm_ext.LLM(V, 5, 17, V, 2, 0.0, dtype=torch.float64, **options).eval()
    return model, hf.LLMForCausalLM.wrap(model)


def translator(**options: Any) -> tuple[llm_ext.Seq2Seq, hf.Seq2SeqForConditionalGeneration]:
    model = llm_ext.Seq2Seq(V, V, 5, 17, 2, dtype=torch.float64, **options).eval()
    # Sharper scores than those of a new model, so that targets differ and end.
    with torch.no_grad():
        model.head.weight.mul_(20)
    ids = {"pad_token_id": END, "eos_token_id": END, "decoder_start_token_id": END}
    return model, hf.Seq2SeqForConditionalGeneration.wrap(model, **ids)


def pad(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask of rows padded on a side; "inside" puts the padding after the first token."""
    T = max(map(len, rows))
    ids, mask = torch.full((len(rows), T), PAD), torch.zeros(len(rows), T, dtype=torch.int64)
    for n, row in enumerate(rows):
        places = {
            "left": torch.arange(T - len(row), T),
            "right": torch.arange(len(row)),
            "inside": torch.cat((torch.zeros(1, dtype=torch.int64), torch.arange(T - len(row) + 1, T))),
        }[side]
        ids[n, places], mask[n, places] = row, 1
    return ids, mask


def without_end(ids: Tensor) -> list[int]:
    return [i for i in ids.tolist() if i != END]


# ---- language models


@every_cell
def test_generated_ids_are_those_of_llm(cell: str, attention: str) -> None:
    """Also from padded prompts, each row as if it were alone; a cache changes the cost only."""
    ours, theirs = language_model(cell=cell, attention=attention)
    rows = [torch.randint(V, (n,)) for n in (6, 1, 4)]
    ids, mask = pad(rows, "left")
    found = theirs.generate(ids, attention_mask=mask, max_new_tokens=9, pad_token_id=PAD)
    assert_same_bits(found, theirs.generate(ids, max_new_tokens=9, pad_token_id=PAD, use_cache=False))
    for row, new in zip(rows, found[:, 6:], strict=True):
        assert_same_bits(new, ours.generate(row, 9, temperature=0)[len(row) :])
    beams = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 7, "pad_token_id": PAD}
    found = theirs.generate(ids, attention_mask=mask, **beams)
    assert_same_bits(found, theirs.generate(ids, attention_mask=mask, use_cache=False, **beams))
    assert found.unique(dim=0).shape == (6, 13)


def test_a_step_reads_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = language_model()
    read, lengths = ours.rnn.forward, []

    def count(x: Tensor, *rest: Any, **more: Any) -> Any:
        lengths.append(len(x))
        return read(x, *rest, **more)

    monkeypatch.setattr(ours.rnn, "forward", count)
    theirs.generate(torch.randint(V, (2, 6)), max_new_tokens=4, do_sample=True)
    assert lengths == [6, 1, 1, 1]


def test_generation_continues_from_a_cache() -> None:
    ours, theirs = language_model(cell="lstm", feature_dim=3)
    ids = torch.randint(V, (2, 6))
    first = theirs.generate(ids, max_new_tokens=4, return_dict_in_generate=True)
    assert first.cache.get_seq_length() == 9
    expected = theirs.generate(ids, max_new_tokens=9)
    assert_same_bits(theirs.generate(first.sequences, cache=first.cache, max_new_tokens=5), expected)
    # The state of features, and embeddings in place of ids.
    state = ours.condition(torch.randn(2, 3, dtype=torch.float64))
    found = theirs.generate(ids, cache=hf.RecurrentCache(state), max_new_tokens=4)
    assert_same_bits(found, ours.generate(ids, 4, temperature=0, state=state))
    embeddings = theirs.get_input_embeddings()(ids)
    assert_same_bits(theirs.generate(inputs_embeds=embeddings, max_new_tokens=9), expected[:, 6:])
    # A cache that is given is advanced in training, too.
    cache = hf.RecurrentCache()
    pieces = [theirs.train()(piece, cache=cache).logits for piece in (ids[:, :4], ids[:, 4:])]
    assert_close("model", torch.cat(pieces, 1), ours(ids)[0])
    assert (cache.get_seq_length(), len(cache)) == (6, 2)
    theirs.eval()
    # A mask that begins with the tokens before: the first of these has no padding, and the last row has one token more.
    mask, padded_cache = torch.ones(2, 6), hf.RecurrentCache()
    theirs(ids[:, :3], cache=padded_cache)
    mask[1, 4:] = 0
    theirs(ids[:, 3:], attention_mask=mask, cache=padded_cache)
    found_state: Any = padded_cache.state
    expected_state = [ours(row[None])[1].hidden for row in (ids[0], ids[1, :4])]
    assert_close("model", found_state.hidden, torch.cat(expected_state, 1))
    cache = hf.RecurrentCache(state)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 2]))
    assert_same_bits(cache.state, tuple(state))
    fed: Any = llm_ext.models.Seq2SeqState(torch.randn(2, 3, 4), None, torch.randn(3, 5))
    fed_cache: Any = hf.RecurrentCache(fed)
    fed_cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert_same_bits(fed_cache.state.fed, fed.fed[[2, 0, 0]])
    with pytest.raises(ValueError, match="cannot go back"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="stateful"):
        theirs.generate(ids, assistant_model=theirs, max_new_tokens=4)


def test_streamers_and_sampling() -> None:
    _, theirs = language_model()
    pieces: list[Tensor] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            pieces.append(value.flatten())

        def end(self) -> None:
            pass

    ids = torch.randint(V, (1, 5))
    torch.manual_seed(1)
    found = theirs.generate(ids, max_new_tokens=8, do_sample=True, top_k=5, streamer=Streamer())
    assert_same_bits(torch.cat(pieces), found[0])
    torch.manual_seed(1)
    assert_same_bits(found, theirs.generate(ids, max_new_tokens=8, do_sample=True, top_k=5, use_cache=False))


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@every_cell
def test_padding_leaves_loss_and_gradients(cell: str, attention: str, side: str) -> None:
    """They are those of the rows one by one."""
    ours, theirs = language_model(cell=cell, attention=attention)
    rows = [torch.randint(V, (n,)) for n in (6, 3, 1)]
    ids, mask = pad(rows, side)
    out = theirs.train()(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    assert out.cache is None
    out.loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in ours.named_parameters() if parameter.grad is not None}
    ours.zero_grad()
    # A token after padding inside of a row is not predicted.
    firsts = (1, 2 if side == "inside" else 1)
    expected = torch.zeros((), dtype=torch.float64)
    for row, first in zip(rows, firsts, strict=False):
        expected += F.cross_entropy(ours(row[None])[0][0, first - 1 : -1], row[first:], reduction="sum")
    expected = expected / (5 + 3 - firsts[1])
    torch.autograd.backward(expected)
    assert_close("model", out.loss, expected.float(), "loss")
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        # transformers computes losses in float32.
        assert_close("model", found[name], parameter.grad, name, torch.float32)


def test_a_new_model_is_initialized_as_an_llm() -> None:
    theirs = hf.LLMForCausalLM(hf.LLMConfig(vocab_size=V, embedding_dim=400, hidden_dim=64, n_layers=2, cell="lstm"))
    parameters = dict(theirs.model.rnn.named_parameters())
    U = parameters["weight_hh_l1"].view(4, 64, 64)
    assert_close("model", U @ U.mT, torch.eye(64).expand(4, 64, 64))
    assert_same_bits(parameters["bias_ih_l0"].view(4, 64)[1], torch.ones(64))
    assert not theirs.model.head.bias.any()
    assert 0.9 < theirs.model.embedding.weight.std() < 1.1
    ids = {"eos_token_id": 0, "decoder_start_token_id": 0}
    tied = hf.Seq2SeqForConditionalGeneration(hf.Seq2SeqConfig(embedding_dim=400, hidden_dim=8, tie_head=True, **ids))
    assert tied.model.head.weight is tied.model.target_embedding.weight
    assert 0.045 < tied.model.head.weight.std() < 0.055


@every_cell
def test_models_are_saved_and_loaded(cell: str, attention: str, tmp_path: Path) -> None:
    _, theirs = language_model(cell=cell, attention=attention, score="tanh")
    ids = torch.randint(V, (2, 6))
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(loaded, hf.LLMForCausalLM)
    assert_same_bits(loaded(ids).logits, theirs(ids).logits)
    assert_same_bits(loaded(ids, return_dict=False)[0], theirs(ids).logits)
    assert loaded.model.config() == theirs.model.config()
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16
    assert transformers.AutoConfig.from_pretrained(tmp_path).hidden_size == 17


def test_the_vocabulary_is_resized() -> None:
    ours, theirs = language_model()
    ids, U = torch.randint(V, (2, 6)), ours.rnn.weight_hh_l0
    before = theirs(ids).logits
    mean = ours.embedding.weight.mean(0)
    embedding = theirs.resize_token_embeddings(15)
    assert_close("model", embedding.weight[14], mean)
    assert_same_bits(theirs(ids).logits[..., :V], before)
    assert theirs.model.rnn.weight_hh_l0 is U
    theirs.resize_token_embeddings(pad_to_multiple_of=8, mean_resizing=False)
    assert (theirs.config.vocab_size, theirs.model.config()["output_dim"]) == (16, 16)
    theirs.resize_token_embeddings(V)
    assert_same_bits(theirs(ids).logits, before)
    _, shared = translator(share_embedding=True, tie_head=True)
    before = shared(ids, labels=ids).logits
    shared.resize_token_embeddings(20)
    assert_same_bits(shared(ids, labels=ids).logits[..., :V], before)
    assert shared.model.head.weight is shared.get_input_embeddings().weight
    shared.resize_token_embeddings(500, mean_resizing=False)
    head = shared.get_output_embeddings()
    assert 0.9 < float(head.weight.detach()[20:].std()) * head.in_features**0.5 < 1.1
    embedding = llm_ext.nn.AffineEmbedding(500, head.in_features)
    shared.set_input_embeddings(embedding)
    assert shared.model.target_embedding is shared.model.source_embedding is embedding
    with pytest.raises(ValueError, match="must share one embedding"):
        translator()[1].resize_token_embeddings(20)


@pytest.mark.parametrize("mean", [False, True])
def test_resizing_leaves_everything_else(mean: bool) -> None:
    """Hooks, modes and frozen parameters stay, and a size that is refused changes nothing."""
    shared, tied = {"share_embedding": True}, {"share_embedding": True, "tie_head": True}
    for theirs in (language_model()[1], translator(**shared)[1], translator(**tied)[1]):
        calls: list[torch.nn.Module] = []
        modules = dict(theirs.named_modules())
        theirs.get_output_embeddings().register_forward_hook(lambda module, *_: calls.append(module))  # noqa: B023
        theirs.get_input_embeddings().weight.requires_grad_(False)
        theirs.train()
        theirs.get_input_embeddings().eval()
        state, config = theirs.state_dict(), theirs.config.to_dict()
        with pytest.raises(ValueError, match="new_num_tokens must be at least 1, got 0"):
            theirs.resize_token_embeddings(0)
        assert theirs.config.to_dict() == config
        theirs.resize_token_embeddings(20, mean_resizing=mean)
        assert dict(theirs.named_modules()) == modules
        assert not theirs.get_input_embeddings().training
        assert theirs.get_output_embeddings().out_features == theirs.get_input_embeddings().num_embeddings == 20
        assert not theirs.get_input_embeddings().weight.requires_grad
        assert theirs.config.build().state_dict().keys() == theirs.model.state_dict().keys()
        for name, tensor in theirs.config.build().state_dict().items():
            assert tensor.shape == theirs.model.state_dict()[name].shape
        assert theirs.model.config() == theirs.config.build().config()
        assert_same_bits([theirs.state_dict()[name][: len(t)] for name, t in state.items()], list(state.values()))
        ids = torch.randint(20, (2, 6))
        theirs(ids, labels=ids)
        assert calls == [theirs.get_output_embeddings()]


def test_what_is_refused() -> None:
    _, theirs = language_model()
    ids = torch.randint(V, (2, 6))
    with pytest.raises(TypeError, match="must be a RecurrentCache, got DynamicCache"):
        theirs(ids, cache=transformers.DynamicCache())
    with pytest.raises(TypeError, match="must hold the state of this model, LLMState, got Seq2SeqState"):
        theirs(ids, cache=hf.RecurrentCache(translator()[0].encode(ids)[1]))
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        theirs.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        theirs()
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, T\] = \[2, 6\] or longer, got \[2, 5\]"):
        theirs(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"output_dim must be vocab_size = 13, got 7"):
        hf.LLMForCausalLM.wrap(llm_ext.LLM(V, 5, 17, 7, 1, 0.0))
    with pytest.raises(ValueError, match="sources must be token ids"):
        hf.Seq2SeqForConditionalGeneration.wrap(llm_ext.Seq2Seq(None, V, 5, 17, source_feature_dim=3))
    _, theirs = translator()
    with pytest.raises(ValueError, match="decoder_input_ids or labels must be given"):
        theirs(ids)
    with pytest.raises(ValueError, match="must have no padding"):
        theirs(ids, decoder_input_ids=ids, decoder_attention_mask=torch.eye(2, 6), use_cache=True)


# ---- translators


def test_a_wrapped_model_keeps_mode_and_dtype() -> None:
    for training, dtype in ((True, torch.float64), (False, torch.bfloat16)):
        model = llm_ext.LLM(V, 5, 17, V, 1, 0.0, dtype=dtype).train(training)
        wrapped = hf.LLMForCausalLM.wrap(model)
        assert (wrapped.training, model.training, wrapped.config.dtype) == (training, training, dtype)


def test_a_model_without_parameters_is_refused() -> None:
    model = llm_ext.LLM(V, 5, 17, V, 1, 0.0, attention="none").eval()
    llm_ext.quantize_(model)
    with pytest.raises(ValueError, match=r"takes no model without parameters; call llm_ext\.dequantize_ first"):
        hf.LLMForCausalLM.wrap(model)
    hf.LLMForCausalLM.wrap(llm_ext.dequantize_(model))


@every_translator
def test_targets_are_those_of_seq2seq(options: dict[str, Any]) -> None:
    """Padded sources on either side, greedy and by beams, with and without a cache."""
    ours, theirs = translator(**options)
    rows = [torch.randint(END, (n,)) for n in (6, 2, 4)]
    for side in ("left", "right"):
        ids, mask = pad(rows, side)
        search = {"attention_mask": mask, "max_new_tokens": 9}
        greedy = theirs.generate(ids, **search)
        beams = theirs.generate(ids, num_beams=3, num_return_sequences=2, **search)
        assert_same_bits(beams, theirs.generate(ids, num_beams=3, num_return_sequences=2, use_cache=False, **search))
        for n, row in enumerate(rows):
            (best,) = ours.search(row[None], END, beam=1, max_length=9)[0]
            assert without_end(greedy[n]) == best.ids.tolist()
            alone = theirs.generate(row[None], num_beams=3, num_return_sequences=2, max_new_tokens=9)
            assert [*map(without_end, alone)] == [*map(without_end, beams[2 * n : 2 * n + 2])]


@every_translator
def test_training_of_a_translator(options: dict[str, Any], tmp_path: Path) -> None:
    """The loss is that of `Seq2Seq`, whatever the padding; a saved model has the parameters once, and shared."""
    ours, theirs = translator(**options)
    sources, targets = ([torch.randint(END, (n,)) for n in sizes] for sizes in ((6, 2), (3, 5)))
    source, mask = pad(sources, "left")
    target, kept = pad(targets, "right")
    labels = target.masked_fill(kept == 0, -100)
    loss = theirs(source, mask, labels=labels).loss
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(sources, targets, strict=True):
        read = torch.cat((torch.tensor([END]), y[:-1]))
        total += F.cross_entropy(ours(x[None], read[None])[0], y, reduction="sum")
    assert_close("model", loss, (total / 8).float(), "loss")
    read = theirs.prepare_decoder_input_ids_from_labels(labels)
    steps = theirs(source, mask, decoder_input_ids=read, use_cache=True)
    assert_close("model", steps.logits[kept.bool()], theirs(source, mask, labels=labels).logits[kept.bool()])
    shifted, left = pad([torch.cat((torch.tensor([END]), y[:-1])) for y in targets], "left")
    aligned = theirs(source, mask, decoder_input_ids=shifted, decoder_attention_mask=left).logits
    assert_close("model", aligned[left.bool()], steps.logits[kept.bool()])
    theirs.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_bits(loaded(source, mask, labels=labels).loss, loss)
    assert loaded.num_parameters() == theirs.num_parameters() == sum(p.numel() for p in ours.parameters())
    assert loaded.generation_config.decoder_start_token_id == END


# ---- Trainer, pipeline and export


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of language models, by their tokens, and of translators, by their vocabularies."""
    folder = tmp_path_factory.mktemp("runs")
    text, pairs = folder / "text.txt", folder / "pairs.tsv"
    text.write_text("schöne Grüße\nan  alle. " * 300, encoding="utf-8")
    words = {"one": "un", "two": "deux", "six": "six", "ten": "dix"}
    pairs.write_text("".join(f"{a} {b}\t{words[b]}, {words[a]}.\n" for a in words for b in words) * 8)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_ext.cli.training.pipeline.plot_loss", lambda *_: None)
        for tokens in ("bytes", "chars", "bpe"):
            found[tokens] = folder / tokens
            train(language_config(steps=5, tokens=tokens, vocab_size=270), [text], found[tokens])
        for vocabularies, tokens in (("shared", "bpe"), ("two", "chars")):
            found[vocabularies] = folder / vocabularies
            options = {"steps": 150, "lr": 1e-2, "hidden": 32, "dropout": 0.0, "vocab_size": 270}
            config = translation_config(tokens=tokens, vocabularies=vocabularies, **options)
            train(config, [pairs], found[vocabularies], val=[pairs])
    return found


@pytest.mark.parametrize("tokens", ["bytes", "chars", "bpe"])
def test_an_exported_language_model(
    runs: dict[str, Path], tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, tokenizer = Run(runs[tokens]).load_language_model("best")
    assert main(["export", str(runs[tokens]), "--hf", str(tmp_path)]) == 0
    assert "LLMForCausalLM and its tokenizer" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for line in ("Grüße\nan  alle. ", "\n\n a", "e"):
        assert fast(line).input_ids == tokenizer.encode(line).tolist()
        assert fast.decode(fast(line).input_ids) == line
    prompts = ["schöne ", "a"]
    batch = fast(prompts, padding=True, return_tensors="pt")
    assert len(fast) == theirs.config.vocab_size == ours.vocab_size + 1
    assert batch.input_ids[1, 0] == fast.pad_token_id == ours.vocab_size
    scores = theirs(batch.input_ids[:1]).logits
    assert_same_bits(scores[..., :-1], ours(batch.input_ids[:1])[0])
    assert not scores.softmax(-1)[..., -1].any()
    pipe = transformers.pipeline("text-generation", model=theirs, tokenizer=fast, device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False, "batch_size": 2}
    for prompt, (found,) in zip(prompts, pipe(prompts, **options), strict=True):
        expected = ours.generate(torch.tensor(tokenizer.encode(prompt).tolist()), 6, temperature=0)
        assert found["generated_text"] == tokenizer.decode(expected.tolist())
    assert main(["export", str(runs[tokens]), "--hf", str(tmp_path)]) == 1
    assert "must be a new or an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("vocabularies", ["shared", "two"])
def test_an_exported_translator(runs: dict[str, Path], vocabularies: str, tmp_path: Path) -> None:
    translate = Translator.load(Run(runs[vocabularies]), "best", torch.device("cpu"))
    export(Run(runs[vocabularies]), "best", tmp_path)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    target = transformers.AutoTokenizer.from_pretrained(tmp_path / "target") if vocabularies == "two" else fast
    lines = ["two one", " ten", "six  six"]
    for line in lines:
        assert fast(line).input_ids == [*translate.source.encode(line.strip()), translate.source.end]
    found = theirs.generate(**fast(lines, padding=True, return_tensors="pt"))
    most = theirs.generation_config.max_length - 1
    assert translate.longest is not None
    assert most == length_limits(torch.empty(1, translate.longest), None, None)
    expected = translate.translate([translate.source.encode(line.strip()).tolist() for line in lines], max_length=most)
    assert target.batch_decode(found, skip_special_tokens=True) == [row[0] for row in expected]
    assert len({row[0] for row in expected}) > 1


def test_tokenizers_keep_their_ids(tmp_path: Path) -> None:
    texts = ["Grüße, it's </s> 12\n", "  zwei   Wörter\r\n"]
    for kind in ("bytes", "chars", "bpe"):
        tokenizer = tokenizer_from_texts(kind, texts, 262)
        fast, lines = fast_tokenizer(tokenizer), fast_line_tokenizer(LineTokenizer(tokenizer), longest=3)
        for text in texts:
            if "</s>" not in text:
                assert lines(text).input_ids[:-1] == LineTokenizer(tokenizer).encode(text.strip()).tolist()
            assert fast(text).input_ids == tokenizer.encode(text).tolist()
            assert fast.decode(fast(text).input_ids) == text
        ids = LineTokenizer(tokenizer).encode(texts[1]).tolist()
        assert lines.decode(ids) == LineTokenizer(tokenizer).decode(ids)
        assert len(lines(texts[1], truncation=True).input_ids) == 4
        assert lines(texts[1], truncation=True).input_ids[-1] == lines.eos_token_id == tokenizer.size
    with pytest.raises(Exception, match="UNK"):
        fast_tokenizer(tokenizer_from_texts("chars", texts, 0))("Ω")


def test_other_tasks_are_refused(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Checkpoint, "task", "classify")
    with pytest.raises(CommandError, match="holds a classifier, not a language model or a translator"):
        export(Run(runs["chars"]), "best", tmp_path)


def test_trainers(tmp_path: Path) -> None:
    """Both learn to copy: right padding, -100 and the collators of transformers."""
    tokenizer = fast_tokenizer(tokenizer_from_texts("chars", ["abcdef "], 0))
    config = hf.LLMConfig(vocab_size=len(tokenizer), embedding_dim=8, hidden_dim=16, cell="gru")
    options = {
        "output_dir": str(tmp_path),
        "max_steps": 30,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-2,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    samples = [tokenizer(text) for text in ("abcdef", "bcdefa", "cdef") * 8]
    trainer = transformers.Trainer(
        hf.LLMForCausalLM(config),
        transformers.TrainingArguments(**options),
        transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=samples,
        eval_dataset=samples,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 2
    trainer.save_model()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert tokenizer.decode(loaded.generate(**tokenizer("ab", return_tensors="pt"), max_new_tokens=4)[0]) == "abcdef"

    lines = fast_line_tokenizer(LineTokenizer(tokenizer_from_texts("chars", ["abcdef "], 0)))
    end, size = lines.eos_token_id, len(lines)
    seq2seq = hf.Seq2SeqForConditionalGeneration(
        hf.Seq2SeqConfig(
            source_vocab_size=size,
            target_vocab_size=size,
            embedding_dim=8,
            hidden_dim=16,
            share_embedding=True,
            copy=True,
            pad_token_id=end,
            eos_token_id=end,
            decoder_start_token_id=end,
        )
    )
    pairs = [lines(text, text_target=text[::-1]) for text in ("abc", "fed", "cd") * 8]
    seq2seq_trainer = transformers.Seq2SeqTrainer(
        seq2seq,
        transformers.Seq2SeqTrainingArguments(**options, predict_with_generate=True, generation_max_length=6),
        transformers.DataCollatorForSeq2Seq(lines, seq2seq),
        train_dataset=pairs,
        eval_dataset=pairs,
    )
    before = seq2seq_trainer.evaluate()["eval_loss"]
    seq2seq_trainer.train()
    found = seq2seq_trainer.predict(pairs)
    assert found.metrics["test_loss"] < before / 2
    assert found.predictions.shape[0] == len(pairs)


def test_public_names_are_documented() -> None:
    reference = (ROOT / "docs/reference/hf.md").read_text()
    module = importlib.import_module("llm_ext.hf")
    for name in module.__all__:
        assert re.search(rf"^::: llm_ext\.hf\.{name}$", reference, re.MULTILINE), f"docs/reference lacks {name}"
        value = getattr(module, name)
        assert inspect.getdoc(value)
        for member, function in vars(value).items():
            if inspect.isfunction(function) and not member.startswith("_") and function.__module__ == value.__module__:
                assert function.__doc__, f"{name}.{member} has no docstring"
