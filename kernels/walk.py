"""The walk over one chunk, written once: where its tensors lie, wide accesses where they are aligned, a masked tail."""

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from fastsam.spec import Row

PARAM: tl.constexpr = tl.constexpr(int(Row.PARAM))
GRAD: tl.constexpr = tl.constexpr(int(Row.GRAD))
BACKUP: tl.constexpr = tl.constexpr(int(Row.BACKUP))
STATE: tl.constexpr = tl.constexpr(int(Row.STATE))
MASTER: tl.constexpr = tl.constexpr(int(Row.MASTER))
FIRST_GRAD: tl.constexpr = tl.constexpr(int(Row.FIRST_GRAD))
METHOD_STATE: tl.constexpr = tl.constexpr(int(Row.METHOD_STATE))
STEP: tl.constexpr = tl.constexpr(int(Row.STEP))

# What one thread reads or writes at once where the address allows it.
ACCESS_BYTES: tl.constexpr = tl.constexpr(16)

# A row of the table of chunks: tensor, first element, length, parameter group.
CHUNK_FIELDS: tl.constexpr = tl.constexpr(4)


@triton.jit
def read_chunk(chunks_ptr, chunk):
    """The chunk's tensor, first element, length and parameter group."""
    row_ptr = chunks_ptr + CHUNK_FIELDS * chunk
    return tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2).to(tl.int32), tl.load(row_ptr + 3)


@triton.jit
def element_address(addresses_ptr, row, tensor, tensor_count, start, DTYPE: tl.constexpr):
    """The address of element ``start`` of a tensor; 0 where the row has none."""
    address = tl.load(addresses_ptr + row * tensor_count + tensor)
    return tl.where(address == 0, address, address + start * (DTYPE.primitive_bitwidth // 8))


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    # The hint belongs on the pointer: one on the integer is lost in the cast, and every access would be scalar.
    return tl.multiple_of(pointer, ACCESS_BYTES) if WIDE else pointer


# Not compiled: these functions run as Python, for tests.
INTERPRETED: tl.constexpr = tl.constexpr(not isinstance(_pointer, JITFunction))

# Masked accesses are of one element each, and every one has a mask: in smaller blocks they fit into registers.
NARROW: tl.constexpr = tl.constexpr(1 if INTERPRETED else 4)


@triton.jit
def _pointers(addresses, DTYPES: tl.constexpr, WIDE: tl.constexpr):
    pointers = ()
    for i in tl.static_range(len(addresses)):
        pointers = pointers + (_pointer(addresses[i], DTYPES[i], WIDE),)  # noqa: RUF005 (Triton has no unpacking)
    return pointers


@triton.jit
def _are_aligned(addresses):
    bits = addresses[0]
    for i in tl.static_range(1, len(addresses)):
        bits |= addresses[i]
    return (bits & (ACCESS_BYTES - 1)) == 0


@triton.jit
def _zeros(COUNT: tl.constexpr, SIZE: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros([SIZE], tl.float64),)  # noqa: RUF005
    return zeros


@triton.jit
def walk(
    element: tl.constexpr,
    addresses,
    DTYPES: tl.constexpr,
    arguments,
    CONSTANTS: tl.constexpr,
    length,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr = 1,
):
    """Runs ``element(pointers, at, mask, arguments, sums, CONSTANTS)``, which returns the new sums, over a chunk.

    Args:
        element: what is done to a block of elements, at the offsets ``at``; ``mask`` is None in a whole block.
        addresses: of the tensors; 0 for one that ``element`` does not use.
        DTYPES: of the tensors.
        arguments: for ``element``: a tuple of numbers.
        CONSTANTS: for ``element``: a tuple. Where it is given a name first, the name must be annotated as constexpr, or
            its entries become run-time numbers.
        length: elements of the chunk.
        SUMS: float64 sums that ``element`` adds to.
        BLOCK: elements that are walked at a time.
        UNROLL: whole blocks of one iteration, all of which can then be loaded first. NVIDIA's assembler unrolls short
            loops by itself; those over many tensors have enough to load.

    Returns:
        The totals of the sums.
    """
    whole = tl.where(_are_aligned(addresses), length // BLOCK * BLOCK, 0)
    lanes = tl.arange(0, BLOCK)
    wide = _pointers(addresses, DTYPES, True)
    sums = _zeros(SUMS, BLOCK)
    for start in tl.range(0, whole, BLOCK, loop_unroll_factor=UNROLL):
        sums = element(wide, start + lanes, None, arguments, sums, CONSTANTS)
    lanes = tl.arange(0, BLOCK // NARROW)
    narrow = _pointers(addresses, DTYPES, False)
    tail_sums = _zeros(SUMS, BLOCK // NARROW)
    for start in range(whole, length, BLOCK // NARROW):
        tail_sums = element(narrow, start + lanes, start + lanes < length, arguments, tail_sums, CONSTANTS)
    totals = ()
    for i in tl.static_range(SUMS):
        totals = totals + (tl.sum(sums[i]) + tl.sum(tail_sums[i]),)  # noqa: RUF005
    return totals


@triton.jit
def read_number(options_ptr, index):
    """Entry ``index`` of a table of options, in float64, for an option that is always a number."""
    return tl.load(options_ptr + 2 * index).to(tl.float64, bitcast=True)


@triton.jit
def read_option(options_ptr, index):
    """Entry ``index`` of a table of options, in float64.

    An entry is two words: the number, and the address of a tensor to read it from instead, or 0. The address is odd if
    that tensor is float64, else it is float32.
    """
    address = tl.load(options_ptr + 2 * index + 1)
    number = read_number(options_ptr, index)
    is_double = (address & 1) != 0
    single = tl.load(address.to(tl.pointer_type(tl.float32)), mask=(address != 0) & (is_double == 0), other=0.0)
    double = tl.load((address & -2).to(tl.pointer_type(tl.float64)), mask=is_double, other=0.0)
    return tl.where(address == 0, number, tl.where(is_double, double, single.to(tl.float64)))


@triton.jit
def read_step(addresses_ptr, tensor, tensor_count):
    """The updates that a tensor has had, float32; 1 where nobody needs the count."""
    address = tl.load(addresses_ptr + STEP * tensor_count + tensor)
    return tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=1.0)


@triton.jit
def is_last_to_finish(finished_ptr, program_count, RELAXED: tl.constexpr = False):
    """Whether all of ``program_count`` programs have come here, this one last; ``finished_ptr`` counts them from 0.

    What the others did before is then done, and seen by this one; ``RELAXED``: only what they have read and used is
    done, which spares an AMD GPU writing back and emptying its caches. The counter is 0 again afterwards.
    """
    # Every warp's reads and writes come before the one thread that counts.
    tl.debug_barrier()
    if RELAXED:
        before = tl.atomic_add(finished_ptr, 1, sem="relaxed")
    else:
        before = tl.atomic_add(finished_ptr, 1)
    last = before == program_count - 1
    if last:
        tl.store(finished_ptr, 0)
    return last
