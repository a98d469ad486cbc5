"""Let the policy of sb3-contrib's RecurrentPPO read all episodes of a batch in one call, and print what it gains.

A batch of RecurrentPPO holds sequences that begin with an episode, so the policy calls its LSTM once for each step, to
set the state to zero before some of them. `reset=` does that inside one call.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import llm_ext


def _process_sequence(
    features: Tensor, states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: llm_ext.LSTM
) -> tuple[Tensor, Any]:
    """Do what `RecurrentActorCriticPolicy._process_sequence` does, without a loop over the steps."""
    rows = states[0].shape[1]
    x = features.reshape(rows, -1, lstm.input_size).swapaxes(0, 1)
    starts = episode_starts.reshape(rows, -1).swapaxes(0, 1) > 0
    y, states = lstm(x, states, reset=starts)
    return y.transpose(0, 1).flatten(0, 1), states


def use_resets(policy: Any) -> None:
    """Convert the policy of a RecurrentPPO, which then calls each of its LSTMs once for a batch."""
    llm_ext.convert(policy)
    policy._process_sequence = _process_sequence


def main() -> None:
    import gymnasium
    from sb3_contrib import RecurrentPPO

    seconds = {}
    weights = {}
    for name, change in (
        ("torch.nn", lambda policy: None),
        ("llm_ext", llm_ext.convert),
        ("llm_ext, one call", use_resets),
    ):
        model = RecurrentPPO("MlpLstmPolicy", gymnasium.make("CartPole-v1"), seed=1, device="cpu")
        change(model.policy)
        start = time.perf_counter()
        model.learn(512)
        seconds[name] = time.perf_counter() - start
        weights[name] = torch.cat([parameter.detach().flatten() for parameter in model.policy.parameters()])
    for name, value in seconds.items():
        speed = seconds["torch.nn"] / value
        difference = (weights[name] - weights["torch.nn"]).abs().max()
        print(f"learn(512), {name}: {value:.2f} s, {speed:.1f} times as fast, weights differ by {difference:.1e}")


if __name__ == "__main__":
    main()
