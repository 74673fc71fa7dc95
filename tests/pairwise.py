"""Parametrisation by pairs: few cases, in which every two values of two axes meet."""

import heapq
import itertools
import random

import pytest
import triton_interpreter


def pairwise(**axes):
    """Like ``pytest.mark.parametrize`` for each of ``axes`` (values by their ids), without most of the product.

    FASTSAM_THOROUGH=1: the whole product.
    """
    product = list(itertools.product(*axes.values()))
    chosen = product if triton_interpreter.THOROUGH else all_pairs(product)
    cases = [tuple(axes[name][key] for name, key in zip(axes, keys, strict=True)) for keys in chosen]
    return pytest.mark.parametrize(tuple(axes), cases, ids=["-".join(map(str, keys)) for keys in chosen])


def all_pairs(product):
    """Some of the tuples ``product``, in which each pair of its values at two places occurs; the same every time."""
    pairs = [set(itertools.combinations(enumerate(keys), 2)) or {keys} for keys in product]
    order = random.Random(0).sample(range(len(product)), len(product))
    covered, chosen = set(), []
    # Covering pairs only makes others worth less: an entry that is still right when it comes up is the best one.
    heap = [(-len(pairs[i]), place, i) for place, i in enumerate(order)]
    heapq.heapify(heap)
    while heap:
        value, place, i = heapq.heappop(heap)
        present = -len(pairs[i] - covered)
        if present == value and present < 0:
            chosen.append(i)
            covered |= pairs[i]
        elif present < 0:
            heapq.heappush(heap, (present, place, i))
    return [product[i] for i in sorted(chosen)]
