"reformer_pytorch 1.4.4, the library that this package succeeds, for the tests that run both"
import contextlib
from importlib import metadata
import torch

def missing():
    "Why it cannot be compared with, or None"
    try: found = metadata.version('reformer-pytorch')
    except metadata.PackageNotFoundError: found = None
    if found!='1.4.4':
        return f"these tests compare with reformer-pytorch 1.4.4, but found {found}; `make test` installs it, as does pip install -e '.[bench]'"

@contextlib.contextmanager
def float32_draws():
    "torch.randn draws float32 numbers for float64 tensors too, so that both libraries hash with the same rotations"
    randn = torch.randn
    def draw(*size, dtype=None, **options):
        return randn(*size, dtype=torch.float32 if dtype==torch.float64 else dtype, **options).to(dtype or torch.float32)
    torch.randn = draw
    try: yield
    finally: torch.randn = randn
