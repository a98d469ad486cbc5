"""The attention of a model, summed to words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from llm_ext.cli.data.tokenizer import Tokenizer
from llm_ext.cli.errors import CommandError
from llm_ext.cli.inference.picture import MOST_TOKENS, AttentionMap, Weights, check_words
from llm_ext.cli.inference.translator import SearchOptions, Translator
from llm_ext.models import LLM

__all__ = ["END_OF_LINE", "explain_language_model", "explain_translation", "group_into_words", "token_texts"]

END_OF_LINE = "⏎"
# Longer words are cut to this many characters.
LONGEST_WORD = 30

Word = tuple[str, slice]


@torch.inference_mode()
def explain_translation(
    translator: Translator,
    text: str,
    target: str | None,
    warn: Callable[[str], object],
    options: SearchOptions | None = None,
    suffix: str = ".html",
) -> AttentionMap:
    """Return how much each written word attended to each word of the source.

    Args:
        translator: The model.
        text: The source.
        target: The translation to explain; None for the translation of the model.
        warn: Receives messages about an unusual source.
        options: Options of the search.
        suffix: Of the picture to draw, which limits the number of words.

    Raises:
        CommandError: A text is empty or too long, or has characters that the vocabulary lacks.
    """
    for name, value in (("text", text), ("target", target)):
        if value is not None and not value.strip():
            raise CommandError(f"--{name} must hold at least one word, got {value!r}")
    ids = translator.encode(text.strip(), "--text", warn)
    columns = _words("text", [*token_texts(translator.source.tokenizer, ids), END_OF_LINE], suffix)
    if target is None:
        ((target, *_),) = translator.translate([ids], **(options or SearchOptions()))
    try:
        written = translator.target.encode(target.strip()).tolist()
    except CommandError as error:
        raise CommandError(f"--target: {error}") from None
    rows = _words("target", [*token_texts(translator.target.tokenizer, written), END_OF_LINE], suffix)
    model, end = translator.model, translator.target.end
    source = torch.tensor([[*ids, translator.source.end]], device=translator.device)
    encoder_output, state = model.encode(source)
    weights: list[Weights] = []
    for i in (end, *written):
        last = torch.tensor([[i]], device=translator.device)
        _, state, attention = model.step(last, state, encoder_output, need_weights=True)
        assert attention is not None
        weights.append(attention[0, 0].double().cpu().numpy())
    return AttentionMap(
        title=f"{text.strip()}\n→ {target}",
        rows=[word for word, _ in rows],
        row_label="written",
        columns=[word for word, _ in columns],
        column_label="read",
        weights=_by_words(np.stack(weights), rows, columns),
        summary=target,
    )


@torch.inference_mode()
def explain_language_model(model: LLM, tokenizer: Tokenizer, text: str, suffix: str = ".html") -> AttentionMap:
    """Return how much the prediction of each word attended to each earlier word.

    Args:
        model: Language model with attention, in evaluation mode.
        tokenizer: Tokenizer of the model.
        text: At least two words.
        suffix: Of the picture to draw, which limits the number of words.

    Raises:
        CommandError: The model has no attention, or the text is too short, too long, or has characters that the
            vocabulary lacks.
    """
    if model.pool is None:
        raise CommandError("the model has no attention to look at; train one with --attention hidden or embedding")
    ids = tokenizer.encode(text)
    words = _words("text", token_texts(tokenizer, ids.tolist()), suffix)
    if len(words) < 2:
        raise CommandError(f"--text must hold at least two words, got {text!r}")
    weights: list[Weights] = []

    def record_weights(pool: Any, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        *_, alpha = pool.forward(*arguments, **options, need_weights=True)
        weights.append(alpha[0].cpu().numpy())

    hook = model.pool.register_forward_hook(record_weights, with_kwargs=True)
    try:
        scores, _ = model(torch.tensor([ids.tolist()], device=next(model.parameters()).device))
    finally:
        hook.remove()
    read, predicted = words[:-1], words[1:]
    # Row t predicts token t + 1.
    rows = [(word, slice(tokens.start - 1, tokens.stop - 1)) for word, tokens in predicted]
    future = np.arange(len(read)) > np.arange(len(predicted))[:, None]
    nats = torch.nn.functional.cross_entropy(scores[0, :-1], torch.tensor(ids[1:].tolist(), device=scores.device))
    return AttentionMap(
        title=f"Attention of the prediction of each word to the words before it ({nats.item():.2f} nats per token)",
        rows=[word for word, _ in predicted],
        row_label="predicted",
        columns=[word for word, _ in read],
        column_label="read before it",
        weights=np.where(future, np.nan, _by_words(weights[0], rows, read)),
        summary=f"{nats.item():.4f} nats per token over {len(ids) - 1:,} tokens",
    )


def _words(name: str, pieces: Sequence[str], suffix: str) -> list[Word]:
    """Return the words of the text of an option, if a picture can show them."""
    if len(pieces) > MOST_TOKENS:
        raise CommandError(f"--{name} has {len(pieces):,} tokens, but explain reads at most {MOST_TOKENS:,}")
    words = group_into_words(pieces)
    check_words(name, len(words), suffix)
    return words


def group_into_words(pieces: Sequence[str]) -> list[Word]:
    """Group the tokens of a text into words.

    Args:
        pieces: Text of each token, in order.

    Returns:
        Each word with the range of its tokens. A word begins at a token that begins with a space or follows one.
    """
    words: list[Word] = []
    begin = 0
    for index in range(1, len(pieces) + 1):
        ends = index == len(pieces) or pieces[index][:1].isspace() or pieces[index] == END_OF_LINE
        # A token that is a space belongs to the word after it.
        if ends and ("".join(pieces[begin:index]).strip() or index == len(pieces)):
            word = "".join(pieces[begin:index]).strip() or "␣"
            shown = word if len(word) <= LONGEST_WORD else f"{word[: LONGEST_WORD - 1]}…"
            words.append((shown, slice(begin, index)))
            begin = index
    return words


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of each token; a character that spans several tokens belongs to the last of them."""
    texts = []
    pending = b""
    for i in ids:
        pending += tokenizer.pieces[i]
        try:
            texts.append(pending.decode())
            pending = b""
        except UnicodeDecodeError as error:
            incomplete = error.reason == "unexpected end of data" and len(pending) < 4
            texts.append("" if incomplete else pending.decode("utf-8", "replace"))
            pending = pending if incomplete else b""
    return texts


def _by_words(weights: Weights, rows: list[Word], columns: list[Word]) -> Weights:
    """Return weights between words: the sum over the tokens read, the mean over the tokens written."""
    summed = np.stack([weights[:, tokens].sum(1, dtype=np.float64) for _, tokens in columns], 1)
    return np.stack([summed[tokens].mean(0) for _, tokens in rows])
