"""A table with everything that the five operations read and write, between canaries."""

import pytest
import torch
from checks import DTYPE_IDS, DTYPES, Canaries, assert_same_bits, values

from fastsam.precision import Precision
from fastsam.spec import (
    NONE,
    PERTURBATION,
    AdamOptions,
    Ascent,
    AscentCoefficients,
    AscentForm,
    AscentOptions,
    Descent,
    DescentCoefficients,
    DescentForm,
    Map,
    Row,
    SGDOptions,
    StateNames,
    Update,
)
from fastsam.tables import Member, TensorTable

# What the boundary shapes are about: backends with a chunk size use this one there, their own in `test_real_chunks`.
CHUNK = 1024

SHAPES = {
    "empty": [(0,)],
    "scalar": [()],
    "one": [(1,)],
    "chunk-1": [(CHUNK - 1,)],
    "chunk": [(CHUNK,)],
    "chunk+1": [(CHUNK + 1,)],
    "chunks": [(3 * CHUNK + 5,)],
    "blocks": [(15,), (16,), (17,), (31,), (32,), (33,), (255,), (256,), (257,)],
    "mixed": [(), (7,), (16, 3, 3, 3), (0, 4), (CHUNK + 3,), (1,), (130, 5), (2, CHUNK)],
    "empty-at-boundaries": [(0,), (5,), (0, 3), (CHUNK,), (0,), (), (0,)],
}

NEAREST, STOCHASTIC, MASTERS, BOTH = Precision(), Precision(True), Precision(False, True), Precision(True, True)
STORED = {
    "float32": (torch.float32, NEAREST),
    "float64": (torch.float64, NEAREST),
    "bfloat16": (torch.bfloat16, NEAREST),
    "float16": (torch.float16, NEAREST),
    "bfloat16-stochastic": (torch.bfloat16, STOCHASTIC),
    "float16-stochastic": (torch.float16, STOCHASTIC),
    "bfloat16-masters": (torch.bfloat16, MASTERS),
    "float16-masters": (torch.float16, MASTERS),
    "bfloat16-stochastic-masters": (torch.bfloat16, BOTH),
}
SEED = 7

ASCENTS = {
    "sam": AscentOptions(1.0, False, False, SEED),
    "asam": AscentOptions(1.0, True, False, SEED),
    "maximize": AscentOptions(1.0, False, True, SEED),
    "asam-maximize": AscentOptions(1.0, True, True, SEED),
}

FORMS = {
    "plain": AscentForm(),
    "power": AscentForm(map=Map.POWER),
    "adaptive": AscentForm(map=Map.ADAPTIVE),
    "average": AscentForm(y=Row.METHOD_STATE),
    "further": AscentForm(y=PERTURBATION),
    "weights": AscentForm(y=Row.PARAM),
    "momentum": AscentForm(x=Row.STATE),
    "direction": AscentForm(x=Row.DIRECTION),
}
ASCENT = AscentCoefficients
ASCENT_COLUMNS = {ASCENT.A: 0.05, ASCENT.B: -0.02, ASCENT.SCALE: 0.7, ASCENT.TERM: 1.5}

LR = 0.01
UPDATES = {
    "sgd": SGDOptions(LR, 0.0, 0.0, 0.01, False, False, SEED),
    "sgd-momentum": SGDOptions(LR, 0.9, 0.5, 0.0, False, True, SEED),
    "sgd-nesterov": SGDOptions(LR, 0.9, 0.0, 0.01, True, False, SEED),
    "adam": AdamOptions(LR, 0.9, 0.999, 1e-8, 0.01, False, False, False, SEED),
    "adamw-amsgrad": AdamOptions(LR, 0.8, 0.99, 1e-3, 0.01, True, True, True, SEED),
}

DESCENT = DescentCoefficients
DESCENTS = {
    "scaled": (DescentForm(), {DESCENT.A: 0.8}),
    "first-grad": (DescentForm(Row.FIRST_GRAD), {DESCENT.A: 1.3, DESCENT.B: -0.4}),
    "method-state": (DescentForm(Row.METHOD_STATE), {DESCENT.A: 1.0, DESCENT.B: 0.7}),
    "keeps": (DescentForm(keeps=True), {DESCENT.KEEP_FIRST: 0.1, DESCENT.KEEP_STATE: 0.9}),
    "replaces": (
        DescentForm(Row.FIRST_GRAD, keeps=True),
        {DESCENT.B: 0.0, DESCENT.KEEP_X: 1.0, DESCENT.KEEP_FIRST: -0.6, DESCENT.KEEP_STATE: 0.0},
    ),
    "decoupled": (
        DescentForm(Row.FIRST_GRAD, decoupled=True),
        {DESCENT.A: 0.0, DESCENT.B: 1.0, DESCENT.DECOUPLED_X: 0.09, DESCENT.DECOUPLED_Y: -0.09},
    ),
    "all": (
        DescentForm(Row.METHOD_STATE, keeps=True, decoupled=True),
        {DESCENT.A: 0.9, DESCENT.B: -0.3, DESCENT.KEEP_X: 0.5, DESCENT.DECOUPLED_X: -0.01, DESCENT.DECOUPLED_Y: 0.02},
    ),
}

