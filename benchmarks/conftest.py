"""`pytest benchmarks --benchmark-only [--quick]`."""

import pytest

from .cases import cases


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny shapes, no torch.compile")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        pairs = [
            pytest.param(case, variant, id=f"{case.id}-{variant.name}")
            for case in cases(metafunc.config.getoption("--quick"))
            for variant in case.variants
        ]
        metafunc.parametrize("case, variant", pairs)
