"""Train a language model on the plays of Shakespeare, let it write, and compare it with torch.nn.RNN."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peer import torch_peer

from llm_ext import LLM
from llm_ext.text.carry import Carrier
from llm_ext.text.checkpoint import Run
from llm_ext.text.config import TrainConfig
from llm_ext.text.corpus import Streams, encode
from llm_ext.text.errors import TextError
from llm_ext.text.evaluate import evaluate
from llm_ext.text.generate import generate
from llm_ext.text.train import CACHE, train

TEXT = Path(__file__).with_name("input.txt")

# Of what was tried in three minutes on two cores, the lowest validation loss; docs/text.md has the others.
MODEL: dict[str, Any] = {
    "layers": 2,
    "hidden": 384,
    "dropout": 0.05,
    "attention": "none",
    "warmup": 0.2,
    "validate_every": 1000,
}
PIECE = 100  # tokens generated at a time when the speed is measured

Speeds = list[float]


def training(model: LLM, streams: Streams, clip: float) -> Callable[[], int]:
    """Return a function that trains a model by one step and returns how many tokens it read."""
    carrier = Carrier(model.train())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    step = 0

    def run() -> int:
        nonlocal step
        x, y = streams.read(step)
        optimizer.zero_grad()
        F.cross_entropy(carrier(x).flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        step += 1
        return x.numel()

    return run


def generating(model: LLM, prompt: torch.Tensor) -> Callable[[], int]:
    """Return a function that lets a model write a little, one token at a time, and returns how many."""

    def run() -> int:
        model.generate(prompt, PIECE)
        return PIECE

    return run


def measure(ours: Callable[[], int], theirs: Callable[[], int], seconds: float) -> Speeds:
    """Run both in turns, each for some seconds in all; returns the tokens per second of each."""
    tokens, spent = [0, 0], [0.0, 0.0]
    for run in (ours, theirs):
        run()  # the first time is slower, for everyone
    while min(spent) < seconds:
        for which, run in enumerate((ours, theirs)):
            started = time.perf_counter()
            tokens[which] += run()
            spent[which] += time.perf_counter() - started
    return [count / time_spent for count, time_spent in zip(tokens, spent, strict=True)]


def table(losses: list[float], train_speeds: Speeds, write_speeds: Speeds) -> str:
    """Set the figures of both side by side."""
    rows = [("The same model, same weights, on", "llm_ext", "torch.nn.RNN", "")]
    for name, (ours, theirs) in (("training", train_speeds), ("generating", write_speeds)):
        rows.append((f"{name}, tokens per second", f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.1f} x"))
    difference = f"differ by {abs(losses[0] - losses[1]):.0e}"
    rows.append(("validation loss, nats per token", *(f"{loss:.4f}" for loss in losses), difference))
    lines = [f"  {name:34}{ours:>10}{theirs:>15}   {last}".rstrip() for name, ours, theirs, last in rows]
    lines.insert(1, "  " + "-" * 76)
    return "\n".join(lines)


def main() -> int:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="to train (default: 3)")
    parser.add_argument("--seconds", type=float, default=5.0, help="to measure each speed (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/shakespeare"), help="run directory, made anew")
    options = parser.parse_args()
    config = TrainConfig(tokens="chars", minutes=options.minutes, accelerator="cpu", **MODEL)
    run = Run(options.out)
    if run.exists():
        shutil.rmtree(options.out)

    threads = torch.get_num_threads()
    print("Training a recurrent network to predict the next character in the plays of Shakespeare,")
    print(f"for {options.minutes:g} minutes on {threads} threads. One token is one character.\n")
    outcome = train(config, [TEXT], options.out)
    if outcome.signal:
        return 128 + outcome.signal

    model, tokens = run.load("best")
    peer = torch_peer(model)
    corpus = encode([TEXT], tokens, options.out / CACHE)
    split = corpus.split(config.val_fraction)
    ours, theirs = (
        evaluate(Carrier(each), corpus, split, len(corpus), tokens, torch.device("cpu")).loss for each in (model, peer)
    )
    print(f"\nValidation loss: {ours:.4f} nats a character = {ours / math.log(2):.4f} bits a character")
    print("(on the last tenth of the text, which it has not trained on; knowing nothing, it would be")
    print(f"{math.log(tokens.size):.4f} nats = {math.log2(tokens.size):.4f} bits).")

    print("\nA sample of 400 characters:\n")
    sample = "".join(generate(model, tokens, "\n", 400, temperature=0.8, seed=1))
    print("  " + sample.replace("\n", "\n  "))

    print(f"\nSpeed, measured in turns, {options.seconds:g} seconds each:\n")
    prompt = torch.tensor(tokens.encode("ROMEO:\n").tolist())
    write_speeds = measure(generating(model, prompt), generating(peer, prompt), options.seconds)
    streams = Streams(corpus, 0, split, config.batch, config.chunk, slice(None))
    learners = (training(each, streams, config.clip) for each in (model, peer))
    print(table([ours, theirs], measure(*learners, options.seconds), write_speeds))

    print(f"\nThe model is in {options.out}. Let it write more:")
    print(f"  llm-ext generate {options.out} --prompt 'ROMEO:'")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (TextError, OSError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
