"""Models to compare, each read from its folder when its turn comes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distill.data.capture import load_config, load_model, load_tokenizer
from distill.errors import DistillError
from distill.evaluation.assessment import Plan
from distill.evaluation.bench import require_contexts
from distill.evaluation.probes import require_needles
from distill.evaluation.scores import require_positions


class Models(Mapping[str, Any]):
    """Models by name. The first, the teacher, stays once it is read; of all others the one that was
    asked for last.

    Args:
        folders: what `save_pretrained` wrote, tokenizers too, all the same.
        device: where models go.

    Raises:
        DistillError: a folder holds no model or no tokenizer, or tokenizers differ.
    """

    def __init__(self, folders: Mapping[str, Path], device: Any = "cpu"):
        self.folders, self.device = dict(folders), device
        self.held: dict[str, Any] = {}
        self.configs = {name: load_config(folder) for name, folder in folders.items()}
        tokenizers = {name: load_tokenizer(folder) for name, folder in folders.items()}
        self.tokenizer = next(iter(tokenizers.values()))
        for name, tokenizer in tokenizers.items():
            if tokenizer.get_vocab() != self.tokenizer.get_vocab():
                raise DistillError(
                    f"{name}: {self.folders[name]} must have the tokenizer of the teacher"
                )

    def __getitem__(self, name: str) -> Any:
        if name not in self.held:
            first = next(iter(self.folders))
            self.held = {at: model for at, model in self.held.items() if at == first}
            self.held[name] = load_model(self.folders[name]).to(self.device)
        return self.held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.folders)

    def __len__(self) -> int:
        return len(self.folders)

    def require(self, plan: Plan) -> None:
        """Raises DistillError for lengths that no text or model has, before any model is read."""
        require_needles(self.tokenizer, plan.needle_lengths)
        for config in self.configs.values():
            require_positions("evaluate", config, plan.length)
            require_positions("needle", config, max(plan.needle_lengths, default=0))
            require_contexts(config, plan.contexts)
