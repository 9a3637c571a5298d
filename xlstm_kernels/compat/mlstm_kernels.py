"""The public names of the package `mlstm_kernels` (its torch part), on `xk.mlstm`.

    import xlstm_kernels.compat.mlstm_kernels as mlstm_kernels  # was: import mlstm_kernels.torch

Arguments, layouts and returns are that package's: q, k (B, NH, S, K), v (B, NH, S, V), i, f
(B, NH, S), states c (B, NH, K, V), n (B, NH, K), m (B, NH, 1). What differs:

- Any S, K, V and chunk size. Tiling arguments (`chunk_size` and what goes with it) and
  `stable_fgate` are taken, by position too, and do nothing: the kernel chooses, and the result does
  not depend on them.
- Gradients are exact, through the normaliser and the last states too.
- Kernels named "parallel" take initial states and return last ones.
- Nothing is computed in `autocast_kernel_dtype`, and states stay float32 whatever `dtype_state`
  says (float64 for float64 inputs). h has q's dtype and is a view of a (B, S, NH, V) tensor.
- Sequence kernels have gradients; all kernels run on every device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.mlstm.api import mlstm
from ..ops.mlstm_step.api import mlstm_step
from .swap import Found, Swap, Swapped, fused_backend, no_kernel, swapped_class

State = tuple[Tensor, Tensor, Tensor]


def run_head_first(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: tuple[Tensor | None, Tensor | None, Tensor | None],
    **options: Any,
) -> tuple[Tensor, State]:
    """`xk.mlstm`, or for one token and no gradient `xk.mlstm_step`, in the package's layout."""
    c, n, m = state
    given: Any = None
    if (c is None) != (n is None) or (c is None and m is not None):
        got = ", ".join(
            f"{name}_initial" for name, x in zip("cnm", state, strict=True) if x is not None
        )
        raise ValueError(f"mlstm: c_initial and n_initial must be given together, got {got} alone")
    if c is not None and n is not None:
        m = c.new_zeros(c.shape[:2]) if m is None else m.reshape(c.shape[:2])
        given = c, n, m
    tensors = (q, k, v, i, f)
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *(given or ())))
    if q.shape[2] == 1 and given is not None and not trained:
        q, k, v, i, f = (t.squeeze(2) for t in tensors)
        h, last = mlstm_step(q, k, v, i, f, given, **options)
        return h.unsqueeze(2), (last.c, last.n, last.m.unsqueeze(-1))
    q, k, v, i, f = (t.transpose(1, 2) for t in tensors)
    h, last = mlstm(q, k, v, i, f, given, **options)
    return h.transpose(1, 2), (last.c, last.n, last.m.unsqueeze(-1))


def _sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    **ignored: Any,
) -> Any:
    """mLSTM with the exponential input gate: h, or (h, (c, n, m))."""
    h, last = run_head_first(q, k, v, i, f, (c_initial, n_initial, m_initial), eps=eps)
    return (h, last) if return_last_states else h


def _sigmoid_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    normalize: bool = True,
    **ignored: Any,
) -> Any:
    """mLSTM with the sigmoid input gate: h, or (h, (c, n)). `m_initial` is ignored."""
    h, (c, n, _) = run_head_first(
        *(q, k, v, i, f, (c_initial, n_initial, None)),
        input_gate="sigmoid",
        normalizer="max" if normalize else "none",
        eps=eps,
    )
    return (h, (c, n)) if return_last_states else h


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    eps: float = 1e-6,
    **ignored: Any,
) -> tuple[Tensor, State]:
    """One token: q, k (B, NH, K), v (B, NH, V), i, f and m (B, NH, 1); h and the next (c, n, m)."""
    BH = q.shape[:2]
    token = q, k, v, i.reshape(BH), f.reshape(BH)
    h, last = mlstm_step(*token, (c, n, m.reshape(BH)), eps=eps)
    return h, (last.c, last.n, last.m.unsqueeze(-1))


