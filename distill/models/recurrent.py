"""An sLSTM language model in transformers' interface: save, load, generate, train as a student.

A stack of `SLSTMBlock` between an embedding and a head, which by default are one. What it remembers
has a constant size, and stands where a transformer has its cache of keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from distill.errors import DistillError
from distill.models.blocks import SLSTMBlock
from distill.models.state_cache import StateCacheLayer


class SLSTMConfig(PretrainedConfig):
    """Sizes of an `SLSTMForCausalLM`; `backend` is passed on to `xk.slstm`."""

    model_type = "slstm"

    vocab_size: int = 257
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    tie_word_embeddings: bool = True
    use_cache: bool = True
    backend: str = "auto"


class SLSTMCache(Cache):
    """A state a block, of constant size."""

    def __init__(self, config: PretrainedConfig):
        super().__init__(layers=[StateCacheLayer() for _ in range(config.num_hidden_layers)])


class _SLSTMPreTrained(PreTrainedModel):
    config_class = SLSTMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SLSTMBlock"]  # noqa: RUF012, as transformers has it
    # Of generate(): a state does not go back to an earlier token, as drafted ones would need.
    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Logits of unit variance at the start. Blocks and norms begin as they were made."""
        if isinstance(module, nn.Embedding) or module is getattr(self, "lm_head", None):
            weight: Any = module.weight
            nn.init.normal_(weight, std=self.config.hidden_size**-0.5)
        elif isinstance(module, SLSTMBlock):
            module.reset_feed_forward(self.config.num_hidden_layers)


class SLSTMModel(_SLSTMPreTrained):
    """The blocks: ids (B, T) to hidden states (B, T, E)."""

    def __init__(self, config: SLSTMConfig):
        super().__init__(config)
        width, count = config.hidden_size, config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(
            SLSTMBlock(
                *(width, config.num_attention_heads, config.intermediate_size),
                block_ratio=index / max(1, count - 1),
                backend=config.backend,
            )
            for index in range(count)
        )
        self.norm = nn.LayerNorm(width, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SLSTMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As transformers' models; positions are of no use to it, and padding is refused."""
        if attention_mask is not None and not bool(attention_mask.all()):
            raise DistillError(
                "slstm model: attention_mask must be None or ones, got zeros: batch prompts of one"
                " length, or pack them and pass cu_seq_lens_q"
            )
        if cu_seq_lens_q is not None and (use_cache or past_key_values is not None):
            raise DistillError(
                "slstm model: use_cache must be False for packed documents (cu_seq_lens_q), got"
                " True"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seq_lens_q is None
        if past_key_values is None and use_cache:
            past_key_values = SLSTMCache(self.config)
        x_BTE = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        states = [x_BTE]
        for index, block in enumerate(self.layers):
            cache: Any = None if past_key_values is None else past_key_values.layers[index]
            before = None if cache is None else cache.state
            if self.gradient_checkpointing and self.training:
                x_BTE, after = self._gradient_checkpointing_func(
                    block.__call__, x_BTE, before, cu_seq_lens_q
                )
            else:
                x_BTE, after = block(x_BTE, before, cu_seq_lens_q)
            if cache is not None:
                cache.state, cache.seen = after, cache.seen + x_BTE.shape[1]
            states.append(x_BTE)
        last = self.norm(x_BTE)
        return BaseModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states[:-1], last) if output_hidden_states else None,
        )


class SLSTMForCausalLM(_SLSTMPreTrained, GenerationMixin):
    """The model with its head.

    Example:
        >>> import torch
        >>> from distill.models.recurrent import SLSTMConfig, SLSTMForCausalLM
        >>> config = SLSTMConfig(vocab_size=99, hidden_size=32, intermediate_size=48)
        >>> model = SLSTMForCausalLM(config).eval()
        >>> model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False).shape
        torch.Size([1, 9])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SLSTMConfig):
        super().__init__(config)
        self.model = SLSTMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' models; labels (B, T) are not shifted, -100 does not count."""
        output = self.model(input_ids, **kwargs)
        logits_BTV = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BTV, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )


AutoConfig.register(SLSTMConfig.model_type, SLSTMConfig)
AutoModelForCausalLM.register(SLSTMConfig, SLSTMForCausalLM)
