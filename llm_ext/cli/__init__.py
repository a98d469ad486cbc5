"""The command `llm-ext`: train, tune, evaluate, use and explain recurrent models of text, sound, images and video.

    data/        tokenizers, encoded texts, pairs and samples, files
    checkpoint   run directories: checkpoints and tokenizers on disk
    inference/   loss, generation, translation, labels and texts of samples, pictures of attention
    training/    settings, tasks, the training loop, its log
    tuning/      search of settings by cross-validation
    commands/    one file per command: its options and what it runs

Imports go from the bottom of this list to its top. Scripts use `main` and `CommandError`. The names of the modules
above serve the demos in `examples`; they may change from version to version. `pip install 'llm_ext[cli]'` installs the
packages that the command needs.
"""

from llm_ext.cli.commands import main
from llm_ext.cli.errors import CommandError

__all__ = ["CommandError", "main"]
