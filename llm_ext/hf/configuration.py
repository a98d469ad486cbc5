"""Configurations of the models for transformers: the arguments of `LLM` and `Seq2Seq`, and ids with a meaning."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from llm_ext.models import LLM, Seq2Seq

__all__ = ["LLMConfig", "Seq2SeqConfig"]


class LLMConfig(PreTrainedConfig):
    """Configuration of an `LLMForCausalLM`: the arguments of `LLM`.

    Args:
        vocab_size: V, number of token ids, which is also the size of the output.
        embedding_dim: E, size of the embeddings.
        hidden_dim: H, size of the hidden states; `hidden_size` for transformers.
        n_layers: Number of recurrent layers; `num_hidden_layers` for transformers.
        dropout: As in `LLM`.
        cell: As in `LLM`.
        nonlinearity: As in `LLM`.
        attention: As in `LLM`.
        attn_dim: As in `LLM`.
        score: As in `LLM`.
        feature_dim: As in `LLM`.
        use_cache: Return the state after each call in evaluation mode.
        pad_token_id: Id that fills rows, or None.
        bos_token_id: Id that begins a text, or None.
        eos_token_id: Id that ends a text, or None.
        kwargs: Arguments of `transformers.PreTrainedConfig`.

    Example:
        >>> config = llm_ext.hf.LLMConfig(vocab_size=100, hidden_dim=64, cell="lstm")
        >>> config.hidden_size, config.num_hidden_layers
        (64, 1)
    """

    model_type = "llm_ext_lm"
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "hidden_dim", "num_hidden_layers": "n_layers"}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    vocab_size: int = 256
    embedding_dim: int = 128
    hidden_dim: int = 512
    n_layers: int = 1
    dropout: float = 0.0
    cell: str = "rnn"
    nonlinearity: str = "tanh"
    attention: str = "hidden"
    attn_dim: int | None = None
    score: str = "linear"
    feature_dim: int | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def of(cls, model: LLM, **kwargs: Any) -> LLMConfig:
        """Return the configuration of a model; `kwargs` are further arguments.

        Raises:
            ValueError: The output of the model does not have the size of its vocabulary.
        """
        arguments = model.config()
        output_dim = arguments.pop("output_dim")
        if output_dim != model.vocab_size:
            raise ValueError(f"LLMConfig: output_dim must be vocab_size = {model.vocab_size}, got {output_dim}")
        return cls(**arguments, **kwargs)

    def build(self) -> LLM:
        """Return a new model."""
        return LLM(
            self.vocab_size,
            self.embedding_dim,
            self.hidden_dim,
            self.vocab_size,
            self.n_layers,
            self.dropout,
            cell=self.cell,
            nonlinearity=self.nonlinearity,
            attention=self.attention,
            attn_dim=self.attn_dim,
            score=self.score,
            feature_dim=self.feature_dim,
        )


class Seq2SeqConfig(PreTrainedConfig):
    """Configuration of a `Seq2SeqForConditionalGeneration`: the arguments of `Seq2Seq` with sources of token ids.

    Args:
        source_vocab_size: V_s, number of token ids of sources.
        target_vocab_size: V, number of token ids of targets; `vocab_size` for transformers.
        embedding_dim: E, size of the embeddings and of the readout.
        hidden_dim: H, size of the hidden states; `hidden_size` for transformers.
        n_layers: Number of recurrent layers of encoder and decoder each; `num_hidden_layers` for transformers.
        dropout: As in `Seq2Seq`.
        cell: As in `Seq2Seq`.
        nonlinearity: As in `Seq2Seq`.
        attn_dim: As in `Seq2Seq`.
        input_feeding: As in `Seq2Seq`.
        share_embedding: As in `Seq2Seq`.
        tie_head: As in `Seq2Seq`.
        copy: As in `Seq2Seq`.
        pad_token_id: Id that fills rows, or None.
        bos_token_id: Unused by the model.
        eos_token_id: Id that ends a target, or None.
        decoder_start_token_id: Id that begins every target, or None.
        kwargs: Arguments of `transformers.PreTrainedConfig`.

    Example:
        >>> config = llm_ext.hf.Seq2SeqConfig(source_vocab_size=100, target_vocab_size=120, decoder_start_token_id=119)
        >>> config.vocab_size
        120
    """

    model_type = "llm_ext_seq2seq"
    attribute_map: ClassVar[dict[str, str]] = {
        "vocab_size": "target_vocab_size",
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "n_layers",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "encoder_last_hidden_state"]

    source_vocab_size: int = 256
    target_vocab_size: int = 256
    embedding_dim: int = 128
    hidden_dim: int = 512
    n_layers: int = 1
    dropout: float = 0.0
    cell: str = "gru"
    nonlinearity: str = "tanh"
    attn_dim: int | None = None
    input_feeding: bool = False
    share_embedding: bool = False
    tie_head: bool = False
    copy: bool = False
    is_encoder_decoder: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    @classmethod
    def of(cls, model: Seq2Seq, **kwargs: Any) -> Seq2SeqConfig:
        """Return the configuration of a model; `kwargs` are further arguments.

        Raises:
            ValueError: The sources of the model are feature vectors.
        """
        arguments = model.config()
        if arguments.pop("source_feature_dim") is not None:
            raise ValueError("Seq2SeqConfig: sources must be token ids, got a model of feature vectors")
        return cls(**arguments, **kwargs)

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether parameters are shared, which is what transformers asks."""
        return self.tie_head or self.share_embedding

    def build(self) -> Seq2Seq:
        """Return a new model."""
        return Seq2Seq(
            self.source_vocab_size,
            self.target_vocab_size,
            self.embedding_dim,
            self.hidden_dim,
            self.n_layers,
            self.dropout,
            cell=self.cell,
            nonlinearity=self.nonlinearity,
            attn_dim=self.attn_dim,
            input_feeding=self.input_feeding,
            share_embedding=self.share_embedding,
            tie_head=self.tie_head,
            copy=self.copy,
        )
