"""The models of llm_ext for Hugging Face transformers.

Importing this package registers `LLMForCausalLM` for `AutoModelForCausalLM` and `Seq2SeqForConditionalGeneration` for
`AutoModelForSeq2SeqLM`, with their configurations. It needs transformers:
`pip install 'llm_ext[hf]'`.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from llm_ext.hf.cache import RecurrentCache
from llm_ext.hf.causal_lm import LLMForCausalLM
from llm_ext.hf.configuration import LLMConfig, Seq2SeqConfig
from llm_ext.hf.seq2seq import EncodedSource, Seq2SeqForConditionalGeneration

__all__ = [
    "EncodedSource",
    "LLMConfig",
    "LLMForCausalLM",
    "RecurrentCache",
    "Seq2SeqConfig",
    "Seq2SeqForConditionalGeneration",
]

AutoConfig.register(LLMConfig.model_type, LLMConfig)
AutoConfig.register(Seq2SeqConfig.model_type, Seq2SeqConfig)
AutoModelForCausalLM.register(LLMConfig, LLMForCausalLM)
AutoModelForSeq2SeqLM.register(Seq2SeqConfig, Seq2SeqForConditionalGeneration)