OFFSETS = {"aligned": 0, "misaligned": 1}

EVERY_DTYPE = dict(zip(DTYPE_IDS, DTYPES, strict=True))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)

every_stored = pytest.mark.parametrize("stored", STORED.values(), ids=STORED)


def scalar(number, device):
    return torch.tensor(number, dtype=torch.float32, device=device)


def norm_of(number, device):
    return torch.tensor(number, dtype=torch.float64, device=device)


def kind_of(options):
    return Update.ADAM if isinstance(options, AdamOptions) else Update.SGD


def state_names(options):
    if isinstance(options, AdamOptions):
        return StateNames(("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if options.amsgrad else 2], "step")
    return StateNames(("momentum_buffer",) if options.momentum else (), "fastsam_step" if options.dampening else None)


def ascent_coefficients(columns, count, device):
    """Float64 ``(count, 4)``: the same for all parameters, but for a little."""
    return _fill(torch.zeros((count, len(AscentCoefficients)), dtype=torch.float64), columns).to(device)


def descent_coefficients(columns, count, device):
    """Float64 ``(count, 7)``; where ``columns`` say nothing, the gradient and the method state stay what they are."""
    coefficients = torch.zeros((count, len(DescentCoefficients)), dtype=torch.float64)
    coefficients[:, [DescentCoefficients.A, DescentCoefficients.KEEP_STATE]] = 1.0
    return _fill(coefficients, columns).to(device)


def _fill(coefficients, columns):
    for column, number in columns.items():
        coefficients[:, column] = number + (torch.arange(len(coefficients)) / 64 if number else 0.0)
    return coefficients


class Scene:
    """A table over tensors with canaries around each of them.

    With masters some are their parameters' exact values, and some are not: those parameters have been written to.
    """

    def __init__(self, shapes, stored, device, offset=0, groups=None, *, seed=0, size=1.0):
        self.dtype, precision = stored if isinstance(stored, tuple) else (stored, NEAREST)
        self.canaries = Canaries()
        self.shapes, self.device, self.offset = shapes, device, offset
        self.groups = groups or [0] * len(shapes)
        self.params = self.place(seed + 100)
        members = [Member(i, p, g) for i, (p, g) in enumerate(zip(self.params, self.groups, strict=True))]
        self.table = TensorTable(device, self.dtype, members, precision)
        self.state_dtype = self.table.state_dtype
        self.masters = [None] * len(shapes)
        self.give_state(None, [0] * len(shapes))
        if precision.masters:
            self._give_masters()
        self.grads = []
        self.give_grads(size=size, seed=seed)
        self.note_start()

    # ---- what there is ----

    def place(self, seed, dtype=None, scale=1.0):
        """Random tensors of all shapes, between canaries."""
        return [
            self.canaries.around(scale * values(s, dtype or self.dtype, self.device, seed + i), offset=self.offset)
            for i, s in enumerate(self.shapes)
        ]

    def _give_masters(self):
        # Below a rounding of the parameter; every third one is stale.
        little = 2.0**-11 if self.dtype == torch.bfloat16 else 2.0**-14
        exact = [p.float() * (1 + little if i % 3 else 2) for i, p in enumerate(self.params)]
        self.masters = [self.canaries.around(master, offset=self.offset) for master in exact]
        self.table.set_row(Row.MASTER, self.masters)

    def note_start(self):
        """Takes the present weights for those at w."""
        self.originals = [p.clone() for p in self.params]
        self.starts = [self._followed(i) for i in range(len(self.params))]

    def _followed(self, i):
        """What an operation starts from: the weights, or the master that has followed them."""
        master, param = self.masters[i], self.params[i]
        if master is None:
            return param.clone()
        return torch.where(master.to(self.dtype) == param, master, param.float())

    def give_grads(self, *, size=1.0, seed=0, absent=()):
        """New gradients, of magnitude ``size``; none for the parameters ``absent``."""
        self.grads = [None if i in absent else grad for i, grad in enumerate(self.place(seed + 200, scale=size))]
        self.grad_copies = [None if g is None else g.clone() for g in self.grads]
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        self.table.read_grads()

    def begin_ascent(self, perturb=None):
        """Chooses what is perturbed: what has a gradient, and whose group is to (default: all); backups full of NaN."""
        perturb = perturb or [True] * (max(self.groups) + 1)
        self.table.perturbed = [i for i in self.table.present if perturb[self.groups[i]]]
        memory = self.masters
        if not self.table.has_masters:
            memory = [self.canaries.around(torch.full_like(p, torch.nan), offset=self.offset) for p in self.params]
        self.backups = [memory[i] if i in self.table.perturbed else None for i in range(len(self.params))]
        self.table.set_row(Row.BACKUP, self.backups)

    def give_state(self, options, steps):
        """A state as after ``steps[i]`` updates of each parameter: of zeros where that is 0."""
        names = StateNames() if options is None else state_names(options)
        count = len(names.moments)
        slots = [self.place(300 + 100 * k, self.state_dtype) for k in range(count)]
        for k, slot in enumerate(slots):
            for tensor, step in zip(slot, steps, strict=True):
                # exp_avg_sq and max_exp_avg_sq are not negative.
                tensor.copy_((tensor.square() if k else tensor) * (step != 0))
            self.table.set_row(Row(Row.STATE + k), slot)
        for k in range(count, 3):
            self.table.set_row(Row(Row.STATE + k), [None] * len(steps))
        counts = [None] * len(steps)
        if names.step is not None or self.table.stochastic:
            counts = [self.canaries.around(scalar(float(step), self.device)) for step in steps]
        self.table.set_row(Row.STEP, counts)

    def give_rows(self, *, lacking=True):
        """First gradients, directions and method state; the last of several parameters has none (``lacking``)."""
        rows = {Row.FIRST_GRAD: self.dtype, Row.DIRECTION: self.dtype, Row.METHOD_STATE: self.state_dtype}
        for row, dtype in rows.items():
            tensors = self.place(600 + 100 * (row - Row.FIRST_GRAD), dtype)
            if lacking and len(tensors) > 1:
                tensors[-1] = None
            self.table.set_row(row, tensors)

    def copy_rows(self, *rows):
        """Copies of the tensors in ``rows``, by default in all."""
        return {row: [None if t is None else t.clone() for t in self.table.rows[row]] for row in rows or Row}

    def perturb(self, seed=900):
        """As if there had been an ascent: the backups are what a first one leaves there, the weights are others."""
        for i in self.table.perturbed:
            self.backups[i].copy_(self.starts[i])
            self.params[i].add_(0.1 * values(self.shapes[i], self.dtype, self.device, seed + i))

    # ---- checks ----

    def assert_rows_unchanged(self, before, *changed):
        """All rows but ``changed`` hold what ``before``, from :meth:`copy_rows`, says."""
        for row, tensors in before.items():
            if row not in changed:
                assert_same_bits(self.table.rows[row], tensors, Row(row).name)

    def assert_surroundings(self):
        """Nothing was written around the table's tensors, or to its gradients."""
        self.canaries.assert_alive()
        assert_same_bits(self.grads, self.grad_copies, "gradients")

    # ---- the oracle's side ----

    def operand(self, row, i, rows=None):
        """The tensor that a form names, in float64, or None; ``rows``: from :meth:`copy_rows`."""
        if row == NONE:
            return None
        if row == PERTURBATION:
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            return (self.params[i].to(wide) - self.backups[i].to(wide)).double()
        tensor = (rows or self.table.rows)[row][i]
        return None if tensor is None else tensor.double()


def update_(operations, scene, options, grad_scale=None, found_inf=None, descent=None):
    operations.restore_and_update_(scene.table, kind_of(options[0]), options, descent, grad_scale, found_inf)


def combination(columns, form, scene):
    """An ascent by ``form``, with the same coefficients for all parameters, but for a little."""
    coefficients = ascent_coefficients(columns, len(scene.params), scene.device)
    return Ascent([ASCENTS["sam"]] * (max(scene.groups) + 1), form=form, coefficients=coefficients)


def descent_by(name, scene):
    """One of ``DESCENTS``, for a scene."""
    if name is None:
        return None
    form, columns = DESCENTS[name]
    return Descent(form, descent_coefficients(columns, len(scene.params), scene.device))


def perturb_everything(operations, scene, rho=1.0):
    """A first ascent, by a norm of 1."""
    options = [AscentOptions(rho, False, False, 7)] * (max(scene.groups) + 1)
    operations.perturb_(scene.table, Ascent(options, norm_of(1.0, scene.device)))


def special(tensor):
    """Fills ``tensor`` with random bits: -0.0, subnormals, infinities, NaNs with payloads."""
    size = tensor.element_size()
    generator = torch.Generator().manual_seed(7)
    raw = torch.randint(0, 256, (tensor.numel() * size,), dtype=torch.uint8, generator=generator)
    numbers = raw.view(tensor.dtype).to(tensor.device).reshape(tensor.shape)
    if tensor.numel() > 4:
        numbers[:4] = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf], dtype=tensor.dtype)
    as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    tensor.view(as_bits).copy_(numbers.view(as_bits))
