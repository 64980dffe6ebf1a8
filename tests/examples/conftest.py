"""Examples and benchmarks are importable by name, as they are when run as scripts."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent
for folder in ("examples", "benchmarks"):
    sys.path.insert(0, str(ROOT / folder))
