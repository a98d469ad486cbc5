"""Models composed of the layers in `llm_ext.nn`: a language model, and a translation model with its searches."""

from llm_ext.models.beam_search import BeamHypothesis
from llm_ext.models.language_model import LLM, LLMState
from llm_ext.models.sampling import sample
from llm_ext.models.seq2seq import EncoderOutput, InputProjections, Seq2Seq, Seq2SeqState

__all__ = [
    "LLM",
    "BeamHypothesis",
    "EncoderOutput",
    "InputProjections",
    "LLMState",
    "Seq2Seq",
    "Seq2SeqState",
    "sample",
]
