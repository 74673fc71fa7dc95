"""The device's copy of a table: what a CUDA graph has read stays as it was, whatever steps outside it do later."""

import pytest
import torch
from checks import assert_same_bits, values

from fastsam.backends import ClimbOptions, device_table
from fastsam.backends.device_table import DeviceTable
from fastsam.tables import BACKUP, GRAD, ROWS, Member, TensorTable

OPTIONS = [ClimbOptions(0.05, False, False)]


@pytest.fixture
def table():
    params = [values((size,), torch.float32, seed=size) for size in (5, 0, 3)]
    table = TensorTable(torch.device("cpu"), torch.float32, [Member(i, p, 0) for i, p in enumerate(params)])
    give_grads(table)
    table.begin_climb([True])
    return table


def give_grads(table, absent=()):
    for i, param in enumerate(table.params):
        param.grad = None if i in absent else torch.ones_like(param)
    table.read_grads()


@pytest.fixture
def capture(monkeypatch):
    """A switch: whether a graph is being captured."""
    return lambda on: monkeypatch.setattr(device_table, "is_capturing", lambda device: on)


WITHOUT_GRADS = [row for row in range(ROWS) if row != GRAD]


def test_new_gradients_are_not_sent_where_kernels_do_not_read_them(table):
    copy = DeviceTable(table, 4, rows=WITHOUT_GRADS)
    copy.read(table, OPTIONS)
    before = copy.uploads
    kept = [p.grad for p in table.params]
    give_grads(table)
    copy.read(table, OPTIONS)
    assert kept
    assert copy.uploads == before
    table.read_grads()
    everything = DeviceTable(table, 4)
    everything.read(table, OPTIONS)
    addresses, _ = everything.read(table, OPTIONS)
    assert_same_bits(addresses, table.addresses)


def test_a_graph_uploads_nothing_that_is_there(table, capture):
    copy = DeviceTable(table, 4, rows=WITHOUT_GRADS)
    outside = copy.read(table, OPTIONS)
    before = copy.uploads
    capture(True)
    assert all(one is other for one, other in zip(copy.read(table, OPTIONS), outside, strict=True))
    assert copy.uploads == before


def test_later_steps_do_not_write_what_a_graph_reads(table, capture):
    copy = DeviceTable(table, 4, rows=WITHOUT_GRADS)
    copy.read(table, OPTIONS)
    capture(True)
    in_graph = copy.read(table, OPTIONS)
    kept = [tensor.clone() for tensor in in_graph]
    capture(False)
    give_grads(table, absent=[2])
    table.begin_climb([True])
    other_addresses, other_options = copy.read(table, [OPTIONS[0]._replace(rho=0.1)])
    assert_same_bits(list(in_graph), kept)
    assert other_addresses[BACKUP, 2] == 0 != in_graph[0][BACKUP, 2]
    assert not torch.equal(other_options, in_graph[1])
    again = copy.read(table, [OPTIONS[0]._replace(rho=0.2)])
    assert again[0] is other_addresses
    assert again[1] is other_options, "written in place: no graph reads it"
