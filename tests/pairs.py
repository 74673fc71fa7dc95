"""Which variants of the parametrised tests run by default: few, with every pair of values of two axes among them.

The axes of a file are its parameters (backend, base, dtype, ...) and its test functions. So each test runs with each
value of each of its parameters, and any two of the registry's values meet in some test of the file; the full product is
`make test-all`. Only in files marked as `face`, about the class rather than its backends, Triton's interpreter does not
run every test: there it meets every value of every parameter.
"""

import collections
import heapq
import itertools
import random
import zlib

import torch

SLOW = 8  # what a variant under Triton's interpreter costs, in variants on another backend
# Values of these types mean the same in every test of a file; functions, say, or dicts are one test's.
SHARED = (str, int, float, bool, type, torch.dtype, type(None))


def choose(items, scope):
    """The items to run, as a set; each device has a selection of its own.

    Args:
        items: tests.
        scope: :func:`of_file` or :func:`of_function`: within what every pair is to occur.
    """

    def key(item):
        return scope(item), str(_params(item).get("device", ""))

    chosen = set()
    for _, some in itertools.groupby(sorted(items, key=key), key=key):
        chosen |= _cover(list(some))
    return chosen


def of_file(item):
    return str(item.path)


def of_function(item):
    return item.nodeid.partition("[")[0]


def sample(items, count, seed):
    """``count`` of the items, others for every seed."""
    return set(random.Random(seed).sample(items, min(count, len(items))))


def _params(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def _cover(items):
    """Greedily: again and again the item with the most pairs that no chosen one has, for its cost."""
    pairs = {item: _pairs(item) for item in items}
    costs = {item: SLOW if _is_interpreted(item) else 1 for item in items}
    chosen = {item for item in items if not pairs[item]}
    pairs |= {item: _without_function(item, pairs[item]) for item in items if _is_of_the_face(item)}
    covered = set()
    # Covering pairs only makes others worth less: an entry that is still right when it comes up is the best one.
    heap = [(-len(pairs[item]) / costs[item], zlib.crc32(item.nodeid.encode()), i) for i, item in enumerate(items)]
    heapq.heapify(heap)
    while heap:
        value, tie, i = heapq.heappop(heap)
        item = items[i]
        present = -len(pairs[item] - covered) / costs[item]
        if present == value and present < 0:
            chosen.add(item)
            covered |= pairs[item]
        elif present < 0:
            heapq.heappush(heap, (present, tie, i))
    return _without_needless(chosen, pairs, costs)


def _without_needless(chosen, pairs, costs):
    """What was chosen early may have nothing left that a later one does not have, too."""
    counts = collections.Counter(pair for item in chosen for pair in pairs[item])
    for item in sorted(chosen, key=lambda item: (-costs[item], item.nodeid)):
        if pairs[item] and all(counts[pair] > 1 for pair in pairs[item]):
            counts.subtract(pairs[item])
            chosen.remove(item)
    return chosen


def _pairs(item):
    """Of any two values that occur in other tests, too, and of the test with each of its values."""
    function = ("function", item.nodeid.partition("[")[0])
    values = [(name, value) for name, value in sorted(_params(item).items()) if name != "device"]
    shared = [(name, value) for name, value in values if isinstance(value, SHARED)]
    own = [(name, id(value)) for name, value in values if not isinstance(value, SHARED)]
    return {*itertools.combinations([function, *shared], 2), *((function, value) for value in own)}


def _without_function(item, pairs):
    return {pair for pair in pairs if ("function", item.nodeid.partition("[")[0]) not in pair}


def _is_interpreted(item):
    return _params(item).get("backend") == "triton" and str(_params(item).get("device", "cpu")) == "cpu"


def _is_of_the_face(item):
    return "face" in item.keywords and _is_interpreted(item)
