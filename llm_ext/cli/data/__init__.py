"""Text on disk: tokenizers, encoded texts, pairs of lines and their batches."""

from llm_ext.cli.data.batches import PairBatch, PairBatches, make_batch
from llm_ext.cli.data.corpus import Corpus, Streams, encode_text
from llm_ext.cli.data.lines import LineTokenizer
from llm_ext.cli.data.pairs import EncodedPairs, PairFiles, encode_pairs
from llm_ext.cli.data.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_files,
)

__all__ = [
    "BpeTokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "EncodedPairs",
    "LineTokenizer",
    "PairBatch",
    "PairBatches",
    "PairFiles",
    "Streams",
    "Tokenizer",
    "encode_pairs",
    "encode_text",
    "load_tokenizer",
    "make_batch",
    "tokenizer_from_files",
]
