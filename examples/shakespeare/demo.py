"""Train a language model on the plays of Shakespeare, let it write, and compare it with torch.nn.RNN."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peer import torch_peer

from llm_ext import LLM
from llm_ext.cli.data import Streams, encode_text
from llm_ext.cli.inference import StatefulLLM, evaluate_text, generate
from llm_ext.cli.training import LanguageConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _demo import COMMAND, length, parser, run_demo, start_run, train_or_exit

TEXT = Path(__file__).with_name("input.txt")

# The lowest validation loss after three minutes on two cores; docs/lab/training-recipes.md has other settings.
MODEL: dict[str, Any] = {
    "layers": 2,
    "hidden": 384,
    "dropout": 0.05,
    "attention": "none",
    "warmup": 0.2,
    "validate_every": 1000,
}
# Tokens to generate per call when the speed is measured.
LENGTH = 100

Speeds = list[float]


def training_step(model: LLM, streams: Streams, clip: float) -> Callable[[], int]:
    """Return a function that does one training step and returns the number of tokens."""
    stateful = StatefulLLM(model.train())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    step = 0

    def run() -> int:
        nonlocal step
        x, y = streams.read(step)
        optimizer.zero_grad()
        F.cross_entropy(stateful(x).flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        step += 1
        return x.numel()

    return run


def generation(model: LLM, prompt: torch.Tensor) -> Callable[[], int]:
    """Return a function that generates some tokens and returns their number."""

    def run() -> int:
        model.generate(prompt, LENGTH)
        return LENGTH

    return run


def measure(ours: Callable[[], int], theirs: Callable[[], int], seconds: float) -> Speeds:
    """Run both in turns, each for `seconds` in total; return the tokens per second of each."""
    tokens, spent = [0, 0], [0.0, 0.0]
    for run in (ours, theirs):
        run()  # the first call is slower
    while min(spent) < seconds:
        for which, run in enumerate((ours, theirs)):
            started = time.perf_counter()
            tokens[which] += run()
            spent[which] += time.perf_counter() - started
    return [count / time_spent for count, time_spent in zip(tokens, spent, strict=True)]


def table(losses: list[float], training_speeds: Speeds, generation_speeds: Speeds) -> str:
    """Return a table of both models."""
    rows = [("The same model, same weights, on", "llm_ext", "torch.nn.RNN", "")]
    for name, (ours, theirs) in (("training", training_speeds), ("generating", generation_speeds)):
        rows.append((f"{name}, tokens per second", f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.1f} x"))
    difference = f"differ by {abs(losses[0] - losses[1]):.0e}"
    rows.append(("validation loss, nats per token", f"{losses[0]:.4f}", f"{losses[1]:.4f}", difference))
    lines = [f"  {name:34}{ours:>10}{theirs:>15}   {last}".rstrip() for name, ours, theirs, last in rows]
    lines.insert(1, "  " + "-" * 76)
    return "\n".join(lines)


def main() -> None:
    """Train, sample, and compare the speed."""
    arguments = parser(__doc__, 3.0, "runs/shakespeare")
    arguments.add_argument("--seconds", type=float, default=5.0, help="time to measure each speed (default: 5)")
    options = arguments.parse_args()
    config = LanguageConfig(tokens="chars", minutes=options.minutes, device="cpu", **MODEL)
    run = start_run(options.out)

    print("Training a recurrent network to predict the next character in the plays of Shakespeare,")
    print(f"{length(options.minutes)}. One token is one character.\n")
    train_or_exit(config, [TEXT], run)

    model, tokenizer = run.load_language_model("best")
    peer = torch_peer(model)
    corpus = encode_text([TEXT], tokenizer, run.path / "cache")
    split = corpus.split(config.val_fraction)
    ours, theirs = (
        evaluate_text(StatefulLLM(each), corpus, split, len(corpus), tokenizer, torch.device("cpu")).loss
        for each in (model, peer)
    )
    print(f"\nValidation loss: {ours:.4f} nats per character = {ours / math.log(2):.4f} bits per character")
    print("(on the last tenth of the text, which was held out; without any knowledge it would be")
    print(f"{math.log(tokenizer.size):.4f} nats = {math.log2(tokenizer.size):.4f} bits).")

    print("\nA sample of 400 characters:\n")
    sample = "".join(generate(model, tokenizer, "\n", 400, temperature=0.8, seed=1))
    print("  " + sample.replace("\n", "\n  "))

    print(f"\nSpeed, measured in turns, {options.seconds:g} seconds each:\n")
    prompt = torch.tensor(tokenizer.encode("ROMEO:\n").tolist())
    generation_speeds = measure(generation(model, prompt), generation(peer, prompt), options.seconds)
    streams = Streams(corpus, 0, split, config.batch, config.chunk, slice(None))
    steps = [training_step(each, streams, config.clip) for each in (model, peer)]
    print(table([ours, theirs], measure(steps[0], steps[1], options.seconds), generation_speeds))

    print(f"\nThe model is in {run.path}. Generate more text:")
    print(f"  {COMMAND} generate {run.path} --prompt 'ROMEO:'")


if __name__ == "__main__":
    run_demo(main)
