"""torch.library glue, once: an operator is a schema, a fake and an `Op` with its backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .backends import Op

_LIBRARY = torch.library.Library("xlstm_kernels", "DEF")


def define(
    op: Op,
    schema: str,
    fake: Callable[..., Any],
    verb: str | None = None,
    read: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[..., Any]:
    """Defines ``xlstm_kernels::<op>_<verb>`` and returns its overload.

    `schema` is ``<op>_<verb>(..., str backend) -> ...``: the last argument picks the module, whose
    function `<verb>`, or that named `verb`, takes the others, or what `read` makes of them all.
    `fake` takes all of them and returns empty outputs.
    """
    name = schema.partition("(")[0]
    verb = verb or name.removeprefix(f"{op.name}_")

    # Keyed by plain strings: an Enum's hash is a Python call, and this runs once a step.
    modules = {backend.value: module for backend, module in op.table.items()}

    def run(*args: Any) -> Any:
        if read is not None:
            args = read(*args)
        return getattr(modules[args[-1]], verb)(*args[:-1])

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"xlstm_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.xlstm_kernels, name).default
