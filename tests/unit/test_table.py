"""What the table says, when it is rebuilt, and how tables are cut by precision."""

import pytest
import torch
from beside import CHANGES, make_params, make_table, other_memory
from checks import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastsam import FastSAM
from fastsam.precision import Precision
from fastsam.spec import Row, StateNames
from fastsam.tables import Wanted
from fastsam.tables.table import CHUNK_OVERHEAD

# ---- chunks ----


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=12), st.integers(1, 40))
def test_chunks_are_a_cut(sizes, chunk_size):
    """Every element is in exactly one chunk, in the tensors' order, and the third column is the work before."""
    chunks = make_table([torch.zeros(size) for size in sizes]).chunks(chunk_size)
    assert (chunks.dtype, chunks.shape[1], chunks.is_contiguous()) == (torch.int64, 3, True)
    covered, work = [], 0
    for tensor, start, before in chunks.tolist():
        length = min(chunk_size, sizes[tensor] - start)
        assert length > 0
        assert before == work
        covered += [(tensor, element) for element in range(start, start + length)]
        work += length + CHUNK_OVERHEAD
    assert covered == [(tensor, element) for tensor, size in enumerate(sizes) for element in range(size)]


def test_addresses_and_sizes():
    params = [p.detach() for p in make_params((3, 4), (), (0,), (5,))]
    params.append(torch.zeros(6)[::2])
    params.append(torch.zeros(3, dtype=torch.complex64))
    table = make_table(params, groups=[0, 0, 1, 1, 1, 0])
    assert table.tensors.tolist() == [[12, 1, 0, 5, 3, 6], [0, 0, 1, 1, 1, 0]]
    addresses = table.addresses[Row.PARAM].tolist()
    for i in (0, 1, 3, 5):
        assert addresses[i] == params[i].data_ptr()
    assert addresses[4] not in (0, params[4].data_ptr()), "a parameter with gaps is reached through scratch"
    assert addresses[2] != 0, "empty is not absent"
    assert not table.addresses[Row.GRAD :].any()


def test_rows_follow_gradients_backups_and_state():
    params = make_params((3,), (4,), (5,))
    table = make_table(params, groups=[0, 0, 1])
    params[0].grad, params[2].grad = torch.ones(3), torch.ones(5)
    assert table.read_grads()
    assert table.present == [0, 2]
    assert table.addresses[Row.GRAD].tolist() == [params[0].grad.data_ptr(), 0, params[2].grad.data_ptr()]
    table.choose_perturbed([True, False], table.present)
    assert table.perturbed == [0]
    assert [address != 0 for address in table.addresses[Row.BACKUP].tolist()] == [True, False, False]
    wanted = Wanted([StateNames(("momentum_buffer",), None), StateNames()], moments=table.present)
    state = {p: {} for p in params}
    assert table.slots.bind(table, state, wanted)
    assert not any(state.values()), "nothing is published yet"
    table.slots.publish(table, state, wanted)
    table.slots.note(table, state, wanted)
    assert [list(state[p]) for p in params] == [["momentum_buffer"], [], []]
    assert table.addresses[Row.STATE].tolist() == [state[params[0]]["momentum_buffer"].data_ptr(), 0, 0]
    assert not table.addresses[Row.STATE_1 :].any()
    assert not table.slots.bind(table, state, wanted), "the steady state"
    assert table.written == [0, 2]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed(change):
    params = make_params((4, 4), (4, 4), (4, 4))
    table = make_table(params)
    assert table.changed() == []
    change(params[1])
    assert table.changed() == [1]
    assert not table.read_grads()
    assert all(g is None for g in table.grads)


def test_unchanged():
    """What a training loop does to parameters all the time."""
    params = make_params((4, 4), (0,), ())
    table = make_table(params)
    for param in params:
        param.grad = torch.ones_like(param)
        param.requires_grad_(False).requires_grad_()
        param.data = param.data
        param.data = param.data.view(param.shape)
        with torch.no_grad():
            param.mul_(2)
    with torch.autocast("cpu"), torch.inference_mode():
        assert table.changed() == []
    assert table.changed() == []
    assert table.read_grads()


@pytest.mark.parametrize("count", [3, 700], ids=["few", "many"])
def test_one_of_many_has_changed(count):
    params = make_params(*[(2,)] * count)
    for at in (0, count // 2, count - 1):
        table = make_table(params)
        other_memory(params[at])
        assert table.changed() == [at]


def test_half_then_bfloat16_in_the_same_memory():
    """``module.half().bfloat16()`` can end where it began."""
    memory = torch.zeros(16)
    param = nn.Parameter(memory.view(torch.bfloat16)[:16])
    table = make_table([param])
    param.data = memory.view(torch.float16)[:16]
    assert param.data_ptr() == memory.data_ptr()
    assert table.changed() == [0]


# ---- precision ----


def test_tables_are_cut_by_precision():
    """Positions count over all groups; what has nothing to round shares a table whatever its group says."""
    low = {"dtype": torch.bfloat16}
    groups = [
        {"params": make_params((2,), (3,), **low)},
        {"params": [*make_params((4,), **low), *make_params((5,))], "rounding": "stochastic"},
        {"params": [*make_params((6,)), *make_params((7,), **low)], "master_weights": True},
        {"params": make_params((8,), **low), "rounding": "stochastic", "rounding_seed": 3},
    ]
    optimizer = FastSAM(groups, lr=0.1, backend="reference")
    for p in (p for group in groups for p in group["params"]):
        p.grad = torch.ones_like(p)
    optimizer.first_step()
    tables = {(t.dtype, t.stochastic, t.has_masters): t.positions for t in optimizer._engine.tables}
    assert tables == {
        (torch.bfloat16, False, False): [0, 1],
        (torch.bfloat16, True, False): [2, 6],
        (torch.float32, False, False): [3, 4],
        (torch.bfloat16, False, True): [5],
    }


def test_masters_are_backups_and_get_into_the_state_with_the_update():
    params = make_params((6, 5), (3,), dtype=torch.bfloat16)
    params[0] = params[0].detach().t().requires_grad_()
    table = make_table(params, groups=[0, 1], precision=Precision(masters=True))
    for p in params:
        p.grad = torch.ones_like(p)
    state, names = {}, [StateNames(("momentum_buffer",))] * 2
    table.read_grads()
    table.choose_perturbed([True, False], table.present)
    table.slots.bind(table, state, Wanted(names, masters=table.perturbed))
    assert state == {}
    assert table.masters[1] is None
    assert_same_bits(table.masters[0], params[0].detach().float())
    assert table.masters[0].stride() == params[0].stride()
    assert (
        table.addresses[Row.BACKUP].tolist() == table.addresses[Row.MASTER].tolist() == [table.masters[0].data_ptr(), 0]
    )
    state |= {p: {} for p in params}
    wanted = Wanted(names, masters=table.perturbed, moments=table.present)
    table.slots.bind(table, state, wanted)
    table.slots.publish(table, state, wanted)
    for p, master, buffer in zip(params, table.masters, table.state[0], strict=True):
        assert state[p]["fastsam_master"].data_ptr() == master.data_ptr()
        assert buffer.dtype == torch.float32
    assert table.addresses[Row.MASTER].tolist() == [m.data_ptr() for m in table.masters]
    assert table.addresses[Row.BACKUP].tolist() == [table.masters[0].data_ptr(), 0], "the other was not perturbed"
