"""What must not lose anything and must say clearly what went wrong: `python tests/reliability` from a clone."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))  # the tests' own modules, as under pytest
