"""The command `llm-ext`: train, tune, evaluate, use and explain recurrent models of text, sound, images and video.

    data/        tokenizers, encoded texts, pairs and samples, files
    checkpoint   run directories: checkpoints and tokenizers on disk
    inference/   loss, generation, translation, labels and texts of samples, pictures of attention
    training/    settings, tasks, the training loop, its log
    tuning/      search of settings by cross-validation
    commands/    one file per command: its options and what it runs

Imports go from the bottom of this list to its top. `llm_ext.cli.data`, `llm_ext.cli.inference` and
`llm_ext.cli.training` export the names that scripts use. Install the packages it needs with
`pip install 'llm_ext[cli]'`.
"""

from llm_ext.cli.commands import main
from llm_ext.cli.errors import CommandError

__all__ = ["CommandError", "main"]
