"""Models composed of the layers in `llm_ext.nn`: a language model, a translator with its searches, a classifier."""

from llm_ext.models.beam_search import BeamHypothesis
from llm_ext.models.classifier import ClassifierOutput, SequenceClassifier
from llm_ext.models.language_model import LLM, LLMState
from llm_ext.models.sampling import sample
from llm_ext.models.seq2seq import EncoderOutput, InputProjections, Seq2Seq, Seq2SeqState

__all__ = [
    "LLM",
    "BeamHypothesis",
    "ClassifierOutput",
    "EncoderOutput",
    "InputProjections",
    "LLMState",
    "Seq2Seq",
    "Seq2SeqState",
    "SequenceClassifier",
    "sample",
]
