"""Gradients of each sample for Opacus: those of a loop over the samples, from every layer and model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.comparison import assert_same_bits
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import llm_ext

opacus = pytest.importorskip("opacus")
pytest.importorskip("llm_ext.privacy")
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning", "ignore:Secure RNG:UserWarning")

S, T, I, H = 4, 5, 3, 6  # noqa: E741
LENGTHS = torch.tensor([2, 5, 0, 3])
# A call with the rows of some samples; it returns the loss of each.
Call = Callable[[nn.Module, slice], Tensor]


def total(results: Any, batch: int = 0) -> Tensor:
    """Return the sum of squares of nested tuples for each sample."""
    if isinstance(results, tuple):
        return torch.stack([total(each, batch) for each in results if each is not None]).sum(0)
    tensor: Tensor = torch.nan_to_num(results, neginf=0).movedim(batch, 0)
    return tensor.square().flatten(1).sum(1) if tensor.dim() > 1 else tensor.square()


def check(module: nn.Module, call: Call, reduction: str = "mean", batch_first: bool = True) -> None:
    """Compare the gradients of each sample with those of a loop over the samples without Opacus."""
    module = module.double()
    module.zero_grad()
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    watched = opacus.GradSampleModule(module, loss_reduction=reduction, batch_first=batch_first)
    losses = call(watched, slice(None))
    torch.autograd.backward(losses.mean() if reduction == "mean" else losses.sum())
    trained: list[Any] = [module.get_parameter(name) for name in names]
    found = {name: (each.grad_sample, each.grad) for name, each in zip(names, trained, strict=True)}
    watched.to_standard_module()
    for i in range(S):
        (loss,) = call(module, slice(i, i + 1))
        parameters = [module.get_parameter(name) for name in names]
        expected = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for name, each in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name][0][i], each, msg=f"{name} of sample {i}")
    for name, (samples, whole) in found.items():
        scale = S if reduction == "mean" else 1
        torch.testing.assert_close(whole, samples.sum(0) / scale, msg=name)


LAYERS = [
    (llm_ext.RNN, {"nonlinearity": "relu", "bias": False}),
    (llm_ext.GRU, {"num_layers": 2, "bidirectional": True}),
    (llm_ext.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
]


@pytest.mark.parametrize("rows", ["all", "lengths", "packed"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("cls", "options"), LAYERS)
def test_recurrent_layers(cls: Any, options: dict[str, Any], batch_first: bool, rows: str) -> None:
    torch.manual_seed(0)
    layer = cls(I, H, batch_first=batch_first, **options)
    x = torch.randn(S, T, I, dtype=torch.float64)
    state = layer._zeros(x, len(layer._all_weights), S)
    state = tuple(torch.randn_like(tensor) for tensor in state)
    packed = LENGTHS.clamp(min=1)

    def call(module: nn.Module, i: slice) -> Tensor:
        h = tuple(tensor[:, i] for tensor in state)
        hx = h if len(h) > 1 else h[0]
        if rows == "packed":
            packing = pack_padded_sequence(x[i], packed[i], batch_first=True, enforce_sorted=False)
            y, last = module(packing, hx)
            y, _ = pad_packed_sequence(y, batch_first=True, total_length=T)
        else:
            given = {"lengths": LENGTHS[i]} if rows == "lengths" else {}
            y, last, every = module(x[i] if batch_first else x[i].transpose(0, 1), hx, **given, return_all_states=True)
            y = (y if batch_first else y.transpose(0, 1)) + total(every, 1 if batch_first else 2)[:, None, None]
        return total(y) + 1.5 * total(last, 1)

    check(layer, call, "sum" if batch_first else "mean", batch_first)


def test_a_state_alone_has_gradients_and_a_layer_may_be_called_twice() -> None:
    torch.manual_seed(0)
    x = torch.randn(S, T, I, dtype=torch.float64)
    check(llm_ext.GRU(I, H, batch_first=True), lambda module, i: total(module(x[i])[1], 1))
    check(llm_ext.GRU(I, H, batch_first=True), lambda module, i: total(module(x[i], module(x[i])[1])[1], 1))


def test_default_device() -> None:
    """A layer works on its own device, whatever the default device is."""
    x = torch.randn(S, T, I, dtype=torch.float64)

    def call(module: nn.Module, i: slice) -> Tensor:
        with torch.device("meta"):
            y, _ = module(x[i], lengths=LENGTHS[i])
        return total(y)

    check(llm_ext.GRU(I, H, batch_first=True), call)


@pytest.mark.parametrize("rows", ["all", "lengths", "packed"])
@pytest.mark.parametrize(("cls", "options"), LAYERS)
def test_autocast(cls: Any, options: dict[str, Any], rows: str) -> None:
    """Layers compute in the dtype of their weights, whose copies for each sample are then views."""
    torch.manual_seed(0)
    layer, projection = cls(I, H, batch_first=True, **options), llm_ext.Linear(I, I)
    x = torch.randn(S, T, I)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        if rows == "packed":
            packing = pack_padded_sequence(x, LENGTHS.clamp(min=1), batch_first=True, enforce_sorted=False)
            y, _ = pad_packed_sequence(module(packing)[0], batch_first=True, total_length=T)
        else:
            y = module(x, lengths=LENGTHS if rows == "lengths" else None)[0]
        return y

    with torch.autocast("cpu", torch.bfloat16):
        rounded = projection(x).detach()
    assert rounded.dtype == torch.bfloat16
    watched = opacus.GradSampleModule(layer, batch_first=True, loss_reduction="sum")
    found = []
    for autocast in (True, False):
        watched.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = call(watched, rounded if autocast else rounded.float())
        assert y.dtype == torch.float32
        torch.autograd.backward(y.square().sum())
        found.append([y, *(parameter.grad_sample for parameter in layer.parameters())])
    assert_same_bits(*found)


@pytest.mark.parametrize("cls", [llm_ext.RNNCell, llm_ext.GRUCell, llm_ext.LSTMCell])
def test_cells_in_a_loop(cls: Any) -> None:
    torch.manual_seed(0)
    x, reset = torch.randn(S, T, I, dtype=torch.float64), torch.rand(S, T) < 0.3

    def call(module: nn.Module, i: slice) -> Tensor:
        state = None
        for t in range(T):
            state = module(x[i, t], state, reset=reset[i, t])
        return total(state)

    check(cls(I, H), call)


@pytest.mark.parametrize("score", ["linear", "tanh"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_pool(score: str, causal: bool) -> None:
    torch.manual_seed(0)
    e, mask = torch.randn(S, T, I, dtype=torch.float64), torch.rand(S, T) < 0.7
    layer = llm_ext.AttentionPool(I, 4, score, causal)
    check(layer, lambda module, i: total(module(e[i], LENGTHS[i], mask[i], need_weights=True)))
    check(layer, lambda module, i: total(module(e[i])), "sum")


def test_additive_attention() -> None:
    torch.manual_seed(0)
    query, keys, values = (torch.randn(S, n, size, dtype=torch.float64) for n, size in ((2, 7), (T, I), (T, 2)))
    layer, mask = llm_ext.AdditiveAttention(7, I, 4), torch.rand(S, 2, T) < 0.7

    def call(module: nn.Module, i: slice) -> Tensor:
        projected = layer.project_keys(keys[i])
        context, _ = module(query[i], None, values[i], projected_keys=projected)
        return total(context) + total(module(query[i], keys[i], values[i], LENGTHS[i], mask[i], need_weights=True))

    check(layer, call)


@pytest.mark.parametrize("options", [{"cell": "lstm"}, {"cell": "gru", "attention": "embedding", "score": "tanh"}])
def test_language_model(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = llm_ext.LLM(9, 4, H, 9, 2, 0.0, **options)
    ids = torch.randint(9, (S, S + 1))  # as many steps as samples

    def call(module: nn.Module, i: slice) -> Tensor:
        scores, _ = module(ids[i, :-1])
        return F.cross_entropy(scores.mT, ids[i, 1:], reduction="none").mean(1)

    check(model, call)


@pytest.mark.parametrize(
    "options",
    [
        {"cell": "lstm", "share_embedding": True, "tie_head": True},
        {"copy": True, "n_layers": 2},
        {"input_feeding": True},
    ],
)
def test_translator(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = llm_ext.Seq2Seq(9, 9, 4, H, **options)
    source, target, lengths = torch.randint(9, (S, S)), torch.randint(9, (S, T + 1)), torch.tensor([4, 2, 1, 3])
    keep = torch.arange(T) < torch.tensor([5, 3, 1, 4])[:, None]

    def call(module: nn.Module, i: slice) -> Tensor:
        scores = module(source[i], target[i, :-1], lengths[i], keep[i].sum(1), keep[i])
        nats = F.cross_entropy(scores, target[i, 1:][keep[i]], reduction="none")
        return torch.zeros(keep[i].shape, dtype=nats.dtype).masked_scatter(keep[i], nats).sum(1)

    check(model, call, "sum")


def test_classifier_and_frozen_layers() -> None:
    torch.manual_seed(0)
    model = llm_ext.SequenceClassifier(3, H, vocab_size=9)
    model.encoder.weight_hh_l0.requires_grad_(False)
    ids = torch.randint(9, (S, T))
    check(model, lambda module, i: total(module(ids[i], LENGTHS[i])))


def test_private_engine_trains_and_reports_epsilon() -> None:
    torch.manual_seed(0)
    x, label = torch.randn(64, T, I), torch.randint(2, (64,))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn: Any = llm_ext.convert(nn.LSTM(I, H, batch_first=True), strict_types=True)
            self.head = nn.Linear(H, 2)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.head(self.rnn(x)[0][:, -1])
            return scores

    model: Any = Model()
    before = model.rnn.weight_hh_l0.detach().clone()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, label), batch_size=4)
    engine = opacus.PrivacyEngine(accountant="rdp")
    watched, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        data_loader=data,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for sample, target in loader:
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(watched(sample), target))
        optimizer.step()
    empty = x[:0]
    optimizer.zero_grad()
    torch.autograd.backward(watched(empty).sum())
    optimizer.step()
    assert model.rnn.weight_hh_l0.isfinite().all()
    assert not torch.equal(model.rnn.weight_hh_l0, before)
    assert 0 < engine.get_epsilon(1e-3) < 20
    watched.eval()
    watched(x[:2])


def test_calls_that_cannot_be_kept_apart_are_refused() -> None:
    class Doubled(llm_ext.GRU):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            y, h = super().forward(*args, **kwargs)
            return 2 * y, h

    layer = opacus.GradSampleModule(llm_ext.GRU(I, H))
    with pytest.raises(ValueError, match="GRU: gradients of each sample need a batch of 3 dimensions, got \\[5, 3\\]"):
        layer(torch.randn(T, I))
    with pytest.raises(ValueError, match="gru: reset must be None for gradients of each sample, got a Tensor"):
        layer(torch.randn(T, S, I), reset=torch.ones(T, S, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"Doubled\.forward must be that of llm_ext\.GRU"):
        opacus.GradSampleModule(Doubled(I, H))(torch.randn(T, S, I))
