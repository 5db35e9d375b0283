"""The benchmark scripts import each other as files of one folder do."""

import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent.parent / "scripts" / "bench"
sys.path.insert(0, str(BENCH))
