"""Data on disk: tokenizers, encoded texts, pairs of lines, samples of other kinds, their splits and batches."""

from llm_ext.cli.data.batches import PairBatch, PairBatches, make_batch
from llm_ext.cli.data.corpus import Corpus, Streams, encode_text
from llm_ext.cli.data.features import EncodedSamples, FeatureReader, FrontEnd, encode_samples
from llm_ext.cli.data.labels import Labels, load_labels
from llm_ext.cli.data.lines import LineTokenizer
from llm_ext.cli.data.pairs import EncodedPairs, PairFiles, encode_pairs
from llm_ext.cli.data.samples import Sample, read_samples
from llm_ext.cli.data.splits import group_fold, groups_of, hold_out
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
    "EncodedSamples",
    "FeatureReader",
    "FrontEnd",
    "Labels",
    "LineTokenizer",
    "PairBatch",
    "PairBatches",
    "PairFiles",
    "Sample",
    "Streams",
    "Tokenizer",
    "encode_pairs",
    "encode_samples",
    "encode_text",
    "group_fold",
    "groups_of",
    "hold_out",
    "load_labels",
    "load_tokenizer",
    "make_batch",
    "read_samples",
    "tokenizer_from_files",
]
