"""Small Seq2Seq models, their sources, and their results computed with torch.nn alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import llm_ext

SOURCE_VOCAB, VOCAB, E, H, A = 11, 7, 6, 17, 5
END = VOCAB - 1
CELLS = ("rnn", "gru", "lstm")
LENGTHS = torch.tensor([9, 1, 6, 9])


def model(**options: Any) -> llm_ext.Seq2Seq:
    defaults: dict[str, Any] = {"n_layers": 2, "attn_dim": A, "dtype": torch.float64}
    # Copying needs one vocabulary.
    m = llm_ext.Seq2Seq(VOCAB if options.get("copy") else SOURCE_VOCAB, VOCAB, E, H, **(defaults | options))
    for parameter in m.parameters():  # biases too
        nn.init.normal_(parameter, std=0.4)
    return m


def search_model(scale: float = 3.0, **options: Any) -> llm_ext.Seq2Seq:
    """A model in evaluation mode with sharp predictions, so that targets of all lengths are found."""
    m = model(**options)
    with torch.no_grad():
        m.head.weight.mul_(scale)
    return m.eval()


def sources(lengths: Tensor = LENGTHS, vocab: int = SOURCE_VOCAB) -> Tensor:
    return torch.randint(vocab, (len(lengths), int(lengths.max())))


def expected_scores(m: llm_ext.Seq2Seq, source: Tensor, target: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [B, T, V] and weights [B, T, S] of the model with torch.nn and formulas, step by step.

    With copying the scores are the logarithms of the mixture.
    """
    config = m.config()
    L = m.decoder.num_layers
    assert m.source_embedding is not None
    layers = getattr(nn, str(config["cell"]).upper())
    options: dict[str, Any] = {"num_layers": L, "dtype": torch.float64}
    if config["cell"] == "rnn":
        options["nonlinearity"] = config["nonlinearity"]
    encoder = layers(E, H, bidirectional=True, **options)
    decoder = layers(m.decoder.input_size, H, **options)

    def run(theirs: nn.Module, ours: nn.Module, *arguments: Any) -> Any:
        return torch.func.functional_call(theirs, dict(ours.named_parameters()), arguments)

    def embed(layer: llm_ext.nn.AffineEmbedding, ids: Tensor) -> Tensor:
        return nn.functional.one_hot(ids, layer.num_embeddings).double() @ layer.weight + layer.bias

    read = embed(m.source_embedding, source.t())
    packed = pack_padded_sequence(read, lengths, enforce_sorted=False)
    output, last = run(encoder, m.encoder, packed)
    keys = values = pad_packed_sequence(output, total_length=source.shape[1])[0].transpose(0, 1)
    if m.gate is not None:
        before = torch.cat((torch.zeros_like(read[:1]), read[:-1]))
        keys = torch.cat((values, read.transpose(0, 1), before.transpose(0, 1)), -1)

    def both(h: Tensor) -> Tensor:
        return torch.stack([torch.cat((h[2 * layer], h[2 * layer + 1]), -1) for layer in range(L)])

    state: Any
    if m.cell_bridge is not None:
        state = torch.tanh(m.bridge(both(last[0]))), m.cell_bridge(both(last[1]))
    else:
        state = torch.tanh(m.bridge(both(last)))
    masked = torch.arange(source.shape[1]) >= lengths[:, None]
    a = m.attention
    readout, scores, weights = torch.zeros(len(source), E, dtype=torch.float64), [], []
    for ids in target.unbind(1):
        x = embed(m.target_embedding, ids)
        if config["input_feeding"]:
            x = torch.cat((x, readout), -1)
        h, state = run(decoder, m.decoder, x[None], state)
        inner = torch.tanh((h[0] @ a.q_proj_weight.T)[:, None] + keys @ a.k_proj_weight.T + a.bias)
        alpha = torch.softmax((inner @ a.v).masked_fill(masked, -math.inf), -1)
        readout = torch.tanh(m.readout(h[0]) + (alpha[:, :, None] * values).sum(1) @ m.value.weight.T)
        scores.append(readout @ m.head.weight.T + m.head.bias)
        if m.gate is not None:
            copied = (alpha[:, :, None] * nn.functional.one_hot(source, VOCAB)).sum(1)
            p = torch.sigmoid(m.gate(readout))
            scores[-1] = torch.log(p * torch.softmax(scores[-1], -1) + (1 - p) * copied)
        weights.append(alpha)
    return torch.stack(scores, 1), torch.stack(weights, 1)