def _named(function: Callable[..., Any], name: str, *order: str) -> Callable[..., Any]:
    """`function` under the package's name and with its order of arguments: up to `eps` it is
    `function`'s own, then `order`. Those that `function` does not have do nothing."""
    own = inspect.signature(function).parameters
    names = (*(n for n in own if n not in ("normalize", "ignored")), *order)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names):
            raise TypeError(f"{name}: at most {len(names)} positional arguments, got {len(args)}")
        return function(**dict(zip(names, args, strict=False)), **kwargs)

    kernel.__name__ = kernel.__qualname__ = name
    kernel.__doc__ = function.__doc__
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    taken = [own.get(n, inspect.Parameter(n, either, default=None)) for n in names]
    signature = inspect.Signature([*taken, own["ignored"]])
    kernel.__signature__ = signature  # type: ignore[attr-defined]
    return kernel


CAST = "autocast_kernel_dtype"
TILES = (
    *("chunk_size", "chunk_size_inter", "chunk_size_intra", "siz_b_L_parallel", "siz_b_L_loop"),
    *("siz_b_DH_parallel", "siz_b_DH_loop", "num_warps_intra", "num_warps_inter"),
    *("num_stages_intra", "num_stages_inter", "recompute_states_in_bw", CAST),
)
SIGMOID = "stable_fgate", "normalize"

# The package's registries: registered name -> function.
KERNELS = {
    "chunkwise--native_autograd": _named(
        _sequence, "mlstm_chunkwise__native_autograd", "chunk_size"
    ),
    "chunkwise--native_custbw": _named(
        _sequence, "mlstm_chunkwise__native_custbw", "chunk_size", CAST
    ),
    "chunkwise--triton_limit_chunk": _named(
        _sequence, "mlstm_chunkwise__limit_chunk", "chunk_size", CAST
    ),
    "chunkwise--triton_xl_chunk": _named(_sequence, "mlstm_chunkwise__xl_chunk", *TILES),
    "chunkwise--triton_xl_chunk_siging": _named(
        _sigmoid_sequence, "mlstm_siging_chunkwise__xl_chunk", "normalize", *TILES
    ),
    "parallel--native_autograd": _named(_sequence, "mlstm_parallel__native_autograd"),
    "parallel--native_custbw": _named(_sequence, "mlstm_parallel__native_custbw", CAST),
    "parallel--native_stablef_autograd": _named(
        _sequence, "mlstm_parallel__native_stablef_autograd"
    ),
    "parallel--native_stablef_custbw": _named(
        _sequence, "mlstm_parallel__native_stablef_custbw", CAST
    ),
    "parallel--native_siging_autograd": _named(
        _sigmoid_sequence, "mlstm_siging_parallel__native_autograd", *SIGMOID
    ),
    "parallel--native_siging_custbw": _named(
        _sigmoid_sequence, "mlstm_siging_parallel__native_custbw", *SIGMOID, CAST
    ),
    "parallel--triton_limit_headdim": _named(_sequence, "mlstm_parallel__limit_headdim", CAST),
}
SEQUENCE_KERNELS = {
    "native_sequence__native": _named(
        _sequence, "mlstm_recurrent_sequence__native_fw", "dtype_state"
    ),
    "native_sequence__triton": _named(
        _sequence, "mlstm_recurrent_sequence__triton_step_fused_fw", "dtype_state"
    ),
}
STEP_KERNELS = {
    "native": _named(_step, "mlstm_recurrent_step__native", "dtype_state"),
    "triton": _named(_step, "mlstm_recurrent_step__triton", "dtype_state"),
}
globals().update(
    {
        kernel.__name__: kernel
        for registry in (KERNELS, SEQUENCE_KERNELS, STEP_KERNELS)
        for kernel in registry.values()
    }
)


def get_available_mlstm_kernels() -> list[str]:
    return list(KERNELS)


def get_mlstm_kernel(name: str) -> Callable[..., Any]:
    return _look_up("get_mlstm_kernel", KERNELS, name)


def get_available_mlstm_sequence_kernels() -> list[str]:
    return list(SEQUENCE_KERNELS)


def get_mlstm_sequence_kernel(name: str) -> Callable[..., Any]:
    return _look_up("get_mlstm_sequence_kernel", SEQUENCE_KERNELS, name)


