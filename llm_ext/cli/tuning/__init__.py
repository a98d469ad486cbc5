"""Choice of settings by cross-validation: the space, the study on disk, the search, its results."""

from llm_ext.cli.tuning.results import best_trial, draw_trials, measure, table
from llm_ext.cli.tuning.search import Budget, base_config, tune
from llm_ext.cli.tuning.space import default_space, read_space
from llm_ext.cli.tuning.study import Definition, Study

__all__ = [
    "Budget",
    "Definition",
    "Study",
    "base_config",
    "best_trial",
    "default_space",
    "draw_trials",
    "measure",
    "read_space",
    "table",
    "tune",
]
