"""Use of trained models: loss of a text, generation, translation, pictures of attention."""

from llm_ext.cli.inference.evaluation import Score, evaluate_pairs, evaluate_text
from llm_ext.cli.inference.explanation import explain_language_model, explain_translation
from llm_ext.cli.inference.generation import generate
from llm_ext.cli.inference.picture import AttentionMap, draw
from llm_ext.cli.inference.stateful import StatefulLLM
from llm_ext.cli.inference.translator import Translator, bleu, rouge

__all__ = [
    "AttentionMap",
    "Score",
    "StatefulLLM",
    "Translator",
    "bleu",
    "draw",
    "evaluate_pairs",
    "evaluate_text",
    "explain_language_model",
    "explain_translation",
    "generate",
    "rouge",
]
