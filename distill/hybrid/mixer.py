"""The hybrid mixer: an mLSTM over everything and softmax attention over a window, weighed per head.

    h_t = o_t * mLSTM(phi(q), phi(k), v)_t + (1 - o_t) * window(q, k, v)_t
    mLSTM: S_t = f_t S_{t-1} + i_t phi(k_t) v_t^T,  z_t = f_t z_{t-1} + i_t phi(k_t)
           phi(q_t) S_t / (phi(q_t) z_t),  i = exp(w_i x_t + b_i),  f = sigmoid(w_f x_t + b_f)
    o_t = sigmoid(w_o [q_t, k_t, v_t] + b_o), one number a head

Source: Effective Distillation to Hybrid xLSTM Architectures, arXiv 2603.15590, section 3.1. q and k
come after the position embedding, and x is what the attention layer gets. H query heads share G
heads of keys and values (grouped-query attention): the window keeps G of them, and the mLSTM has S
states, H or G (`HybridOptions.grouped_heads`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xlstm_kernels as xk
from distill.hybrid.options import HybridOptions
from xlstm_kernels.nn import GateProjection

Rotation = tuple[Tensor, Tensor]  # cos and sin of each token, (B or 1, T, R)
STEP_TOKENS = 16  # that `xk.mlstm_step` takes at once


class HybridState(NamedTuple):
    """What a mixer carries from token to token: of constant size, whatever has passed."""

    mlstm: xk.MLSTMState
    window: Any  # what `xk.sliding_window_cache` made


class HybridMixer(nn.Module):
    """forward(x, q, k, v) -> h: x (B, T, E), q (B, T, H, D), k and v (B, T, G, D), h like q."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_dim: int, options: HybridOptions
    ):
        super().__init__()
        self.options = options
        self.heads, self.head_dim = heads, head_dim
        self.states = options.states(heads, kv_heads)
        # Called with q, k, scale, and what goes into the mLSTM and its gate o.
        self.observer: Callable[..., None] | None = None
        if options.feature_map == "elu":
            self.feature_q = self.feature_k = None
        else:
            shape = head_dim, options.feature_dim or head_dim
            self.feature_q = nn.Parameter(torch.empty(heads, *shape))
            self.feature_k = nn.Parameter(torch.empty(self.states, *shape))
        self.gates = GateProjection(width, 2 * self.states)  # i, f
        inputs = {"qkv": 3 * head_dim, "x": width}.get(options.output_gate)
        self.output_weight = None if inputs is None else nn.Parameter(torch.empty(heads, inputs))
        self.output_bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        options = self.options
        for weight_HDK in (self.feature_q, self.feature_k):
            if weight_HDK is None:
                continue
            if options.feature_init == "identity":
                weight_HDK.copy_(torch.eye(*weight_HDK.shape[1:]).expand_as(weight_HDK))
            else:
                bound = self.head_dim**-0.5
                nn.init.uniform_(weight_HDK, -bound, bound)
        nn.init.zeros_(self.gates.weight)
        spread = 3.0 if options.gate_init == "spread" else 0.0
        first = options.forget_bias
        i_S, f_S = self.gates.bias.chunk(2)
        i_S.zero_()
        f_S.copy_(torch.linspace(first, first + spread, self.states))
        if self.output_weight is not None:
            nn.init.zeros_(self.output_weight)
        nn.init.constant_(self.output_bias, options.output_bias)

    def forward(
        self,
        x_BTE: Tensor,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGD: Tensor,
        *,
        scale: float | None = None,
        cu_seqlens: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """A whole sequence, or packed ones; `scale` is that of the softmax, `rotation` what q and k
        were turned by."""
        return self._sequence(x_BTE, q_BTHD, k_BTGD, v_BTGD, scale, cu_seqlens, rotation)[0]

    def prefill(
        self,
        x_BTE: Tensor,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGD: Tensor,
        *,
        scale: float,
        rotation: Rotation | None = None,
    ) -> tuple[Tensor, HybridState]:
        """`forward`, and the state after its last token."""
        h_BTHD, mlstm = self._sequence(x_BTE, q_BTHD, k_BTGD, v_BTGD, scale, None, rotation)
        return h_BTHD, HybridState(mlstm, xk.sliding_window_cache(k_BTGD, v_BTGD, **self._window))

    def _sequence(
        self,
        x_BTE: Tensor,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGD: Tensor,
        scale: float | None,
        cu_seqlens: Tensor | None,
        rotation: Rotation | None,
    ) -> tuple[Tensor, xk.MLSTMState]:
        where: dict[str, Any] = {"cu_seqlens": cu_seqlens, "backend": self.options.backend}
        window_BTHD = xk.sliding_window_attention(
            q_BTHD, k_BTGD, v_BTGD, scale=scale, **self._window, **where
        )
        (phi_q_BTHK, *tokens), o_BTH1 = self._prepare(x_BTE, q_BTHD, k_BTGD, v_BTGD, rotation)
        shared = self.heads // self.states
        # Heads that share a state compute the same one here, each with its own queries.
        mlstm_inputs: Any = (phi_q_BTHK, *(_repeat(x, shared) for x in tokens))
        if self.observer is not None:
            self.observer(q_BTHD, k_BTGD, scale, mlstm_inputs, o_BTH1)
        h_BTHD, state = xk.mlstm(*mlstm_inputs, **(self._mlstm | where))
        if shared > 1:
            state = xk.MLSTMState(*(part[:, ::shared].contiguous() for part in state))
        return torch.lerp(window_BTHD, h_BTHD, o_BTH1), state

    def step(
        self,
        x_BTE: Tensor,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGD: Tensor,
        state: HybridState,
        *,
        scale: float,
        rotation: Rotation | None = None,
    ) -> tuple[Tensor, HybridState]:
        """`prefill` from a state; without gradients in the state's storage."""
        inplace = not torch.is_grad_enabled()
        mlstm_inputs, o_BTH1 = self._prepare(x_BTE, q_BTHD, k_BTGD, v_BTGD, rotation)
        h_BTHD, mlstm = self._steps(mlstm_inputs, state.mlstm, inplace)
        window, outputs = state.window, []
        for q_BHD, k_BGD, v_BGD in zip(
            *(x.unbind(1) for x in (q_BTHD, k_BTGD, v_BTGD)), strict=True
        ):
            window_BHD, window = xk.sliding_window_attention_step(
                q_BHD, k_BGD, v_BGD, window, scale=scale, inplace=inplace
            )
            outputs.append(window_BHD)
        window_BTHD = torch.stack(outputs, dim=1)
        return torch.lerp(window_BTHD, h_BTHD, o_BTH1), HybridState(mlstm, window)

    def _steps(
        self, mlstm_inputs: Any, state: xk.MLSTMState, inplace: bool
    ) -> tuple[Tensor, xk.MLSTMState]:
        """The mLSTM's h (B, T, H, D), and its state after these tokens.

        Queries that share a state are tokens that follow one another, of which the first alone
        writes, so that the state is read and written once for all of them.
        """
        how = self._mlstm | {"inplace": inplace, "backend": self.options.backend}
        T, shared = mlstm_inputs[0].shape[1], self.heads // self.states
        tokens = self._fold(*mlstm_inputs) if shared > 1 else mlstm_inputs
        if tokens[0].shape[1] <= STEP_TOKENS:
            h_BNSD, state = xk.mlstm_step(*(*tokens, state), **how)
        else:
            outputs = []
            for piece in zip(*(x.split(STEP_TOKENS, dim=1) for x in tokens), strict=True):
                h_BNSD, state = xk.mlstm_step(*(*piece, state), **how)
                outputs.append(h_BNSD)
            h_BNSD = torch.cat(outputs, dim=1)
        if shared > 1:
            h_BNSD = h_BNSD.unflatten(1, (T, shared)).transpose(2, 3).flatten(2, 3)
        return h_BNSD, state

    def _fold(
        self,
        phi_q_BTHK: Tensor,
        phi_k_BTSK: Tensor,
        v_BTSD: Tensor,
        i_BTS: Tensor,
        f_BTS: Tensor,
    ) -> Any:
        """(B, N, S, ...) of each: a token for each query."""
        shared = self.heads // self.states
        parts = (
            phi_q_BTHK.unflatten(2, (self.states, shared)).transpose(2, 3),
            *(x.unsqueeze(2).expand(-1, -1, shared, -1, -1) for x in (phi_k_BTSK, v_BTSD)),
            F.pad(i_BTS.unsqueeze(2), (0, 0, 0, shared - 1), value=-math.inf),
            F.pad(f_BTS.unsqueeze(2), (0, 0, 0, shared - 1), value=math.inf),
        )
        return [x.flatten(1, 2) for x in parts]

    def _prepare(
        self,
        x_BTE: Tensor,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGD: Tensor,
        rotation: Rotation | None,
    ) -> tuple[Any, Tensor]:
        """phi(q) of H heads, phi(k), v, i and f of S, and o of H."""
        if self.options.rotary == "window" and rotation is not None:
            q_BTHD, k_BTGD = (_turned_back(x, *rotation) for x in (q_BTHD, k_BTGD))
        repeats = self.heads // k_BTGD.shape[2]
        k_BTHD, v_BTHD = _repeat(k_BTGD, repeats), _repeat(v_BTGD, repeats)
        share = self.states < self.heads
        k_BTSD, v_BTSD = (k_BTGD, v_BTGD) if share else (k_BTHD, v_BTHD)
        i_BTS, f_BTS = self.gates(x_BTE).chunk(2, dim=-1)
        phi_q, phi_k = self._map(q_BTHD, self.feature_q), self._map(k_BTSD, self.feature_k)
        o_BTH = self._output_gate(x_BTE, q_BTHD, k_BTHD, v_BTHD)
        return (phi_q, phi_k, v_BTSD, i_BTS, f_BTS), o_BTH.unsqueeze(-1)

    def _map(self, x_BTHD: Tensor, weight_HDK: Tensor | None) -> Tensor:
        if weight_HDK is None:
            return F.elu(x_BTHD) + 1
        # What einsum computes, in a third of its time for one token.
        y_HNK = torch.bmm(x_BTHD.flatten(0, 1).transpose(0, 1), weight_HDK)
        y_BTHK = y_HNK.transpose(0, 1).unflatten(0, x_BTHD.shape[:2])
        phi_BTHK = y_BTHK.softmax(dim=-1)
        if self.options.feature_map == "softmax_pair":
            phi_BTHK = torch.cat((phi_BTHK, (-y_BTHK).softmax(dim=-1)), dim=-1)
        return phi_BTHK.to(x_BTHD.dtype)  # autocast's softmax is float32

    def _output_gate(self, x_BTE: Tensor, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
        logit_H = self.output_bias
        if self.output_weight is None:
            return logit_H.sigmoid().to(q_BTHD.dtype).expand(q_BTHD.shape[:3])
        if self.options.output_gate == "x":
            return F.linear(x_BTE, self.output_weight, logit_H).sigmoid()
        q_HD, k_HD, v_HD = self.output_weight.chunk(3, dim=-1)
        products_BTHD = torch.addcmul(q_BTHD * q_HD, k_BTHD, k_HD).addcmul(v_BTHD, v_HD)
        logit_BTH = products_BTHD.sum(-1) + logit_H
        return logit_BTH.sigmoid().to(q_BTHD.dtype)

    @property
    def _window(self) -> dict[str, Any]:
        return {"window": self.options.window, "sinks": self.options.sinks}

    @property
    def _mlstm(self) -> dict[str, Any]:
        options = self.options
        # 1: a softmax is a scale of its own, and the plain normalizer takes any other out again.
        return {
            "scale": 1.0,
            "input_gate": options.input_gate,
            "normalizer": options.normalizer,
            "eps": options.eps,
        }


def _repeat(x_BTG: Tensor, times: int) -> Tensor:
    """Heads in their order, each so many times."""
    return x_BTG if times == 1 else x_BTG.repeat_interleave(times, dim=2)


def _turned_back(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """What x was before rotary position embedding of its first R dimensions."""
    R = cos_BTR.shape[-1]
    cos_BT1R, sin_BT1R = cos_BTR.unsqueeze(2), sin_BTR.unsqueeze(2)
    turned_BTHR, rest = x_BTHD[..., :R], x_BTHD[..., R:]
    first, second = turned_BTHR.chunk(2, dim=-1)
    back_BTHR = turned_BTHR * cos_BT1R + torch.cat((second, -first), dim=-1) * sin_BT1R
    # Embeddings for long contexts scale both.
    back_BTHR = back_BTHR / (cos_BT1R.square() + sin_BT1R.square())
    return torch.cat((back_BTHR.to(x_BTHD.dtype), rest), dim=-1)
