"""The code on the page of each library, as it stands there."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("torch", "xlstm", "transformers", "mlstm_kernels", "flashrnn")


@pytest.mark.medium
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page):
    """All of it, one block after the other, in the names of those before."""
    pytest.importorskip(page, reason=f"{page} is not installed: make test-compat")
    torch.manual_seed(0)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.M | re.S)
    assert blocks
    names = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, f"docs/{page}.md", "exec"), names)
    if "model" in names:
        assert any(type(m).__name__.startswith("Fused") for m in names["model"].modules())
