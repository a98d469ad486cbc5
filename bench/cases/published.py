"""Models of published packages, with random weights: as they are, with layers of torch.nn, and converted.

The packages are the extra `models`. A case whose package is not installed says so and is left out.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import llm_ext
from bench.comparison import OURS, Candidate, Case, Comparison, tensors
from bench.timing import Call

__all__ = ["Model", "published", "published_cases"]

_OURS, _TORCH, _LOOP = "llm_ext", "torch.nn", "llm_ext without resets"
# The lowest ratio of inference and of a training step that a case may have.
_NEVER_SLOWER = (1.0, 1.0)


@dataclass(frozen=True)
class Model:
    """A model of a package and a call of it.

    module: with random weights and without dropout.
    forward: computes the results from the module and the inputs.
    inputs: arguments of `forward`.
    reference_dtype: of the reference; float32 if the package computes in no other type.
    strict_types: of `llm_ext.convert`.
    """

    module: Any
    forward: Callable[..., Any]
    inputs: Sequence[Tensor]
    reference_dtype: torch.dtype = torch.float64
    strict_types: bool = False


def _package(name: str) -> Any:
    """Import a module of a package; raise ImportError if that fails, as it does for a package built for CUDA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except (OSError, RuntimeError) as error:
            raise ImportError(f"{name}: {error}") from error


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Packages make their initial states and masks in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _gradients(module: nn.Module) -> list[Tensor]:
    """Return the gradients of recurrent layers, and all others in one tensor.

    A bias before batch normalization has the gradient 0, of which only rounding is left; hence the one tensor.
    """
    recurrent = [
        parameter
        for each in module.modules()
        if isinstance(each, (nn.RNNBase, nn.RNNCellBase))
        for parameter in each.parameters(recurse=False)
    ]
    known = {id(parameter) for parameter in recurrent}
    others = [parameter for parameter in module.parameters() if id(parameter) not in known]
    found = [parameter.grad for parameter in recurrent if parameter.grad is not None]
    flat = [parameter.grad.flatten() for parameter in others if parameter.grad is not None]
    return [*found, torch.cat(flat)] if flat else found


def _call(model: Model, module: Any, inputs: Sequence[Tensor], upstream: Sequence[Tensor] | None) -> Call:
    """Return a call for the module and the results; given their gradients, with backward."""
    module.train(upstream is not None)

    def infer() -> tuple[Any, list[Tensor]]:
        return module, tensors(model.forward(module, *inputs))

    def train() -> tuple[Any, list[Tensor]]:
        module.zero_grad(set_to_none=True)
        results = model.forward(module, *inputs)
        results = results if isinstance(results, (list, tuple)) else [results]
        torch.autograd.backward(results, upstream)
        return module, tensors(results)

    return infer if upstream is None else train


def _outputs(result: Any) -> list[Tensor]:
    module, results = result
    return [*results, *(gradient.detach() for gradient in _gradients(module))]


def published(
    name: str,
    build: Callable[[], Model],
    targets: Sequence[float] = _NEVER_SLOWER,
    use_resets: Callable[[Any], None] | None = None,
    loop_target: float | None = None,
) -> Iterator[Case]:
    """Yield the cases of a model: inference, and a training step of forward and backward.

    Args:
        name: of package and model.
        build: makes the model; raises ImportError without the package.
        targets: of inference and training against the layers of torch.nn.
        use_resets: makes the converted model replace its loop over steps or episodes by one call with resets.
        loop_target: target of this call against the converted model without it.
    """

    def comparison(training: bool) -> Comparison:
        model = build()
        dtype = model.reference_dtype
        exact = copy.deepcopy(model.module).to(dtype)
        inputs = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in model.inputs]
        with _default_dtype(dtype):
            with torch.no_grad():
                _, reference = _call(model, exact, inputs, None)()
            upstream = None
            if training:
                upstream = [torch.randn_like(result) for result in reference]
                reference = _outputs(_call(model, exact, inputs, upstream)())
                upstream = [gradient.float() for gradient in upstream]

        def converted(module: Any) -> Any:
            return llm_ext.convert(module, strict_types=model.strict_types)

        def in_one_call(module: Any) -> Any:
            module = converted(module)
            if use_resets is not None:
                use_resets(module)
            return module

        def candidate(name: str, library: str, prepare: Callable[[Any], Any]) -> Candidate:
            def make() -> Call:
                return _call(model, prepare(copy.deepcopy(model.module)), model.inputs, upstream)

            return Candidate(name, library, make, _outputs)

        others = [candidate(_TORCH, "torch", lambda module: module)]
        if use_resets is not None:
            others.append(candidate(_LOOP, OURS, converted))
        return Comparison([tensor.double() for tensor in reference], candidate(_OURS, OURS, in_one_call), others)

    for phase, target in zip(("inference", "training"), targets, strict=True):
        training = phase == "training"
        found = {_TORCH: target} if loop_target is None else {_TORCH: target, _LOOP: loop_target}
        yield Case(
            f"models/{name}/{phase}",
            lambda dtype, threads, training=training: comparison(training),  # type: ignore[misc]
            training,
            1.0,
            "call",
            found,
            dtype=torch.float32,
        )


