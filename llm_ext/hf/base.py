"""The base of the models for transformers: initialization, wrapping of an existing model, another vocabulary size."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from llm_ext.models.initialization import init_recurrent_
from llm_ext.nn import GRU, LSTM, RNN, AdditiveAttention, AffineEmbedding, AttentionPool, Linear
from llm_ext.nn.arguments import as_size

__all__ = ["RecurrentPreTrainedModel"]

Model = TypeVar("Model", bound="RecurrentPreTrainedModel")


class RecurrentPreTrainedModel(PreTrainedModel):
    """A model of llm_ext, `model`, as transformers expects it."""

    model: Any
    # A state cannot go back, as assisted generation would need it.
    _is_stateful = True

    @classmethod
    def wrap(cls: type[Model], model: nn.Module, **kwargs: Any) -> Model:
        """Return a model for transformers that shares the parameters of `model`.

        Args:
            model: An `LLM` or a `Seq2Seq`.
            kwargs: Further arguments of the configuration, such as `eos_token_id`.

        Raises:
            ValueError: transformers has no such model, or the model is quantized as a whole.
        """
        config = cls.config_class.of(model, **kwargs)
        parameter = next(model.parameters(), None)
        if parameter is None:
            raise ValueError(
                f"{cls.__name__}: transformers takes no model without parameters; call llm_ext.dequantize_ first"
            )
        config.dtype = parameter.dtype
        with torch.device("meta"):
            wrapped = cls(config)
        wrapped.model = model
        wrapped.train(model.training)
        return wrapped

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # `forward` makes a `RecurrentCache` in the first step.
        return False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RNN | GRU | LSTM):
            module.reset_parameters()
            init_recurrent_(module)
        elif isinstance(module, AffineEmbedding | AttentionPool | AdditiveAttention):
            module.reset_parameters()
        elif isinstance(module, Linear):
            module.reset_parameters()
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _adjust_bias(self, output_embeddings: nn.Module, input_embeddings: nn.Parameter) -> None:
        """Do nothing: where weights are tied, transformers would enlarge the bias of an `AffineEmbedding` to V."""

    def get_output_embeddings(self) -> Linear:
        """Return the head."""
        head: Linear = self.model.head
        return head

    def set_output_embeddings(self, new_embeddings: Linear) -> None:
        """Replace the head."""
        self.model.head = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> AffineEmbedding:
        """Change the size of the vocabulary, of the embedding and of the head. Everything else stays as it is.

        Args:
            new_num_tokens: New number of token ids; those at the end are added or removed. None: as before.
            pad_to_multiple_of: Round the number up to a multiple of this one.
            mean_resizing: New rows are the mean of the old ones; otherwise they are initialized as in a new model.

        Returns:
            The embedding.

        Raises:
            ValueError: Sources and targets have vocabularies of their own, or the number is below 1.
        """
        rows = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        rows = as_size(type(self).__name__, "new_num_tokens", rows)
        embedding: AffineEmbedding = self.get_input_embeddings()
        if rows != self.config.vocab_size:
            self._set_vocab_size(rows)
            head: Linear = self.get_output_embeddings()
            tied = head.weight is embedding.weight
            factory: dict[str, Any] = {"device": head.weight.device, "dtype": head.weight.dtype}
            new_head = Linear(head.in_features, rows, **factory)
            nn.init.zeros_(new_head.bias)
            if tied:
                nn.init.normal_(new_head.weight, std=head.in_features**-0.5)
            for name in ("weight", "bias"):
                _resize(head, name, new_head, mean_resizing)
            if tied:
                embedding.weight = head.get_parameter("weight")
            else:
                _resize(embedding, "weight", AffineEmbedding(rows, embedding.embedding_dim, **factory), mean_resizing)
            embedding.num_embeddings = head.out_features = rows
        return embedding

    def _set_vocab_size(self, size: int) -> None:
        """Change the size of the vocabulary in the configuration and the model, but for its layers."""
        self.config.vocab_size = self.model.vocab_size = size
        self.model._config |= {"vocab_size": size, "output_dim": size}


@torch.no_grad()
def _resize(layer: nn.Module, name: str, new: nn.Module, mean: bool) -> None:
    """Replace a parameter of a layer by that of a new layer with more or fewer rows; rows of both keep their values.

    Further rows are those of the new layer, or the mean of the old ones.
    """
    old, resized = layer.get_parameter(name), new.get_parameter(name)
    kept = min(len(old), len(resized))
    if mean:
        resized.copy_(old.mean(0).expand_as(resized))
    resized[:kept] = old[:kept]
    setattr(layer, name, resized.requires_grad_(old.requires_grad))
