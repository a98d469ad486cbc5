"""From text to text: tokens, training, evaluation, generation and the command `llm-ext`.

Needs the extra packages of `pip install --no-build-isolation '.[text]'`.
"""
