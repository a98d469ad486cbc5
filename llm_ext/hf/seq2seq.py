"""`Seq2Seq` as a sequence-to-sequence model of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import ModelOutput, can_return_tuple

from llm_ext.hf.base import RecurrentPreTrainedModel
from llm_ext.hf.cache import RecurrentCache, state_of
from llm_ext.hf.configuration import Seq2SeqConfig
from llm_ext.hf.padding import find_padding
from llm_ext.models import EncoderOutput, Seq2Seq, Seq2SeqState
from llm_ext.nn import AffineEmbedding

__all__ = ["EncodedSource", "Seq2SeqForConditionalGeneration"]


@dataclass
class EncodedSource(ModelOutput):
    """The source that a `Seq2Seq` has read: `encoder_outputs` for transformers.

    Attributes:
        last_hidden_state: The values that the decoder attends to, ``[B, S, E]``, the tokens of each source first.
        encoder_output: Keys, values and lengths.
        state: First state of the decoder.
    """

    last_hidden_state: Tensor | None = None
    encoder_output: EncoderOutput | None = None
    state: Seq2SeqState | None = None


class _Encoder(nn.Module):
    """The encoder of a model, in the form in which `generate` calls it."""

    main_input_name = "input_ids"

    def __init__(self, model: Seq2Seq) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> EncodedSource:
        encoder_output, state = self.model.encode(*_align(input_ids, attention_mask))
        return EncodedSource(encoder_output.values, encoder_output, state)


class Seq2SeqForConditionalGeneration(RecurrentPreTrainedModel, GenerationMixin):
    """A `Seq2Seq` for transformers: `generate`, `from_pretrained` and `Seq2SeqTrainer`.

    Args:
        config: The configuration.

    Attributes:
        model: The `Seq2Seq`.

    Example:
        >>> config = llm_ext.hf.Seq2SeqConfig(
        ...     source_vocab_size=50, target_vocab_size=60, embedding_dim=8, hidden_dim=16,
        ...     pad_token_id=0, eos_token_id=0, decoder_start_token_id=0,
        ... )
        >>> model = llm_ext.hf.Seq2SeqForConditionalGeneration(config)
        >>> source, labels = torch.randint(1, 50, (2, 7)), torch.randint(1, 60, (2, 5))
        >>> model(source, labels=labels).loss.backward()
        >>> model.eval().generate(source, num_beams=3, max_length=9).shape[0]
        2
    """

    config_class = Seq2SeqConfig
    model: Seq2Seq

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__(config)
        self.model = config.build()
        # The second name of a shared parameter, and the one that is saved.
        self._tied_weights_keys = {}
        if config.share_embedding:
            for name in ("weight", "bias"):
                self._tied_weights_keys[f"model.target_embedding.{name}"] = f"model.source_embedding.{name}"
        if config.tie_head:
            side = "source" if config.share_embedding else "target"
            self._tied_weights_keys["model.head.weight"] = f"model.{side}_embedding.weight"
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.model.head and self.config.tie_head:
            nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def _set_vocab_size(self, size: int) -> None:
        if not self.config.share_embedding:
            raise ValueError("resize_token_embeddings: sources and targets must share one embedding (share_embedding)")
        for sizes in (self.config, self.model):
            sizes.source_vocab_size = sizes.target_vocab_size = size
        self.model._config |= {"source_vocab_size": size, "target_vocab_size": size}

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return a module that reads sources; its parameters are those of the model."""
        return _Encoder(self.model)

    def get_input_embeddings(self) -> AffineEmbedding:
        """Return the embedding of sources."""
        embedding = self.model.source_embedding
        assert embedding is not None
        return embedding

    def set_input_embeddings(self, value: AffineEmbedding) -> None:
        """Replace the embedding of sources, and that of targets if they share it."""
        self.model.source_embedding = value
        if self.config.share_embedding:
            self.model.target_embedding = value

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return the ids that the decoder reads for labels ``[B, T]``: the labels one position later.

        Raises:
            ValueError: The configuration has no `decoder_start_token_id`.
        """
        start = self.config.decoder_start_token_id
        if start is None:
            raise ValueError(
                "Seq2SeqForConditionalGeneration: labels need a decoder_start_token_id in the configuration"
            )
        ids = torch.cat((torch.full_like(labels[:, :1], start), labels[:, :-1]), 1)
        return ids.masked_fill(ids == -100, start)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        # The beams of a source read one encoder output: only the ids are repeated.
        expanded: tuple[Tensor, dict[str, Any]]
        expanded = super()._expand_inputs_for_generation(expand_size, False, input_ids, **kwargs)
        return expanded

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: EncodedSource | None = None,
        cache: RecurrentCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Score the tokens that follow each prefix of the targets.

        Args:
            input_ids: Token ids of the sources, ``[B, S]``.
            attention_mask: Zero at padding of the sources, which may be on any side, ``[B, S]``. None: no padding.
            decoder_input_ids: Token ids of N targets, ``[N, T]``, which begin with `decoder_start_token_id`; N is B, or
                with `encoder_outputs` a multiple of B, for several targets of each source. None: from `labels`.
            decoder_attention_mask: Zero at padding of the targets, ``[N, T]``. None: no padding.
            encoder_outputs: Result of ``get_encoder()(input_ids, attention_mask)``, in place of the sources.
            cache: State after the tokens before, which is replaced by that after these; None at the start.
            labels: Ids to predict, ``[N, T]``, with -100 where nothing is to be predicted.
            use_cache: Return the state. None: if a `cache` is given.
            kwargs: Arguments of the loss, such as `num_items_in_batch`; others are ignored.

        Returns:
            `loss` if there are labels, the scores `logits` ``[N, T, V]``, and the state `cache`. The scores at padding
            are undefined.

        Raises:
            ValueError: An argument is missing, or a shape does not fit.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("Seq2SeqForConditionalGeneration: decoder_input_ids or labels must be given")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if use_cache is None:
            use_cache = cache is not None
        padding = find_padding(decoder_attention_mask, decoder_input_ids)
        if encoder_outputs is None and cache is None and not use_cache:
            # With the whole target at once the decoder runs in one call.
            source, lengths = _align(input_ids, attention_mask)
            if padding is None:
                logits = self.model(source, decoder_input_ids, lengths)
            else:
                scores = self.model(source, padding.align(decoder_input_ids), lengths, padding.lengths)
                logits = padding.restore(scores, slice(None))
        else:
            if padding is not None:
                raise ValueError("Seq2SeqForConditionalGeneration: targets must have no padding where a state is kept")
            if encoder_outputs is None:
                encoder_outputs = self.get_encoder()(input_ids, attention_mask)
            logits, state = self._steps(decoder_input_ids, encoder_outputs, state_of(cache, Seq2SeqState))
            if use_cache:
                cache = RecurrentCache() if cache is None else cache
                cache.advance(state, decoder_input_ids.shape[1])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, shift_labels=labels, **kwargs)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            cache=cache if use_cache else None,
            encoder_last_hidden_state=None if encoder_outputs is None else encoder_outputs.last_hidden_state,
        )

    def _steps(self, ids: Tensor, source: EncodedSource, state: Seq2SeqState | None) -> tuple[Tensor, Seq2SeqState]:
        """Return the scores ``[N, T, V]`` of targets ``[N, T]``, step by step, and the state after them."""
        assert source.encoder_output is not None
        assert source.state is not None
        B = len(source.encoder_output.values)
        if state is None:
            state = source.state.repeat(len(ids) // B)
        scores = []
        for t in range(ids.shape[1]):
            following, state, _ = self.model.step(ids[:, t].reshape(B, -1), state, source.encoder_output)
            scores.append(following.flatten(0, 1))
        return torch.stack(scores, 1), state


def _align(ids: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return ids ``[B, S]`` with the tokens of each row first, and their lengths or None."""
    if ids is None:
        raise ValueError("Seq2SeqForConditionalGeneration: input_ids or encoder_outputs must be given")
    padding = find_padding(mask, ids)
    return (ids, None) if padding is None else (padding.align(ids), padding.lengths)