# ---- text and graphs


def _stanza_highway_lstm() -> Model:
    """The tagger's: 32 sentences of 5 to 40 words, packed."""
    package = _package("stanza.models.common.hlstm")
    module = package.HighwayLSTM(
        200, 200, num_layers=2, batch_first=True, bidirectional=True, highway_func=torch.tanh, pad=True
    )
    lengths = torch.randint(5, 41, (32,)).sort(descending=True).values

    def forward(module: Any, x: Tensor) -> Any:
        return module(x, lengths)[0]

    return Model(module, forward, [torch.randn(32, int(lengths[0]), 200)])


def _geometric_gru_aggregation() -> Model:
    """512 nodes with 1 to 20 neighbours."""
    package = _package("torch_geometric.nn.aggr.gru")
    index = torch.repeat_interleave(torch.arange(512), torch.randint(1, 21, (512,)))
    return Model(
        package.GRUAggregation(64, 64), lambda module, x, i: module(x, i), [torch.randn(len(index), 64), index]
    )


def _doctr_crnn() -> Model:
    """16 words in pictures of 32 × 128 pixels."""
    module = _package("doctr.models").crnn_mobilenet_v3_small(pretrained_backbone=False, exportable=True)
    words = ["word"] * 16  # asked for in training, but not used
    return Model(module, lambda module, x: module(x, words)["logits"], [torch.rand(16, 3, 32, 128)])


# ---- speech and music


def _speechbrain_crdnn_gru() -> Model:
    """The recurrent part of CRDNN: 2 layers, both directions, 512 units; 8 × 100 frames."""
    rnn = _package("speechbrain.nnet.RNN")
    module = rnn.GRU(512, input_size=640, num_layers=2, bidirectional=True)
    return Model(module, lambda module, x: module(x)[0], [torch.randn(8, 100, 640)])


def _speechbrain_crdnn() -> Model:
    """4 × 60 frames of 40 features.

    In float64 its pooling chooses others of nearly equal values, so the reference is float32.
    """
    rnn = _package("speechbrain.nnet.RNN")
    module = _package("speechbrain.lobes.models.CRDNN").CRDNN(
        input_shape=[4, 60, 40], rnn_class=rnn.GRU, rnn_layers=2, dropout=0.0
    )
    return Model(module, lambda module, x: module(x), [torch.randn(4, 60, 40)], torch.float32)


def _speechbrain_decoder() -> Model:
    """30 steps of 8 targets over 60 states of the encoder."""
    rnn = _package("speechbrain.nnet.RNN")
    module = rnn.AttentionalRNNDecoder("gru", "location", 512, 512, 1, 512, 128, channels=10, kernel_size=100)
    inputs = [torch.randn(8, 30, 128), torch.randn(8, 60, 512), torch.ones(8)]
    return Model(module, lambda module, *x: module(*x)[0], inputs, torch.float32)


def _tacotron2_inputs() -> list[Tensor]:
    """4 texts of 40 symbols, 50 frames of speech each."""
    return [torch.randint(1, 148, (4, 40)), torch.randn(4, 80, 50), torch.full((4,), 40), torch.full((4,), 50)]


def _speechbrain_tacotron2() -> Model:
    package = _package("speechbrain.lobes.models.Tacotron2")
    module = package.Tacotron2(p_attention_dropout=0.0, p_decoder_dropout=0.0)

    def forward(module: Any, text: Tensor, frames: Tensor, text_lengths: Tensor, lengths: Tensor) -> Any:
        torch.manual_seed(0)  # its pre-net always has dropout
        return module((text, text_lengths, frames, 50, lengths))[1:3]

    return Model(module, forward, _tacotron2_inputs())


