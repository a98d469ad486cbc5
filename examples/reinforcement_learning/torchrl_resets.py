"""Let TorchRL's LSTMModule and GRUModule read all episodes of a batch in one call, and print what it gains.

By default these modules cut a batch into episodes, pad and pack them, and put the results together again. With
`recurrent_backend="scan"` they call one method with the steps at which episodes begin; here that method calls a layer
of llm_ext with `reset=`. It is for eager mode: `torch.compile` has no graph for it.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

import llm_ext


def _in_one_call(layer: Any, x: Tensor, state: Any, begins: Tensor) -> tuple[Tensor, ...]:
    """Return the results and, at the last step of each episode, the states; elsewhere they are 0, as TorchRL has them.

    Args:
        layer: A recurrent layer of llm_ext with batch_first.
        x: Input ``[B, T, I]``.
        state: As `hx` of the layer.
        begins: Whether an episode begins, ``[B, T]``; at the first step `state` holds in any case.
    """
    reset = begins.clone()
    reset[:, 0] = False
    y, _, states = layer(x, state, reset=reset, return_all_states=True)
    ends = torch.ones_like(begins)
    ends[:, :-1] = begins[:, 1:]
    every = states if isinstance(states, tuple) else (states,)
    return y, *(torch.where(ends[..., None, None], each.permute(1, 2, 0, 3), 0) for each in every)


def _can_reset(layer: nn.RNNBase, begins: Tensor, *recorded: Tensor) -> bool:
    """Return whether episodes begin with the state 0, as they do unless the collector was given another one."""
    begins = begins[:, 1:]
    return not layer.bidirectional and not any(states[:, 1:][begins].any() for states in recorded)


class LSTMModuleWithResets(LSTMModule):  # type: ignore[misc]
    """An LSTMModule that calls its layer once."""

    def _lstm_scan_with_resets(self, input: Tensor, h: Tensor, c: Tensor, state: Any, is_init: Tensor) -> Any:
        if _can_reset(self.lstm, is_init, h, c):
            return _in_one_call(self.lstm, input, state, is_init)
        return self._lstm_pad_with_resets(input, h, c, is_init)


class GRUModuleWithResets(GRUModule):  # type: ignore[misc]
    """A GRUModule that calls its layer once."""

    def _gru_scan_with_resets(self, input: Tensor, h: Tensor, state: Tensor, is_init: Tensor) -> Any:
        if _can_reset(self.gru, is_init, h):
            return _in_one_call(self.gru, input, state, is_init)
        return self._gru_pad_with_resets(input, h, is_init)


def use_resets(model: nn.Module) -> None:
    """Convert a model, and make its LSTMModules and GRUModules call their layers once for a batch."""
    llm_ext.convert(model, strict_types=True)  # TorchRL asks for nn.LSTM and nn.GRU
    replacements = ((LSTMModule, LSTMModuleWithResets, "lstm"), (GRUModule, GRUModuleWithResets, "gru"))
    modules: Any = model.modules()
    for module in modules:
        for cls, with_resets, name in replacements:
            if type(module) is cls and isinstance(getattr(module, name), (llm_ext.LSTM, llm_ext.GRU)):
                module.__class__ = with_resets
                module.recurrent_backend = "scan"


def main() -> None:
    B, T, H = 32, 128, 128
    for cell, cls, names in (("LSTM", LSTMModule, ["h", "c"]), ("GRU", GRUModule, ["h"])):
        seconds, results = {}, {}
        inputs = TensorDict({"x": torch.randn(B, T, H), "is_init": torch.rand(B, T, 1) < 0.03}, [B, T])
        for name, change in (
            ("torch.nn", lambda module: None),
            ("llm_ext", lambda module: llm_ext.convert(module, strict_types=True)),
            ("llm_ext, one call", use_resets),
        ):
            torch.manual_seed(0)
            out_keys = ["y", *(("next", key) for key in names)]
            module = cls(input_size=H, hidden_size=H, in_keys=["x", *names], out_keys=out_keys)
            change(module)
            times = []
            for _ in range(5):
                start = time.perf_counter()
                with set_recurrent_mode(True):
                    y = module(inputs.clone())["y"]
                y.square().mean().backward()
                times.append(time.perf_counter() - start)
            seconds[name], results[name] = min(times), y.detach()
        for name, value in seconds.items():
            speed = seconds["torch.nn"] / value
            difference = (results[name] - results["torch.nn"]).abs().max()
            print(
                f"{cell}Module, training step, {name}: {value * 1e3:.1f} ms, {speed:.1f} times as fast, "
                f"results differ by {difference:.1e}"
            )


if __name__ == "__main__":
    main()
