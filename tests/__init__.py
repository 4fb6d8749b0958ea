"""The tests; their folders mirror those of the package."""

import os
from pathlib import Path

# torch reads it when it is loaded. One thread each, since tests run in one process for each core.
os.environ["OMP_NUM_THREADS"] = "1"
# Workers with several threads would spin at every barrier, on cores that other tests need.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

ROOT = Path(__file__).parents[1]
