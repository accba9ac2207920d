"""The tiers of tests: what runs by default, what is drawn, and that an unmarked test which takes long fails."""

import pytest

TESTS = """
import time
import pytest

def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def test_short():
    pass

def test_long():
    work(0.3)

@pytest.fixture(scope="module")
def made():
    work(0.3)

def test_that_makes_what_others_use(made):
    pass

@pytest.fixture(scope="module")
def soon_made():
    work(0.12)

def test_that_takes_as_long_as_its_fixture(soon_made):
    work(0.12)

@pytest.mark.thorough
def test_thorough():
    work(0.3)

@pytest.mark.smoke
@pytest.mark.sample(4)
@pytest.mark.parametrize("a", "rst")
@pytest.mark.parametrize("b", range(4))
def test_drawn(a, b):
    pass
"""


@pytest.fixture
def run(pytester):
    plugins = "-p tests.tiers -p no:cacheprovider -p no:unraisableexception -p no:hypothesispytest"
    pytester.makeini(f"[pytest]\naddopts = {plugins} --strict-markers -m 'not thorough'\n")
    pytester.makepyfile(test_some=TESTS)
    return pytester.runpytest_inprocess


def passed(result) -> set[str]:
    """The names of the tests that passed, as ``-rp`` lists them."""
    return {line.rpartition("::")[2] for line in result.outlines if line.startswith("PASSED")}


def test_an_unmarked_test_beyond_its_budget_fails(run):
    result = run("-n0", "--test-budget=0.2")
    assert result.parseoutcomes() == {"passed": 6, "failed": 2, "deselected": 9}
    result.stdout.fnmatch_lines(["*::test_long took 0.* s of the processor*the budget of each is 0.2 s*'thorough'*"])
    run("-n0", "--test-budget=0").assert_outcomes(passed=8, deselected=9)
    run("-n0", "-m", "thorough", "--test-budget=0.2").assert_outcomes(passed=1, deselected=16)


def test_the_budget_is_taken_from_the_environment(run, monkeypatch):
    monkeypatch.setenv("FQJAX_TEST_BUDGET", "0.2")
    run("-n0", "-k", "test_long").assert_outcomes(failed=1, deselected=16)


def test_drawn_parameter_sets_have_every_value_and_are_drawn_again_with_their_seed(run):
    drawn = []
    for seed in range(3):
        first, again = (passed(run("-n0", "-rp", "-k", "drawn", f"--sample-seed={seed}")) for _ in range(2))
        drawn.append(first)
        assert first == again and len(first) == 4
        assert {name[11:-1].split("-")[1] for name in first} == set("rst")
        assert {name[11:-1].split("-")[0] for name in first} == set("0123")
    assert len(set(map(frozenset, drawn))) > 1


def test_the_seed_that_was_drawn_is_shown_and_repeats(run):
    result = run("-n0", "-rp")
    (line,) = (line for line in result.outlines if line.startswith("tiers: fast"))
    assert passed(run("-n0", "-rp", line.split()[-1])) == passed(result)


def test_worker_processes_draw_the_same(run):
    result = run("-n2", "-rp", "--sample-seed=3")
    assert passed(result) == passed(run("-n0", "-rp", "--sample-seed=3"))


def test_everything_runs_where_it_is_asked_for(run):
    assert run("-n0", "-m", "").parseoutcomes() == {"passed": 17}


def test_a_test_that_is_named_runs(run):
    run("-n0", "test_some.py::test_thorough").assert_outcomes(passed=1)
    run("-n0", "test_some.py::test_drawn").assert_outcomes(passed=12)


def test_of_smoke_tests_one_parameter_set_runs(run):
    run("-n0", "-m", "smoke and not thorough").assert_outcomes(passed=1, deselected=16)
