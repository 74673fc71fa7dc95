"""The device's copy of a table: what a CUDA graph has read stays as it was, whatever steps outside it do later."""

from types import SimpleNamespace

import pytest
import torch
from checks import assert_same_bits, values

from fastsam.backends.device_table import MOST_OPTIONS, DeviceTable, gpu_chunk_size
from fastsam.runtime import streams
from fastsam.spec import ROWS, AscentOptions, Row
from fastsam.tables import Member, TensorTable

OPTIONS = [AscentOptions(0.05, False, False)]
WITHOUT_GRADS = [row for row in range(ROWS) if row != Row.GRAD]


@pytest.fixture
def table():
    params = [values((size,), torch.float32, seed=size) for size in (5, 0, 3)]
    table = TensorTable(torch.device("cpu"), torch.float32, [Member(i, p, 0) for i, p in enumerate(params)])
    give_grads(table)
    choose_perturbed(table)
    return table


def give_grads(table, absent=()):
    for i, param in enumerate(table.params):
        param.grad = None if i in absent else torch.ones_like(param)
    table.read_grads()


def choose_perturbed(table, perturb=True):
    table.choose_perturbed([perturb], table.present)


@pytest.fixture
def capture(monkeypatch):
    """A switch: whether a graph is being captured."""
    return lambda on: monkeypatch.setattr(streams, "is_capturing", lambda device: on)


def test_chunks_cover_every_element_once(table):
    copy = DeviceTable(table, 4)
    assert copy.chunks.tolist() == [[0, 0, 4, 0], [0, 4, 1, 0], [2, 0, 3, 0]]
    assert copy.bounds.tolist() == [0, 2, 2, 3]


def test_a_table_without_elements_has_an_empty_chunk():
    table = TensorTable(torch.device("cpu"), torch.float32, [Member(0, values((0,), torch.float32), 0)])
    assert DeviceTable(table, 4).chunks.tolist() == [[0, 0, 0, 0]]


def test_new_gradients_are_not_sent_where_kernels_do_not_read_them(table):
    copy = DeviceTable(table, 4, rows=WITHOUT_GRADS)
    copy.read(table, OPTIONS)
    before = copy.uploads
    kept = [p.grad for p in table.params]
    give_grads(table)
    copy.read(table, OPTIONS)
    assert kept
    assert copy.uploads == before
    everything = DeviceTable(table, 4)
    addresses, _ = everything.read(table, OPTIONS)
    assert_same_bits(addresses, table.addresses)


def test_equal_options_are_not_sent_again(table):
    """Also where they are other objects; a tensor's number may have changed."""
    copy = DeviceTable(table, 4)
    rho = torch.tensor(0.25)
    copy.read(table, [AscentOptions(0.25, False, False)])
    before = copy.uploads
    for same in (float("0.25"), 1 / 4):
        copy.read(table, [AscentOptions(same, False, False)])
    assert copy.uploads == before
    _, by_tensor = copy.read(table, [AscentOptions(rho, False, False)])
    assert int(by_tensor[1]) == rho.data_ptr()
    _, number = copy.read(table, [AscentOptions(0.5, False, False)])
    assert number[:2].tolist() == [torch.tensor(0.5, dtype=torch.float64).view(torch.int64).item(), 0]


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
    choose_perturbed(table)
    other_addresses, other_options = copy.read(table, [OPTIONS[0]._replace(rho=0.1)])
    assert_same_bits(list(in_graph), kept)
    assert other_addresses[Row.BACKUP, 2] == 0 != in_graph[0][Row.BACKUP, 2]
    assert not torch.equal(other_options, in_graph[1])
    again = copy.read(table, [OPTIONS[0]._replace(rho=0.2)])
    assert again[0] is other_addresses
    changed = [copy.read(table, [OPTIONS[0]._replace(rho=1.0 + i)])[1] for i in range(3 * MOST_OPTIONS)]
    assert len({id(options) for options in changed}) <= MOST_OPTIONS, "written in place where no graph reads it"
    assert all(options is not in_graph[1] for options in changed)
    assert_same_bits(list(in_graph), kept)


def test_backups_that_come_and_go_can_be_captured(table, capture):
    """An update that did not perturb has cleared their row; they are where they were."""
    copy = DeviceTable(table, 4)
    copy.read(table, OPTIONS)
    choose_perturbed(table, perturb=False)
    copy.read(table, OPTIONS)
    choose_perturbed(table)
    capture(True)
    addresses, _ = copy.read(table, OPTIONS)
    assert_same_bits(addresses, table.addresses)


def test_backups_that_no_step_has_seen_cannot_be_captured(table, capture):
    copy = DeviceTable(table, 4)
    choose_perturbed(table, perturb=False)
    copy.read(table, OPTIONS)
    choose_perturbed(table)
    capture(True)
    with pytest.raises(RuntimeError, match="not where they were"):
        copy.read(table, OPTIONS)


def test_operations_of_a_graph_share_an_upload(table, capture):
    copy = DeviceTable(table, 4)
    copy.read(table, OPTIONS)
    before, kept = copy.uploads, [param.grad for param in table.params]
    give_grads(table)
    capture(True)
    first, second = (copy.read(table, OPTIONS)[0] for _ in range(2))
    assert kept
    assert first is second
    assert copy.uploads == before + 1


def test_a_graph_may_have_any_number_of_uploads(table, capture):
    """Where the pinned memory that was made beforehand is used up, addresses travel as arguments of kernels."""
    copy = DeviceTable(table, 4)
    copy.read(table, OPTIONS)
    capture(True)
    alive, found = [], []
    for _ in range(40):
        alive.append([param.grad for param in table.params])
        give_grads(table)
        found.append((copy.read(table, OPTIONS)[0], table.addresses.clone()))
    for addresses, expected in found:
        assert_same_bits(addresses, expected)


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.float32, {0: 4096, 10**6: 4096, 25_600_000: 8192, 10**9: 8192, 2**31: 8192, 7 * 10**9: 32768}),
        (torch.bfloat16, {0: 4096, 25_600_000: 8192, 10**9: 16384, 2**31: 16384, 7 * 10**9: 32768}),
    ],
    ids=["float32", "bfloat16"],
)
def test_chunks_of_every_size_of_table(dtype, sizes):
    def table_of(elements):
        return SimpleNamespace(values=[torch.empty(elements, dtype=dtype, device="meta")], dtype=dtype)

    assert {elements: gpu_chunk_size(table_of(elements), 4096) for elements in sizes} == sizes
    assert gpu_chunk_size(table_of(10), 2**16) == 2**16
