from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU, and a GPU that is left empty."""
    yield torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")
    if request.param == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """A GPU, for tests that have no meaning without one; these are marked ``cuda`` and skipped themselves."""
    yield torch.device("cuda", 0)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
