"""How much is tested."""

import os

# Set by `make test-full`: all combinations instead of pairs, and what takes minutes.
FULL = bool(os.environ.get("DFFORMER_TEST_FULL"))
