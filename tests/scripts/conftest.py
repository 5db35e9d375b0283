"""The benchmark scripts import each other as files of one folder do, and those in `scripts/lib` as modules below the checkout."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BENCH = ROOT / "scripts" / "bench"
sys.path.insert(0, str(BENCH))
sys.path.append(str(ROOT))
