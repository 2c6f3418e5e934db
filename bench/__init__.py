"""How fast the numerics and whole points are, beside matrix products and a plain version: `make bench`."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in `sweeps.run`: must be there before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
