"""What a chaos run is made of: a schedule, actors, a proxy to cut, producers that keep journals, a judge.

The programs beside this package, ``chaos.py`` and ``soak.py``, put them together.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]

# Workers, reports and checks are those of the benchmarks, forked processes those of the tests.
for place in ("benchmarks", "tests"):
    if str(REPOSITORY / place) not in sys.path:
        sys.path.append(str(REPOSITORY / place))
