"""Use of trained models: loss, generation, translation, labels and texts of samples, pictures of attention."""

from llm_ext.cli.inference.classifier import Classifier, evaluate_labels
from llm_ext.cli.inference.confusion import draw_confusion
from llm_ext.cli.inference.evaluation import Score, evaluate_pairs, evaluate_text
from llm_ext.cli.inference.explanation import explain_language_model, explain_translation
from llm_ext.cli.inference.generation import generate
from llm_ext.cli.inference.picture import AttentionMap, draw
from llm_ext.cli.inference.sample_explanation import (
    SampleExplanation,
    draw_sample,
    explain_classification,
    explain_transcription,
)
from llm_ext.cli.inference.stateful import StatefulLLM
from llm_ext.cli.inference.transcriber import Transcriber, error_rates, evaluate_transcripts
from llm_ext.cli.inference.translator import Translator, bleu, rouge

__all__ = [
    "AttentionMap",
    "Classifier",
    "SampleExplanation",
    "Score",
    "StatefulLLM",
    "Transcriber",
    "Translator",
    "bleu",
    "draw",
    "draw_confusion",
    "draw_sample",
    "error_rates",
    "evaluate_labels",
    "evaluate_pairs",
    "evaluate_text",
    "evaluate_transcripts",
    "explain_classification",
    "explain_language_model",
    "explain_transcription",
    "explain_translation",
    "generate",
    "rouge",
]