def get_available_mlstm_step_kernels() -> list[str]:
    return list(STEP_KERNELS)


def get_mlstm_step_kernel(name: str) -> Callable[..., Any]:
    return _look_up("get_mlstm_step_kernel", STEP_KERNELS, name)


def _look_up(function: str, registry: dict[str, Any], name: str) -> Callable[..., Any]:
    if name not in registry:
        raise ValueError(f"{function}: name must be one of {', '.join(registry)}, got {name!r}")
    return registry[name]


@dataclass
class mLSTMBackendConfig:
    """The package's fields and defaults. The names of kernels choose the input gate, `mode` and
    `return_last_states` what is returned; the rest does nothing here but for `eps`."""

    chunkwise_kernel: str = "chunkwise--native_autograd"
    sequence_kernel: str = "native_sequence__native"
    step_kernel: str = "native"
    mode: str = "train"
    chunk_size: int = 64
    return_last_states: bool = True
    autocast_kernel_dtype: str = "bfloat16"
    eps: float = 1e-6
    inference_state_dtype: str = "float32"
    normalize_siging: bool = True

    def __post_init__(self) -> None:
        get_mlstm_kernel(self.chunkwise_kernel)
        get_mlstm_sequence_kernel(self.sequence_kernel)
        get_mlstm_step_kernel(self.step_kernel)
        if self.return_last_states and self.mode == "train_with_padding":
            raise ValueError(
                "mLSTMBackendConfig: return_last_states must be False with"
                " mode='train_with_padding', got True"
            )


def run_backend(
    config: Any, tensors: tuple[Tensor, ...], return_last_states: bool | None, mode: str | None
) -> Any:
    """What a backend module with `config` returns for q, k, v, i, f and the initial c, n, m."""
    q, k, v, i, f, c, n, m = tensors
    mode = config.mode if mode is None else mode
    training = "train" in mode
    if not training and "inference" not in mode:
        raise ValueError(
            f"mLSTMBackend: mode must be 'train', 'train_with_padding' or 'inference', got {mode!r}"
        )
    wanted = config.return_last_states if return_last_states is None else return_last_states
    if training and wanted and config.mode == "train_with_padding":
        raise ValueError(
            "mLSTMBackend: return_last_states must be False with mode='train_with_padding',"
            " got True"
        )
    options: dict[str, Any] = {"return_last_states": wanted or not training, "eps": config.eps}
    if "siging" in config.chunkwise_kernel:
        normalize = getattr(config, "normalize_siging", True)
        return _sigmoid_sequence(q, k, v, i, f, c, n, m, normalize=normalize, **options)
    return _sequence(q, k, v, i, f, c, n, m, **options)


class mLSTMBackend(nn.Module):
    """The package's module of the same name, for models that build one."""

    config_class = mLSTMBackendConfig

    def __init__(self, config: mLSTMBackendConfig):
        super().__init__()
        self.config = config

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        c_initial: Tensor | None = None,
        n_initial: Tensor | None = None,
        m_initial: Tensor | None = None,
        return_last_states: bool | None = None,
        mode: str | None = None,
    ) -> Any:
        tensors: Any = (q, k, v, i, f, c_initial, n_initial, m_initial)
        return run_backend(self.config, tensors, return_last_states, mode)

    def extra_repr(self) -> str:
        return f"{self.config}"


class FusedBackend(Swapped):
    """A swapped backend module of the package itself."""

    def forward(self, q: Tensor, *args: Any, **kwargs: Any) -> Any:
        forward: Any = mLSTMBackend.forward if q.is_cpu else self.replaced.forward
        return forward(self, q, *args, **kwargs)


KNOWN = ("mlstm_kernels.torch.backend_module.mLSTMBackend",)


def find(layer: nn.Module) -> Found:
    # It has no parameters that would tell the device.
    backend = fused_backend("mlstm", torch.empty(0))
    if backend is None:
        return no_kernel("mlstm", torch.empty(0))
    become = swapped_class(FusedBackend, type(layer))
    return Swap(become, backend, "every call on CPU tensors")
