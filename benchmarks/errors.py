"""Errors of every result of every variant of a case, right or wrong, with no limit."""

from __future__ import annotations

from rich.table import Table

from xlstm_kernels.testing import relative_error

from .gate import Oracle, first_line
from .problem import Case, Trial, tracked


def of_variants(case: Case) -> dict[str, dict[str, float] | str]:
    """By variant: relative error (2-norm) against the float64 reference by result, or why none."""
    inputs = case.prepare()
    exact = Oracle.of(case, inputs).exact
    tensors = tracked(case, inputs)
    found: dict[str, dict[str, float] | str] = {}
    for variant in case.variants:
        if variant.compiles:  # the same arithmetic as the eager one
            continue
        try:
            results = Trial(case, variant, tensors).results()
        except Exception as error:
            found[variant.name] = first_line(error)
        else:
            found[variant.name] = {n: relative_error(results[n], exact[n]) for n in exact}
    return found


def terminal_table(case: Case) -> Table:
    found = of_variants(case)
    names = list(next((e for e in found.values() if isinstance(e, dict)), {}))
    table = Table("relative error", *names, title=case.id, title_justify="left", expand=False)
    reasons = []
    for variant, errors in found.items():
        if isinstance(errors, dict):
            table.add_row(variant, *(f"{errors[n]:.1e}" for n in names))
        else:
            reasons.append(f"{variant}: {errors}")
    table.caption, table.caption_justify = "\n".join(reasons), "left"
    return table
