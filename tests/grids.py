"Grids of cases too large to run whole each time"
import random

whole = False   # conftest.py sets it: pytest --all

def sample(grid, k, seed=0):
    "All cases of `grid` under `pytest --all`, otherwise `k` of them, the same for the same `seed`"
    cases = list(grid)
    if whole or k>=len(cases): return cases
    return [cases[i] for i in sorted(random.Random(seed).sample(range(len(cases)), k))]
