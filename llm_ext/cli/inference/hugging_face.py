"""Trained models with their tokenizers as folders that transformers loads."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import decoders, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llm_ext.cli.checkpoint import Checkpoint, Run
from llm_ext.cli.data.lines import LineTokenizer
from llm_ext.cli.data.tokenizer import Tokenizer, load_tokenizer
from llm_ext.hf import LLMForCausalLM, Seq2SeqForConditionalGeneration
from llm_ext.models import LLM, Seq2Seq

__all__ = ["export", "fast_line_tokenizer", "fast_tokenizer"]

PAD, END = "<pad>", "</s>"
# A score that makes a token impossible, also in float16.
IMPOSSIBLE = -1e4
# Longest source where the training did not record it.
LONGEST = 200


def export(run: Run, which: str, out: Path) -> LLMForCausalLM | Seq2SeqForConditionalGeneration:
    """Write a model and its tokenizer.

    Args:
        run: The run directory.
        which: "last" or "best", the checkpoint.
        out: The folder to write. A translator with two vocabularies has the tokenizer of its targets in `target`.

    Returns:
        The model.

    Raises:
        CommandError: A file is missing, damaged, or does not match, or transformers has no model of this task.
    """
    checkpoint, model = run.load(which, "lm", "translate", "summarize")
    if isinstance(model, LLM):
        return _export_language_model(model, load_tokenizer(run.vocabulary, model.vocab_size), out)
    assert isinstance(model, Seq2Seq)
    source, target = map(LineTokenizer, run.tokenizers(model))
    return _export_translator(model, source, target, checkpoint, out)


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer of transformers with the same ids and one more, which fills the rows of a batch."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.to_library(), pad_token=PAD, padding_side="left", clean_up_tokenization_spaces=False
    )


def fast_line_tokenizer(tokenizer: LineTokenizer, longest: int | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of transformers with the same ids, which appends the end of a line.

    Args:
        tokenizer: The tokenizer of lines.
        longest: Tokens of a line, without its end, to which `truncation=True` cuts it. None: no limit.
    """
    fast = tokenizer.tokenizer.to_library()
    fast.add_special_tokens([END])
    fast.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, tokenizer.end)])
    words = tokenizer.leading_space
    fast.normalizer = normalizers.Sequence([normalizers.Strip(), *([normalizers.Prepend(" ")] if words else [])])
    fast.decoder = decoders.Sequence(
        [
            fast.decoder,
            *([decoders.Strip(" ", 1, 0)] if words else []),
            decoders.Replace("\n", " "),
            decoders.Replace("\r", " "),
        ]
    )
    limit = {} if longest is None else {"model_max_length": longest + 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False, **limit
    )


def _export_language_model(model: LLM, tokenizer: Tokenizer, out: Path) -> LLMForCausalLM:
    fast = fast_tokenizer(tokenizer)
    exported = LLMForCausalLM.wrap(model, pad_token_id=fast.pad_token_id)
    # The row of the padding, which the model never reads or writes.
    exported.resize_token_embeddings(len(fast))
    with torch.no_grad():
        exported.model.embedding.weight[-1] = 0
        exported.model.head.weight[-1] = 0
        exported.model.head.bias[-1] = IMPOSSIBLE
    exported.save_pretrained(out)
    fast.save_pretrained(out)
    return exported


def _export_translator(
    model: Seq2Seq, source: LineTokenizer, target: LineTokenizer, checkpoint: Checkpoint, out: Path
) -> Seq2SeqForConditionalGeneration:
    end = target.end
    exported = Seq2SeqForConditionalGeneration.wrap(
        model, pad_token_id=end, eos_token_id=end, decoder_start_token_id=end
    )
    longest, longest_source = map(checkpoint.config["training"].get, ("longest", "longest_source"))
    # At most twice the tokens of a source and 10, and the token that begins a target.
    exported.generation_config.max_length = 2 * (longest or LONGEST) + 11
    exported.save_pretrained(out)
    fast_line_tokenizer(source, longest_source).save_pretrained(out)
    if not model.config()["share_embedding"]:
        fast_line_tokenizer(target).save_pretrained(out / "target")
    return exported
