"""The tests, in folders as the package has them."""

import os
from pathlib import Path

# Read when torch is loaded. Tests run in as many processes as there are cores.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parents[1]
