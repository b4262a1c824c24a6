"""Faults put into the pure modules by mutmut, one at a time: which of them does no test notice?

mutmut wants packages under ``src/`` and writes into the folder it runs in: ``.mutate/`` holds a copy of what it needs.
Functions and methods are mutated; tables and patterns of a module, and functions with a decorator, are not. A fault
that is caught by a timeout or a crash counts as noticed. How much is to be noticed in a module stands beside its tests.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
STAGE = REPOSITORY / ".mutate"

#: Where the packages lie.
PACKAGES = {"rerankq": "producer/rerankq", "rerankq_worker": "worker/rerankq_worker"}


class Held(NamedTuple):
    """The tests, besides its own doctests, that hold a module; and the share of faults that they notice, in percent.

    The share is what was measured, rounded down: a run that finds less fails. 0 where nobody measured yet.
    """

    tests: tuple[str, ...]
    floor: int = 0


#: The modules that decide without I/O. This is the one place that names them: what moves, moves here too.
HELD = {
    "rerankq_worker/fusion/analyser": Held(("worker/test_analyser.py",)),
    "rerankq_worker/fusion/blending": Held(("worker/test_fusion.py",), 97),
    "rerankq_worker/fusion/coverage": Held(("worker/test_fusion_coverage.py",)),
    "rerankq_worker/fusion/features": Held(("worker/test_fusion.py",), 91),
    "rerankq_worker/fusion/normalise": Held(("worker/test_fusion.py",), 87),
    "rerankq_worker/fusion/ragflow": Held(("worker/test_fusion_ragflow.py",)),
    "rerankq_worker/fusion/ranks": Held(("worker/test_fusion.py",), 93),
    "rerankq_worker/fusion/token_signal": Held(("worker/test_fusion_coverage.py",)),
    "rerankq_worker/engine/scheduling/batching": Held(("worker/test_batching.py",)),
    "rerankq_worker/doorbell": Held(("worker/test_doorbell.py",)),
    "rerankq/ledger/lease_policy": Held(("worker/test_sweeping.py", "worker/test_lease_policy.py")),
    "rerankq_worker/engine/scheduling/fair_queue": Held(("worker/test_fair_queue.py", "worker/test_waiting_pairs.py")),
    "rerankq_worker/engine/scheduling/batch_time": Held(("worker/test_batch_time.py",)),
    "rerankq_worker/engine/scheduling/waiting_pairs": Held(("worker/test_waiting_pairs.py",)),
    "rerankq/catalogue": Held(("producer/test_catalogue.py",)),
    "rerankq/contract": Held(("producer/test_contract.py",)),
    "rerankq/client/routing": Held(("producer/test_routing.py",)),
    "rerankq/urls": Held(("producer/test_urls.py",)),
    "rerankq/doctor/checks": Held(("producer/test_doctor.py",)),
    "rerankq/rescoring/metrics": Held(("producer/test_rescoring_metrics.py",)),
}

#: Left out: tests with fixtures of such names, which start servers, and tests of such names, which start processes
#: (these import the code as it is) or watch the clock.
SERVERS = ("redis", "doctor", "lost_job")
LEFT_OUT = ("in_every_process", "flood_of_one_thing", "loading_is_silent", "fusion_imports", "many_threads")

SETTINGS = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = {modules}
also_copy = ["conf", "conftest.py"]
pytest_add_cli_args_test_selection = {selection}
pytest_add_cli_args = {arguments}
"""

# mutmut makes a copy of a function for each fault, and with it of its doctest.
CONFTEST = '''
from hypothesis import Phase, settings

# The same examples for every fault and in every run; a fault is noticed by any of them, not by the smallest.
settings.register_profile(
    "mutate", derandomize=True, deadline=None, database=None, max_examples=60, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("mutate")


def pytest_collection_modifyitems(config, items):
    """Leave out the doctests of copies, and tests that ask for a server."""
    kept = [item for item in items if "__mutmut_" not in item.nodeid and not _needs_server(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _needs_server(item):
    return any(server in name for name in getattr(item, "fixturenames", ()) for server in SERVERS)
'''