def _torchaudio_tacotron2() -> Model:
    package = _package("torchaudio.models")
    module = package.Tacotron2(attention_dropout=0.0, decoder_dropout=0.0)

    def forward(module: Any, text: Tensor, frames: Tensor, text_lengths: Tensor, lengths: Tensor) -> Any:
        torch.manual_seed(0)  # its pre-net always has dropout
        return module(text, text_lengths, frames, lengths)[1:3]

    return Model(module, forward, _tacotron2_inputs())


def _openunmix() -> Model:
    """Spectrogram of 100 frames, stereo."""
    package = _package("openunmix.model")
    module = package.OpenUnmix(nb_bins=1025)
    module.lstm.dropout = 0.0
    return Model(module, lambda module, x: module(x), [torch.rand(2, 2, 1025, 100)])


def _demucs() -> Model:
    """A second of stereo."""
    package = _package("demucs.demucs")
    module = package.Demucs(["drums", "bass", "other", "vocals"], channels=32, depth=5, lstm_layers=2, dconv_mode=0)
    return Model(module, lambda module, x: module(x), [torch.randn(1, 2, 44100)])


def _asteroid_dprnn() -> Model:
    """A second of two speakers."""
    module = _package("asteroid.models").DPRNNTasNet(2, n_repeats=2)
    return Model(module, lambda module, x: module(x), [torch.randn(1, 8000)])


def _transformers_encodec() -> Model:
    """Encoder and decoder without the codebooks; a second of sound."""
    package = _package("transformers")
    module = package.EncodecModel(package.EncodecConfig())
    parts = nn.ModuleList([module.encoder, module.decoder])
    return Model(parts, lambda parts, x: parts[1](parts[0](x)), [torch.randn(1, 1, 24000)])


# ---- time series


def _gluonts_deepar() -> Model:
    """The loss of 32 series of 48 + 24 hours."""
    package = _package("gluonts.torch.model.deepar.module")
    module = package.DeepARModel("h", 48, 24, lags_seq=[1, 2, 24], dropout_rate=0.0, hidden_size=40)
    past = module.past_length

    def forward(module: Any, category: Tensor, *x: Tensor) -> Any:
        return module.loss(category, *x, torch.ones_like(x[-1]))

    inputs = [torch.zeros(32, 1, dtype=torch.long), torch.randn(32, 1), torch.randn(32, past, 1)]
    inputs += [torch.rand(32, past), torch.ones(32, past), torch.randn(32, 24, 1), torch.rand(32, 24)]
    return Model(module, forward, inputs)


def _forecasting_network() -> Model:
    """Encoder and decoder of 64 series of 24 + 6 steps."""
    package = _package("pytorch_forecasting")
    names = ["y", "a", "b"]
    module = package.RecurrentNetwork(
        "GRU",
        hidden_size=64,
        dropout=0.0,
        x_reals=names,
        time_varying_reals_encoder=names,
        time_varying_reals_decoder=names[1:],
        target="y",
    )
    lengths, later = torch.randint(8, 25, (64,)), torch.full((64,), 6)

    def forward(module: Any, past: Tensor, future: Tensor) -> Any:
        x = {"encoder_cat": None, "encoder_cont": past, "encoder_lengths": lengths}
        return module.decode_all(future, module.encode(x), later)[0]

    return Model(module, forward, [torch.randn(64, 24, 3), torch.randn(64, 6, 3)])


# ---- reinforcement learning


def _example(name: str) -> Any:
    """Import a file of examples/reinforcement_learning."""
    path = Path(__file__).resolve().parents[2] / "examples/reinforcement_learning" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _torchrl(cell: str, B: int, T: int, H: int) -> Callable[[], Model]:
    """A recurrent module on B rows of T steps, of which 3 % begin an episode."""

    def build() -> Model:
        torchrl, tensordict = _package("torchrl.modules"), _package("tensordict")
        states = ["h", "c"] if cell == "LSTM" else ["h"]
        module = getattr(torchrl, f"{cell}Module")(
            input_size=H, hidden_size=H, in_keys=["x", *states], out_keys=["y", *(("next", name) for name in states)]
        )

        def forward(module: Any, x: Tensor, begins: Tensor) -> Any:
            with torchrl.set_recurrent_mode(True):
                return module(tensordict.TensorDict({"x": x, "is_init": begins}, x.shape[:2]))["y"]

        return Model(module, forward, [torch.randn(B, T, H), torch.rand(B, T, 1) < 0.03], strict_types=True)

    return build


