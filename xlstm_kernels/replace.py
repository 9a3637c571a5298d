"""`xk.replace_layers`: the slow layers of a model on our kernels, and back."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from .compat import handwritten
from .compat.swap import (
    SUBCLASS,
    Found,
    NotDerivable,
    Swap,
    Swapped,
    class_among,
    restore_class,
    swap_class,
)

# Package that a layer's class, or a base of it, comes from -> module of compat that knows it.
LIBRARIES = {
    "torch": "torch_nn",
    "transformers": "transformers",
    "mlstm_kernels": "mlstm_kernels",
    "xlstm": "xlstm",
    "tirex": "tirex",
}

Which = str | type[nn.Module] | Iterable[str | type[nn.Module]]


@dataclass(frozen=True)
class Row:
    """A layer that was looked at: its path in the model, its class, the class that it became (""
    where it was left), and the backend with the calls that it runs, or why the layer was left."""

    path: str
    layer: str
    became: str
    backend: str
    note: str


@dataclass(frozen=True)
class Report:
    """What `replace_layers` did. It prints as a table; `replaced` and `left` are its rows."""

    rows: list[Row] = field(default_factory=list)

    @property
    def replaced(self) -> list[Row]:
        return [row for row in self.rows if row.became]

    @property
    def left(self) -> list[Row]:
        return [row for row in self.rows if not row.became]

    def __str__(self) -> str:
        if not self.rows:
            return "no layer that we know"
        head = ("layer", "class", "became", "backend", "which calls, or why it was left")
        lines = [head]
        for row in self.rows:
            lines.append(
                (row.path or "(model)", row.layer, row.became or "-", row.backend or "-", row.note)
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def replace_layers(
    model: nn.Module,
    *,
    only: Which | None = None,
    exclude: Which | None = None,
    dry_run: bool = False,
) -> Report:
    """Runs the layers of `model` that we know on our kernels, in place, where that is faster.

    A replaced layer stays the same object with the same parameters, buffers, hooks, mode and state
    dict; its class becomes a subclass of its own. So optimizers, tied weights, references and
    checkpoints stay good, and `restore_layers` undoes it. Calls that are measured to be slower, or
    of a form that we do not know, still run the layer's own code.

    Replaced layers have no second derivative: a gradient penalty raises NotImplementedError.

    Replace before torch.compile, DDP or FSDP wrap the model. torch.compile breaks the graph at an
    nn.LSTM, replaced or not, unless `torch._dynamo.config.allow_rnn` is set.

    Args:
        model: looked at with everything below it.
        only: which layers to look at: patterns of paths ("encoder.*") and classes, one or several.
        exclude: which to leave, in the same form; at whichever of its paths a pattern fits.
        dry_run: report and change nothing.

    Returns:
        A `Report`, which prints as a table: what each layer became and on which backend, or why it
        was left.

    Raises:
        TypeError, ValueError: an argument does not fit, or a pattern fits no layer of the model.

    Example:
        >>> import torch, xlstm_kernels as xk
        >>> model = torch.nn.Sequential(torch.nn.LSTM(8, 16), torch.nn.Identity())
        >>> report = xk.replace_layers(model)
        >>> [(row.path, row.became) for row in report.replaced]
        [('0', 'FusedLSTM')]
        >>> xk.restore_layers(model)
        ['0']
    """
    _check_is_module("replace_layers", model)
    if not isinstance(dry_run, bool):
        raise TypeError(f"replace_layers: dry_run must be a bool, got {type(dry_run).__name__}")
    wanted = _Which.of("only", model, only)
    unwanted = _Which.of("exclude", model, exclude)
    report = Report()
    seen: dict[nn.Module, str] = {}
    places = list(model.named_modules(remove_duplicate=False))
    # By the layer, which may stand at several paths.
    excluded = {layer for path, layer in places if unwanted.has(path, layer)}
    for path, layer in places:
        if (only is not None and not wanted.has(path, layer)) or layer in excluded:
            continue
        name = type(layer).__name__
        if layer in seen:
            report.rows.extend(_again(path, seen[layer], report))
            continue
        found = _look_at(layer)
        if found is None:
            continue
        seen[layer] = path
        if isinstance(found, Swap) and not dry_run:
            found = swap_class(layer, found) or found
        if isinstance(found, str):
            report.rows.append(Row(path, name, "", "", found))
        else:
            report.rows.append(Row(path, name, found.become.__name__, found.backend, found.which))
    return report


def restore_layers(model: nn.Module) -> list[str]:
    """Gives every layer that `replace_layers` changed its own class back; returns their paths."""
    _check_is_module("restore_layers", model)
    restored = []
    for path, layer in model.named_modules():
        if not isinstance(layer, Swapped):
            continue
        if "replaced" not in vars(type(layer)):
            raise ValueError(
                f"restore_layers: {path or 'model'} must have the class that replace_layers gave"
                f" it, got {type(layer).__name__}; undo first what changed it since"
            )
        restore_class(layer)
        restored.append(path)
    return restored


def _look_at(layer: nn.Module) -> Found:
    if isinstance(layer, Swapped):
        return "replaced before"
    bases = (base.__module__.partition(".")[0] for base in type(layer).__mro__)
    found: Found = None
    try:
        for package in dict.fromkeys(bases):
            if found is None and package in LIBRARIES:
                compat = importlib.import_module(f"xlstm_kernels.compat.{LIBRARIES[package]}")
                known = class_among(layer, compat.KNOWN)
                if known is not None:
                    found = compat.find(layer) if known is type(layer) else SUBCLASS
        # torch's own containers and wrappers are no one's hand-written layers.
        if found is None and type(layer).__module__.partition(".")[0] != "torch":
            found = handwritten.find(layer)
    except NotDerivable as why:
        return str(why)
    if isinstance(found, Swap):
        devices = {t.device.type for t in (*layer.parameters(), *layer.buffers())}
        if "meta" in devices:
            return "some of its parameters are on the meta device"
        if len(devices) > 1:
            return f"its parameters are on several devices: {', '.join(sorted(devices))}"
        if "forward" in vars(layer):
            return "its forward was set on the object and stands before that of any class"
    return found


def _again(path: str, first: str, report: Report) -> Iterator[Row]:
    """The row of a layer that stands at `path` too, the one already looked at."""
    for row in report.rows:
        if row.path == first:
            yield Row(path, row.layer, row.became, row.backend, f"the same layer as {first}")
            return


@dataclass(frozen=True)
class _Which:
    patterns: tuple[str, ...]
    classes: tuple[type[nn.Module], ...]

    @classmethod
    def of(cls, argument: str, model: nn.Module, given: Which | None) -> _Which:
        if given is None:
            return cls((), ())
        items = (given,) if isinstance(given, (str, type)) else tuple(given)
        patterns = tuple(item for item in items if isinstance(item, str))
        classes = tuple(
            item for item in items if isinstance(item, type) and issubclass(item, nn.Module)
        )
        if len(patterns) + len(classes) < len(items):
            raise TypeError(
                f"replace_layers: {argument} must be patterns of paths and classes of layers, got"
                f" {given!r}"
            )
        paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
        for pattern in patterns:
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise ValueError(
                    f"replace_layers: {argument} must fit a layer of the model, got {pattern!r}"
                )
        return cls(patterns, classes)

    def has(self, path: str, layer: nn.Module) -> bool:
        return isinstance(layer, self.classes) or any(
            fnmatchcase(path, pattern) for pattern in self.patterns
        )


def _check_is_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
