"""Products of methods, models and inputs, and examples of properties, of which a run takes a fixed share.

``@pytest.mark.share(3, each=("method", "name"))``: of the cases that have the same ``method`` and ``name``, every third
runs, at least one; which ones differs from group to group, so that each input meets many methods. ``--thorough`` runs
all of them. Which cases run follows from the names alone: the same in every run and process.

``@examples_of(60)``: of the 60 examples that hypothesis makes for every case of a property, half.
"""

import collections
import zlib

_thorough = False


def pytest_addoption(parser):
    parser.addoption(
        "--thorough", action="store_true", help="all cases of the products that a run otherwise takes a share of"
    )


def pytest_configure(config):
    global _thorough
    _thorough = config.getoption("--thorough")


def examples_of(count):
    """Settings of a property that is tested for every method, with as many examples for each."""
    from hypothesis import HealthCheck, settings  # machines that run some tests only lack it

    return settings(
        max_examples=count if _thorough else count // 2, deadline=None, suppress_health_check=list(HealthCheck)
    )


def left_out(items):
    """The items that are not in the share of their group."""
    groups = collections.defaultdict(list)
    for item in items:
        marker = item.get_closest_marker("share")
        callspec = getattr(item, "callspec", None)
        if marker is None or callspec is None:
            continue
        key = tuple(str(callspec.params.get(name)) for name in marker.kwargs["each"])
        groups[str(item.path), item.function.__name__, key].append((item, marker.args[0]))
    gone = set()
    for (_, function, key), cases in groups.items():
        every = cases[0][1]
        first = zlib.crc32(repr((function, key)).encode()) % min(every, len(cases))
        gone |= {item for number, (item, _) in enumerate(cases) if number % every != first}
    return gone
