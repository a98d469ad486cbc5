"""`LLM` as a causal language model of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from llm_ext.hf.base import RecurrentPreTrainedModel
from llm_ext.hf.cache import RecurrentCache, state_of
from llm_ext.hf.configuration import LLMConfig
from llm_ext.hf.padding import find_padding
from llm_ext.models import LLM, LLMState
from llm_ext.models.recurrent_layers import fill_padding
from llm_ext.nn import AffineEmbedding

__all__ = ["LLMForCausalLM"]


class LLMForCausalLM(RecurrentPreTrainedModel, GenerationMixin):
    """An `LLM` for transformers: `generate`, `from_pretrained`, `Trainer` and `pipeline`.

    Args:
        config: The configuration.

    Attributes:
        model: The `LLM`.

    Example:
        >>> model = llm_ext.hf.LLMForCausalLM(llm_ext.hf.LLMConfig(vocab_size=50, embedding_dim=8, hidden_dim=16))
        >>> ids = torch.randint(50, (2, 7))
        >>> model(ids, labels=ids).loss.backward()
        >>> model.eval().generate(ids, max_new_tokens=5, do_sample=True, top_p=0.9).shape
        torch.Size([2, 12])
    """

    config_class = LLMConfig
    model: LLM

    def __init__(self, config: LLMConfig) -> None:
        super().__init__(config)
        self.model = config.build()
        self.post_init()

    def get_input_embeddings(self) -> AffineEmbedding:
        """Return the embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: AffineEmbedding) -> None:
        """Replace the embedding."""
        self.model.embedding = value

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the arguments of the next call of `forward` in `generate`; the arguments are those of transformers."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if kwargs.get("use_cache") and not kwargs.get("is_first_iteration"):
            inputs["attention_mask"] = None  # the new tokens are no padding
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: RecurrentCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Score the tokens that follow each prefix.

        Args:
            input_ids: Token ids, ``[B, T]``.
            attention_mask: Zero at padding, which may be on any side, ``[B, T]``, or longer at its left by the tokens
                before. The model does not see padding, and ids there may have any value. None: no padding.
            cache: State after the tokens before, which is replaced by that after these; None at the start of a text.
            inputs_embeds: Embeddings ``[B, T, E]`` in place of ids.
            labels: Ids to predict, ``[B, T]``; those of `input_ids`, with -100 where nothing is to be predicted. The
                score at position t is that of the label at t + 1.
            use_cache: Return the state. None: if a `cache` is given, or in evaluation mode, as the configuration says.
            logits_to_keep: Number of positions at the end to score, or their indices; 0 for all.
            kwargs: Arguments of the loss, such as `num_items_in_batch`; others are ignored.

        Returns:
            `loss` if there are labels, the scores `logits` ``[B, T, V]``, and the state `cache`. The scores at padding
            are undefined.

        Raises:
            ValueError: Not exactly one of `input_ids` and `inputs_embeds` is given, or a shape does not fit.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("LLMForCausalLM: exactly one of input_ids and inputs_embeds must be given")
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training)
        padding, lengths = find_padding(attention_mask, tokens), None
        if padding is not None:
            tokens, lengths = padding.align(tokens), padding.lengths
        x = fill_padding(tokens, lengths).transpose(0, 1)
        x = x if input_ids is None else self.model.embedding(x)
        features, state = self.model._read(x, state_of(cache, LLMState), self.model.pool, lengths)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model._scores(features[:, kept] if padding is None else padding.restore(features, kept))
        loss = None
        if labels is not None:
            labels = labels if padding is None else padding.unpredicted(labels)
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        if use_cache:
            cache = RecurrentCache() if cache is None else cache
            cache.advance(state, tokens.shape[1])
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache if use_cache else None)
