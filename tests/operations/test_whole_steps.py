"""All operations in the order of a step, by the chunks that each backend really uses."""

import pytest
import torch
import triton_interpreter
from checks import assert_same_bits
from expected import assert_whole_step
from scene import ASCENTS, UPDATES, Scene, descent_by, every_stored, update_

from fastsam.backends import native_table
from fastsam.spec import Ascent, AscentOptions, Row


@pytest.fixture
def chunk_size(operations, backend):
    """What the backend really uses; for those without chunks, enough for several threads of torch's."""
    return native_table.CHUNK_SIZE if backend == "native" else getattr(operations, "CHUNK_SIZE", 32768)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_real_chunks(operations, device, chunk_size, dtype):
    """The boundaries of the chunks that the backend really uses, and enough of them for several threads."""
    size = chunk_size
    assert_whole_step(operations, Scene([(size - 1,), (0,), (size,), (size + 1,), (2 * size + 5,)], dtype, device))


def test_tables_too_large_for_the_cache(operations, backend, device):
    """Large tables may be written by other instructions; here with tails and starts that suit none of them."""
    size = 100_000 if triton_interpreter.runs(backend, device) else (16 << 20) // 4
    assert_whole_step(operations, Scene([(size + 3,), (1021,)], torch.float32, device, offset=1))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_stored
def test_the_same_bits_every_time(operations, backend, device, chunk_size, stored, threads):
    """Also with another number of threads, where PyTorch does not divide a large sum among them.

    It does in the dot products of ``foreach`` and ``reference``, and in the norm of ``reference``.
    """
    size = chunk_size

    def run():
        scene = Scene([(2 * size + 77,), (3,), (size,)], stored, device)
        scene.begin_ascent()
        scene.give_state(UPDATES["adamw-amsgrad"], [0, 1, 9])
        scene.give_rows()
        norm = operations.grad_norm([scene.table], [ASCENTS["asam"]]).clone()
        operations.perturb_(scene.table, Ascent([AscentOptions(20.0, True, False, 3)], norm))
        perturbed = scene.copy_rows(Row.PARAM)
        descent = descent_by("all", scene)
        dots = operations.dots(scene.table, descent.form, descent.coefficients)
        update_(operations, scene, [UPDATES["adamw-amsgrad"]], descent=descent)
        return dots, [norm, *perturbed.values(), *scene.copy_rows().values()]

    results = []
    for count in (1, 2, 2):
        threads(count)
        results.append(run())
    (_, alone), *others = results
    if backend == "reference":
        torch.testing.assert_close(alone[0], others[0][1][0], rtol=2 * torch.finfo(torch.float64).eps, atol=0)
        alone = others[0][1]
    for _, other in others:
        assert_same_bits(alone, other)
    assert_same_bits(results[1][0], results[2][0], "dots")
