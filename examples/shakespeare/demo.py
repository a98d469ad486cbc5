"""Train a language model on the plays of Shakespeare, let it write, and compare it with torch.nn.RNN."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from peer import torch_peer

from llm_ext import LLM
from llm_ext.text.carry import Carrier
from llm_ext.text.checkpoint import Run
from llm_ext.text.config import TrainConfig
from llm_ext.text.corpus import Corpus, Streams, encode
from llm_ext.text.errors import TextError
from llm_ext.text.evaluate import evaluate
from llm_ext.text.generate import generate
from llm_ext.text.train import CACHE, train

TEXT = Path(__file__).with_name("input.txt")


def training_step(model: LLM, streams: Streams, config: TrainConfig) -> Callable[[], int]:
    """Return a function that trains a copy-safe model by one step and returns how many tokens it read."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    state = None
    step = 0

    def run() -> int:
        nonlocal state, step
        x, y = streams.read(step)
        scores, state = model(x, state)
        state = state.detach()
        optimizer.zero_grad()
        F.cross_entropy(scores.flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        step += 1
        return x.numel()

    return run


def generation(model: LLM, prompt: torch.Tensor) -> Callable[[], int]:
    """Return a function that continues a prompt, one text at a time, and returns how many tokens it wrote."""
    model.eval()

    def run() -> int:
        length = 100
        model.generate(prompt, length)
        return length

    return run


def speeds(ours: Callable[[], int], theirs: Callable[[], int], seconds: float) -> list[float]:
    """Run both in turns for some seconds each; returns tokens per second of each."""
    tokens, spent = [0, 0], [0.0, 0.0]
    for run in (ours, theirs):
        run()  # the first run of anything is slow
    while min(spent) < seconds:
        for which, run in enumerate((ours, theirs)):
            started = time.perf_counter()
            tokens[which] += run()
            spent[which] += time.perf_counter() - started
    return [count / time_spent for count, time_spent in zip(tokens, spent, strict=True)]


def losses(models: list[LLM], run: Run, corpus: Corpus, begin: int) -> list[float]:
    """Validation loss of each model, nats a character."""
    _, tokens = run.load("best")
    device = torch.device("cpu")
    return [evaluate(Carrier(model.eval()), corpus, begin, len(corpus), tokens, device).loss for model in models]


def main() -> int:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="to train (default: 3)")
    parser.add_argument("--seconds", type=float, default=5.0, help="to measure each speed (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/shakespeare"), help="run directory, made anew")
    options = parser.parse_args()
    config = TrainConfig(tokens="chars", minutes=options.minutes)
    run = Run(options.out)
    if run.exists():
        shutil.rmtree(options.out)

    threads = torch.get_num_threads()
    print(f"Training on the plays of Shakespeare for {options.minutes:g} minutes, {threads} threads.")
    outcome = train(config, [TEXT], options.out)
    if outcome.signal:
        return 128 + outcome.signal

    model, tokens = run.load("best")
    peer = torch_peer(model)
    corpus = encode([TEXT], tokens, options.out / CACHE)
    split = corpus.split(config.val_fraction)
    ours, theirs = losses([model, peer], run, corpus, split)

    print(f"\nValidation loss: {ours:.4f} nats a character, {ours / math.log(2):.4f} bits a character.")
    print("\nA sample of 400 characters:\n")
    print("".join(generate(model, tokens, "\n", 400, temperature=0.8, seed=1)).strip())

    streams = Streams(corpus, 0, split, config.batch, config.chunk, slice(None))
    prompt = torch.from_numpy(tokens.encode("ROMEO:\n").astype("int64"))
    print(f"\nMeasuring speed, both in turns, {options.seconds:g} seconds each ...\n")
    write = speeds(generation(model, prompt), generation(peer, prompt), options.seconds)
    read = speeds(training_step(model, streams, config), training_step(peer, streams, config), options.seconds)

    print(f"{'The same model, with the same weights':40}{'llm_ext':>12}{'torch.nn.RNN':>14}{'':>12}")
    for name, (fast, slow) in (
        ("training, tokens per second", read),
        ("generating, tokens per second", write),
    ):
        print(f"{name:40}{fast:12,.0f}{slow:14,.0f}{fast / slow:8.1f} times")
    print(f"{'validation loss, nats per token':40}{ours:12.4f}{theirs:14.4f}{abs(ours - theirs):9.0e} apart")
    print(f"\nOne token is one character. The model is in {options.out}; more from it:")
    print(f"  llm-ext generate {options.out} --prompt 'ROMEO:'")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TextError as error:
        sys.exit(f"demo: {error}")
