"""Training: settings, tasks and the loop that trains them."""

from llm_ext.cli.training.config import (
    ClassificationConfig,
    Config,
    LanguageConfig,
    SummaryConfig,
    TranscriptionConfig,
    TranslationConfig,
)
from llm_ext.cli.training.pipeline import Outcome, resume, train
from llm_ext.cli.training.report import read_log
from llm_ext.cli.training.trainer import Progress

__all__ = [
    "ClassificationConfig",
    "Config",
    "LanguageConfig",
    "Outcome",
    "Progress",
    "SummaryConfig",
    "TranscriptionConfig",
    "TranslationConfig",
    "read_log",
    "resume",
    "train",
]
