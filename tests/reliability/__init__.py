"""What may go wrong, tried: `python -m tests.reliability` from the clone; see docs/guides/reliability.md."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' modules import each other by their bare names
