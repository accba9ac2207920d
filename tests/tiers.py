"""Tiers of tests: the fast ones, which run by default, the thorough ones, and a few that every set of versions must pass.

A test marked ``thorough`` runs only where all are asked for (``-m ""``).  Of a test marked ``sample(n)`` the fast tier takes
n of its parameter sets, drawn with a seed that the header shows and ``--sample-seed`` repeats; of those marked ``smoke``,
where they are asked for (``-m "smoke and not thorough"``), one.  A test that is not marked ``thorough`` fails if it takes
more seconds of the processor than the budget, ``--test-budget`` or FQJAX_TEST_BUDGET; 0 means no budget.
"""

import os
import random
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator

import pytest

BUDGET_SECONDS = 30.0
"""Several times what a fast test should take, so that a slow or busy machine does not fail it."""

SHOWN = 5
"""How many of the tests that took the most are shown."""

PROPERTY = "processor_seconds"

FAST = "not thorough"
"""The expression of markers that selects the fast tier, which pyproject.toml sets."""

SECONDS = pytest.StashKey[float]()
SHARED = pytest.StashKey[float]()
SEED = pytest.StashKey[int]()


def thorough_but(chosen: Container[str], names: Iterable[str]) -> list:
    """Names as values of a parameter, of which those that are not chosen belong to thorough tests."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.thorough) for name in names]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tiers of tests")
    group.addoption("--sample-seed", type=int, help="seed of the parameter sets that stand for all in the fast tier")
    budget = float(os.environ.get("FQJAX_TEST_BUDGET", BUDGET_SECONDS))
    group.addoption(
        "--test-budget", type=float, default=budget, help="seconds of the processor that a test may take; 0: any"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "thorough: takes long; runs where all tests are asked for (make thorough)")
    config.addinivalue_line("markers", "sample(n): the fast tier takes n of the parameter sets (make test)")
    config.addinivalue_line(
        "markers", "smoke: one of the few that run with every supported set of versions (make smoke)"
    )
    if config.getoption("markexpr") == FAST and any("::" in argument for argument in config.args):
        config.option.markexpr = ""  # A test that is named runs, whatever its tier.
    # Worker processes of pytest-xdist must draw what the process that hands out the tests draws.
    given = getattr(config, "workerinput", {}).get("sample_seed", config.getoption("sample_seed"))
    config.stash[SEED] = random.SystemRandom().randrange(10_000) if given is None else given


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """Hands the seed to a worker process of pytest-xdist."""
    node.workerinput["sample_seed"] = node.config.stash[SEED]


def pytest_report_header(config: pytest.Config) -> str:
    if not samples(config):
        return "tiers: all tests that are asked for, with all parameter sets"
    return f"tiers: fast, parameter sets drawn with --sample-seed={config.stash[SEED]}"


def samples(config: pytest.Config) -> bool:
    """Whether parameter sets are drawn: not where thorough tests are asked for too, or tests are named one by one."""
    return FAST in config.getoption("markexpr")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the parameter sets that are not drawn."""
    if not samples(config):
        return
    sets, smoke = defaultdict(list), "smoke" in config.getoption("markexpr")
    for item in items:
        sets[item.nodeid.partition("[")[0], bool(item.get_closest_marker("gpu"))].append(item)
    left_out = set()
    for name, of_one_test in sets.items():
        marker = of_one_test[0].get_closest_marker("sample")
        count = 1 if smoke else marker.args[0] if marker else len(of_one_test)
        left_out |= set(of_one_test) - set(draw(of_one_test, count, random.Random(f"{config.stash[SEED]} {name[0]}")))
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def draw(items: list[pytest.Item], count: int, rng: random.Random) -> list[pytest.Item]:
    """Draws ``count`` items, each the one whose parameters have the most values that none before it has."""
    left, drawn, seen = rng.sample(items, len(items)), [], set()
    while left and len(drawn) < count:
        best = max(left, key=lambda item: len(values_of(item) - seen))
        left.remove(best)
        drawn.append(best)
        seen |= values_of(best)
    return drawn


def values_of(item: pytest.Item) -> set[tuple[str, int]]:
    """The parameters of an item, each with the identity of its value, which the items of a test share."""
    return {(name, id(value)) for name, value in item.callspec.params.items()} if hasattr(item, "callspec") else set()


def processor_seconds() -> float:
    """What this process and those that it waited for have taken, in all threads."""
    taken = os.times()
    return taken.user + taken.system + taken.children_user + taken.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    item.stash[SECONDS] = -processor_seconds()
    item.config.stash[SHARED] = 0.0
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> Iterator[None]:
    """Counts apart what fixtures take that several tests use."""
    if fixturedef.scope == "function":
        return (yield)
    began = processor_seconds()
    try:
        return (yield)
    finally:
        request.config.stash[SHARED] += processor_seconds() - began


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Fails an unmarked test that has passed if it, or the shared fixtures that it was the first to use, took too much."""
    report = yield
    if call.when != "call":
        return report
    taken, shared = item.stash[SECONDS] + processor_seconds(), item.config.stash[SHARED]
    report.user_properties.append((PROPERTY, taken))
    budget = item.config.getoption("test_budget")
    marked = item.get_closest_marker("thorough") or item.get_closest_marker("gpu")
    if report.passed and budget and not marked and max(taken - shared, shared) > budget:
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} took {taken - shared:.1f} s of the processor, and the fixtures that it was the first to use "
            f"{shared:.1f} s; the budget of each is {budget:g} s: make it shorter, or mark it 'thorough' and keep a fast "
            "test of the same thing (docs/testing.md)"
        )
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    """Shows what all tests took, and those that took the most."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind) if r.when == "call"]
    taken = sorted(
        ((dict(report.user_properties).get(PROPERTY, 0.0), report.nodeid) for report in reports), reverse=True
    )
    if taken:
        terminalreporter.section(f"{sum(seconds for seconds, _ in taken):.0f} s of the processor, the most of them in")
        for seconds, name in taken[:SHOWN]:
            terminalreporter.write_line(f"{seconds:6.1f} s  {name}")
