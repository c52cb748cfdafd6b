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
def exact():
    "For float64 tensors too, torch.randn draws float32 numbers: the same rotations on both sides; and the peer takes logs of counts in float64"
    randn,log = torch.randn,torch.log
    def draw(*size, dtype=None, **options):
        return randn(*size, dtype=torch.float32 if dtype==torch.float64 else dtype, **options).to(dtype or torch.float32)
    def log_of_counts(x):   # the peer's are 1e-9 too large, in float32
        return log(torch.where(x<.5, x.double(), x.double().round())) if x.dtype==torch.float32 else log(x)
    torch.randn,torch.log = draw,log_of_counts
    try: yield
    finally: torch.randn,torch.log = randn,log
