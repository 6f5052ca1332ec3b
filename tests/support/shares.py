"""Products of methods, models and inputs, of which a run takes a fixed share.

``@pytest.mark.share(3, each=("method", "name"))``: of the cases that have the same ``method`` and ``name``, every third
runs, at least one; which ones differs from group to group, so that each input meets many methods. ``--thorough`` runs
all of them. Which cases run follows from the names alone: the same in every run and process.
"""

import collections
import zlib


def pytest_addoption(parser):
    parser.addoption(
        "--thorough", action="store_true", help="all cases of the products that a run otherwise takes a share of"
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