def _sb3_policy() -> Model:
    """The policy of RecurrentPPO on 8 sequences of 128 steps, of which 3 % begin an episode."""
    _package("sb3_contrib")
    policies = _package("sb3_contrib.common.recurrent.policies")
    states_type = _package("sb3_contrib.common.recurrent.type_aliases").RNNStates
    spaces = _package("gymnasium").spaces
    module = policies.RecurrentActorCriticPolicy(spaces.Box(-1, 1, (8,)), spaces.Discrete(4), lambda progress: 3e-4)

    def forward(module: Any, observations: Tensor, actions: Tensor, state: Tensor, begins: Tensor) -> Any:
        states = states_type((state, state), (state, state))
        return module.evaluate_actions(observations, actions, states, begins)

    begins = torch.rand(8, 128) < 0.03
    begins[:, 0] = True  # as in the sequences of its buffer
    inputs = [torch.rand(1024, 8), torch.randint(4, (1024,)), torch.zeros(1, 8, 256), begins.flatten().float()]
    return Model(module, forward, inputs, torch.float32)


def _sb3_learning(use_resets: bool) -> Case:
    """`RecurrentPPO.learn(512)` on CartPole: 4 rollouts of 128 steps, 40 training steps."""

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        ppo, gymnasium = _package("sb3_contrib").RecurrentPPO, _package("gymnasium")
        use = _example("sb3_contrib_resets").use_resets

        def learner(convert: bool, resets: bool) -> Callable[[], Call]:
            def make() -> Call:
                model = ppo("MlpLstmPolicy", gymnasium.make("CartPole-v1"), seed=1, device="cpu")
                if convert:
                    llm_ext.convert(model.policy)
                if resets:
                    use(model.policy)

                def learn() -> list[Tensor]:
                    model.learn(512)
                    return [torch.cat([parameter.detach().flatten() for parameter in model.policy.parameters()])]

                return learn

            return make

        others = [Candidate(_TORCH, "torch", learner(False, False))]
        if use_resets:
            others.append(Candidate(_LOOP, OURS, learner(True, False)))
        reference = [tensor.double() for tensor in tensors(learner(False, False)()())]
        return Comparison(reference, Candidate(_OURS, OURS, learner(True, use_resets)), others)

    name = "learn-512-in-one-call" if use_resets else "learn-512"
    return Case(
        f"models/sb3-contrib-recurrent-ppo/{name}", build, True, 1.0, "call", {_TORCH: 2.5}, dtype=torch.float32
    )


def published_cases() -> Iterator[Case]:
    """Yield the cases of all models."""
    yield from published("sb3-contrib-evaluate-actions", _sb3_policy, (3.5, 2.5))
    yield from published(
        "sb3-contrib-evaluate-actions-in-one-call",
        _sb3_policy,
        (14.0, 10.0),
        lambda module: _example("sb3_contrib_resets").use_resets(module),
        loop_target=4.0,
    )
    yield from (_sb3_learning(use_resets) for use_resets in (False, True))
    for cell in ("LSTM", "GRU"):
        name, use = f"torchrl-{cell.lower()}-module", lambda module: _example("torchrl_resets").use_resets(module)
        yield from published(f"{name}-B16-T64-H64", _torchrl(cell, 16, 64, 64))
        yield from published(f"{name}-B16-T64-H64-in-one-call", _torchrl(cell, 16, 64, 64), use_resets=use)
        yield from published(f"{name}-B128-T128-H256-in-one-call", _torchrl(cell, 128, 128, 256), use_resets=use)
    yield from published("stanza-highway-lstm", _stanza_highway_lstm, (2.2, 2.3))
    yield from published("torch-geometric-gru-aggregation", _geometric_gru_aggregation, (2.2, 2.3))
    yield from published("speechbrain-crdnn-gru", _speechbrain_crdnn_gru, (2.2, 2.3))
    yield from published("speechbrain-crdnn", _speechbrain_crdnn)
    yield from published("speechbrain-attentional-decoder", _speechbrain_decoder, (1.15, 1.1))
    yield from published("speechbrain-tacotron2", _speechbrain_tacotron2, (1.15, 1.1))
    yield from published("torchaudio-tacotron2", _torchaudio_tacotron2, (1.15, 1.1))
    yield from published("openunmix", _openunmix)
    yield from published("demucs", _demucs)
    yield from published("asteroid-dprnn", _asteroid_dprnn)
    yield from published("transformers-encodec", _transformers_encodec)
    yield from published("doctr-crnn", _doctr_crnn)
    yield from published("gluonts-deepar", _gluonts_deepar)
    yield from published("pytorch-forecasting-recurrent-network", _forecasting_network)
