"""What can be chosen of a hybrid student: what the paper says, and what it leaves open."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from distill.errors import DistillError

CHOICES = {
    "feature_map": ("softmax", "softmax_pair", "elu"),
    "feature_init": ("identity", "uniform"),
    "gate_init": ("spread", "constant"),
    "input_gate": ("exp", "sigmoid"),
    "output_gate": ("qkv", "x", "bias"),
    "normalizer": ("plain", "max", "none"),
    "grouped_heads": ("repeat", "share"),
    "rotary": ("both", "window"),
}


@dataclass(frozen=True)
class HybridOptions:
    """What the paper says of the mixer, and a choice for each thing that it leaves open.

    window, sinks: a token sees the last `window` tokens, itself among them, and the first `sinks`.
        The paper trains with 512 and names 256 for inference; its sinks are 4.
    feature_map: phi, of each head for itself. "softmax": softmax(W x), the paper's; "softmax_pair":
        softmax of W x and of -W x side by side, as LoLCATs has it, with twice the state; "elu":
        elu(x) + 1, nothing learned.
    feature_init: W. "identity", or "uniform": that of `nn.Linear`. The paper does not say.
    feature_dim: of phi, before "softmax_pair" doubles it; None is that of a head. The state grows
        with it. The paper does not say.
    rotary: what gets queries and keys with rotary position embedding. "both": mLSTM and window, by
        the order of the paper's text; "window": it alone. mLSTM and output gate get them as they
        were, and W and the output gate's weights could be merged with the projections, as the paper
        says of the latter.
    normalizer: of `xk.mlstm`; the paper's is "plain".
    input_gate: "exp", the paper's, or "sigmoid".
    gate_init: both gates' weights on x are 0, and so are the input gate's biases. Those of the
        forget gate: "spread": from `forget_bias` up to 3 more, evenly over the heads; "constant":
        `forget_bias`. The paper does not say; `stages.calibrate_gates` asks the teacher.
    forget_bias: 3 keeps half of a token for 14 tokens, 6 for 280.
    output_gate: what o is computed from: "qkv", the paper's; "x", the layer's input; "bias":
        nothing, a learned constant a head.
    output_bias: the first o is its sigmoid. The paper does not say; LoLCATs' is log(0.1 / 0.9).
    grouped_heads: of the mLSTM, where query heads share keys and values. "repeat": each repeats
        them, and has W of k, gates i and f and a state of its own, as the paper's 32 heads with 8
        of keys suggest; "share": they share these too and read one state, H / G times less to keep
        and to update. Training costs the same.
    layers: indices of the layers that are replaced, negative ones from the end; None is all.
    eps: added to the normalizer.
    backend: of the operations.
    """

    window: int = 512
    sinks: int = 4
    feature_map: str = "softmax"
    feature_init: str = "identity"
    feature_dim: int | None = None
    rotary: str = "both"
    normalizer: str = "plain"
    input_gate: str = "exp"
    gate_init: str = "spread"
    forget_bias: float = 3.0
    output_gate: str = "qkv"
    output_bias: float = math.log(0.1 / 0.9)
    grouped_heads: str = "repeat"
    layers: tuple[int, ...] | None = None
    eps: float = 1e-6
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if (got := getattr(self, name)) not in allowed:
                raise DistillError(
                    f"hybridize: {name} must be one of {', '.join(allowed)}, got {got!r}"
                )
        if self.feature_map == "elu" and self.feature_dim is not None:
            raise DistillError(
                "hybridize: feature_dim must be None with feature_map 'elu', which has no W, got"
                f" {self.feature_dim!r}"
            )
        for name, least in (("window", 1), ("sinks", 0), ("feature_dim", 1)):
            got = getattr(self, name)
            if name == "feature_dim" and got is None:
                continue
            if not isinstance(got, int) or isinstance(got, bool) or got < least:
                raise DistillError(
                    f"hybridize: {name} must be a whole number of at least {least}, got {got!r}"
                )

    @classmethod
    def from_dict(cls, values: Any) -> "HybridOptions":
        """The inverse of `as_dict`; unknown names are refused."""
        if not isinstance(values, dict):
            raise DistillError(f"hybridize: options must be a dict, got {values!r}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise DistillError(
                f"hybridize: options must be among {', '.join(sorted(known))},"
                f" got {', '.join(unknown)}"
            )
        layers = values.get("layers")
        if layers is not None:
            if not isinstance(layers, list | tuple | range):
                raise DistillError(f"hybridize: layers must be None or a list, got {layers!r}")
            layers = tuple(layers)
        return cls(**values | {"layers": layers})

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no tuples."""
        return asdict(self) | {"layers": None if self.layers is None else list(self.layers)}

    def features(self, head_dim: int) -> int:
        """Numbers of phi, of a head."""
        return (self.feature_dim or head_dim) * (2 if self.feature_map == "softmax_pair" else 1)

    def states(self, heads: int, kv_heads: int) -> int:
        """Of the mLSTM, in a layer with so many heads of queries, and of keys and values."""
        return kv_heads if self.grouped_heads == "share" else heads

    def replaced(self, count: int) -> list[int]:
        """Indices of the replaced layers of a model of `count`, rising."""
        wanted = range(count) if self.layers is None else self.layers
        if not wanted:
            raise DistillError("hybridize: layers must be None or name a layer, got none")
        for index in wanted:
            if not isinstance(index, int) or not -count <= index < count:
                raise DistillError(
                    f"hybridize: layers must be indices of {count} layers, got {index!r}"
                )
        return sorted({index % count for index in wanted})
