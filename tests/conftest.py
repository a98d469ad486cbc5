import pytest
import torch
from hypothesis import settings

# The same examples in every run: a red test is red for everyone.
settings.register_profile("reproducible", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