# What mutmut notes of a fault: the exit status of its tests, or a number of its own.
NOT_NOTICED = {0: "survived", 5: "no test", 33: "no test", None: "not tried", 2: "not tried", 34: "not tried"}


def chosen(words: Iterable[str]) -> list[str]:
    """Give the modules whose paths end with one of the words, or lie in a folder of that name; all for no word.

    >>> chosen(["fusion/ranks", "doctor"])
    ['rerankq_worker/fusion/ranks', 'rerankq/doctor/checks']
    """
    words = [f"/{word.removesuffix('.py').strip('/')}/" for word in words]
    return [name for name in HELD if not words or any(word in f"/{name}/" for word in words)]


def stage(modules: Sequence[str]) -> None:
    """Lay out packages, tests and settings as mutmut wants them."""
    shutil.rmtree(STAGE, ignore_errors=True)
    leave = shutil.ignore_patterns("__pycache__")
    for package, folder in PACKAGES.items():
        shutil.copytree(REPOSITORY / folder, STAGE / "src" / package, ignore=leave)
    for folder in ("tests", "conf"):
        shutil.copytree(REPOSITORY / folder, STAGE / folder, ignore=leave)
    if (REPOSITORY.parent / "shared").is_dir():
        (STAGE / "shared").symlink_to(REPOSITORY.parent / "shared")
    (STAGE / "conftest.py").write_text(f"SERVERS = {SERVERS}\n{CONFTEST}", encoding="utf-8")
    files = [f"src/{name}.py" for name in modules]
    tests = sorted({f"tests/{test}" for name in modules for test in HELD[name].tests})
    arguments = ["-p", "no:cacheprovider", "-p", "no:xdist", "-k", f"not ({' or '.join(LEFT_OUT)})"]
    settings = SETTINGS.format(
        modules=json.dumps(files), selection=json.dumps(files + tests), arguments=json.dumps(arguments)
    )
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    (STAGE / "pyproject.toml").write_text(project + settings, encoding="utf-8")


def outcomes(module: str) -> dict[str, str]:
    """Read what became of each fault in a module, by its name: noticed, survived, no test, or not tried."""
    written = STAGE / "mutants" / "src" / f"{module}.py.meta"
    codes = json.loads(written.read_text(encoding="utf-8"))["exit_code_by_key"] if written.is_file() else {}
    return {name: NOT_NOTICED.get(code, "noticed") for name, code in codes.items()}


def main() -> int:
    """Run mutmut over the chosen modules; 1 if a share is below its floor, or a fault was not tried."""
    parser = argparse.ArgumentParser(description="Put faults into the pure modules, and name those no test notices.")
    parser.add_argument("modules", nargs="*", help="ends of paths or folders, such as fusion/ranks; none = all")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    given = parser.parse_args()
    modules = chosen(given.modules)
    if not modules:
        parser.error(f"no such module; there are {', '.join(HELD)}")
    stage(modules)
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(given.processes)]
    ran = subprocess.run(command, cwd=STAGE, check=False)
    found = {module: outcomes(module) for module in modules}
    for name, became in ((name, became) for faults in found.values() for name, became in faults.items()):
        if became != "noticed":
            print(f"{became:9} {name}")
    below = False
    for module, faults in found.items():
        noticed = list(faults.values()).count("noticed")
        share = 100 * noticed / len(faults) if faults else 100.0
        below |= share < HELD[module].floor
        print(f"{module}: {noticed} of {len(faults)} noticed, {share:.1f} % (at least {HELD[module].floor} %)")
    every = [became for faults in found.values() for became in faults.values()]
    share = 100 * every.count("noticed") / max(1, len(every))
    print(f"{every.count('noticed')} of {len(every)} noticed: {share:.1f} %")
    print(f"What a fault is: (cd {STAGE.name} && {sys.executable} -m mutmut show NAME)")
    if ran.returncode or "not tried" in every or not every:
        print(f"mutmut did not come to its end (exit status {ran.returncode})")
        return 1
    return int(below)


if __name__ == "__main__":
    sys.exit(main())
