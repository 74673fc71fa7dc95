"""Tables for the Triton backend, and a step of plain SAM on them."""

from checks import values

from fastsam.backends import load
from fastsam.precision import Precision
from fastsam.spec import Ascent, AscentOptions, SGDOptions, StateNames, Update
from fastsam.tables import Member, TensorTable, Wanted

SGD = SGDOptions(0.1, 0.9, 0.0, 0.0, False, False)
ASCENT = AscentOptions(0.05, False, False)

PRECISIONS = {
    "nearest": Precision(),
    "stochastic": Precision(stochastic=True),
    "masters": Precision(masters=True),
    "stochastic masters": Precision(stochastic=True, masters=True),
}


def make_table(shapes, dtype, device, groups=None, precision=Precision()):  # noqa: B008 (a NamedTuple does not change)
    """A table whose parameters have gradients and are to be perturbed, over SGD's state."""
    params = [values(shape, dtype, device, i) for i, shape in enumerate(shapes)]
    groups = groups or [0] * len(params)
    members = [Member(i, p, g) for i, (p, g) in enumerate(zip(params, groups, strict=True))]
    table = TensorTable(device, dtype, members, precision)
    give_grads(table)
    names = [StateNames(("momentum_buffer",), "step")] * (max(groups) + 1)
    table.choose_perturbed([True] * (max(groups) + 1), table.present)
    bind(table, {param: {} for param in params}, names)
    return table


def bind(table, state, names):
    """Puts ``state``, completed, into the table."""
    everything = range(len(table.params))
    wanted = Wanted(names, masters=everything, moments=everything)
    table.slots.bind(table, state, wanted)
    table.slots.publish(table, state, wanted)
    table.slots.note(table, state, wanted)


def give_grads(table, seed=100):
    """New gradients at new addresses."""
    grads = [values(p.shape, table.dtype, table.device, seed + i) for i, p in enumerate(table.params)]
    for param, grad in zip(table.params, grads, strict=True):
        param.grad = grad
    table.read_grads()


def whole_step(triton_gpu, table, ascent=ASCENT, sgd=SGD):
    groups = max(table.groups) + 1
    norm = triton_gpu.grad_norm([table], [ascent] * groups)
    triton_gpu.perturb_(table, Ascent([ascent] * groups, norm))
    triton_gpu.restore_and_update_(table, Update.SGD, [sgd] * groups)


def copy_of(table):
    return table.attached(load("triton", table.device.type)._View).copy


def counts(table):
    """The steps that the parameters have had."""
    return [float(step) for step in table.steps]


def uploads(table):
    return copy_of(table).uploads
