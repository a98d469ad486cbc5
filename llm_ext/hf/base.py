"""The base of the models for transformers: initialization, wrapping of an existing model, another vocabulary size."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from llm_ext.models.initialization import init_recurrent_
from llm_ext.nn import GRU, LSTM, RNN, AdditiveAttention, AffineEmbedding, AttentionPool, Linear

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

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> AffineEmbedding:
        """Change the size of the vocabulary, of the embedding and of the head. Other parameters stay the same objects.

        Args:
            new_num_tokens: New number of token ids; those at the end are added or removed. None: as before.
            pad_to_multiple_of: Round the number up to a multiple of this one.
            mean_resizing: New rows are the mean of the old ones; otherwise they are initialized as in a new model.

        Returns:
            The embedding.

        Raises:
            ValueError: Sources and targets have vocabularies of their own.
        """
        rows = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        if rows != self.config.vocab_size:
            self._set_vocab_size(rows)
            old, new = self.model, self.config.build().to(self.device, self.dtype)
            for name, parameter in old.named_parameters(remove_duplicate=False):
                path, _, leaf = name.rpartition(".")
                layer = new.get_submodule(path)
                resized = getattr(layer, leaf)
                if resized.shape == parameter.shape:
                    setattr(layer, leaf, parameter)
                    continue
                kept = min(len(parameter), rows)
                with torch.no_grad():
                    if mean_resizing:
                        resized.copy_(parameter.mean(0).expand_as(resized))
                    resized[:kept] = parameter[:kept]
                resized.requires_grad_(parameter.requires_grad)
            self.model = new.train(old.training)
        embedding: AffineEmbedding = self.get_input_embeddings()
        return embedding

    def _set_vocab_size(self, size: int) -> None:
        """Change the size of the vocabulary in the configuration."""
        self.config.vocab_size = size
