"""The table of ``make mutate`` names what is there."""

import runpy
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MUTATION = runpy.run_path(str(REPOSITORY / "tests" / "mutation.py"))


@pytest.mark.parametrize("module", MUTATION["HELD"])
def test_a_mutated_module_and_the_tests_that_hold_it_exist(module):
    package, _, rest = module.partition("/")
    assert (REPOSITORY / MUTATION["PACKAGES"][package] / f"{rest}.py").is_file()
    for test in MUTATION["HELD"][module].tests:
        assert (REPOSITORY / "tests" / test).is_file()


def test_modules_are_chosen_by_the_end_of_a_path_or_by_a_folder():
    chosen = MUTATION["chosen"]
    assert chosen([]) == list(MUTATION["HELD"])
    assert chosen(["fusion/ranks.py"]) == ["rerankq_worker/fusion/ranks"]
    assert all("/fusion/" in name for name in chosen(["fusion"]))
    assert chosen(["rank"]) == []
