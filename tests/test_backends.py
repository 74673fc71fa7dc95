"""The five operations of every backend against the float64 oracle, from the addresses up: no optimizer here."""

import math

import oracle
import pytest
import torch
import triton_interpreter
from checks import (
    DTYPE_IDS,
    DTYPES,
    Canaries,
    assert_nothing_written_between,
    assert_same_bits,
    assert_within,
    poison_allocation,
    values,
)

from fastsam.backends import AdamOptions, ClimbOptions, SGDOptions
from fastsam.tables.state import StateNames
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


def every_shape(test):
    test = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)(test)
    return pytest.mark.usefixtures("small_chunks")(test)


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
every_offset = pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])

CLIMBS = {
    "sam": ClimbOptions(1.0, False, False),
    "asam": ClimbOptions(1.0, True, False),
    "maximize": ClimbOptions(1.0, False, True),
    "asam-maximize": ClimbOptions(1.0, True, True),
}
every_climb = pytest.mark.parametrize("climb", CLIMBS.values(), ids=CLIMBS)

LR = 0.01
UPDATES = {
    "sgd": SGDOptions(LR, 0.0, 0.0, 0.01, False, False),
    "sgd-momentum": SGDOptions(LR, 0.9, 0.5, 0.0, False, True),
    "sgd-nesterov": SGDOptions(LR, 0.9, 0.0, 0.01, True, False),
    "adam": AdamOptions(LR, 0.9, 0.999, 1e-8, 0.01, False, False, False),
    "adamw-amsgrad": AdamOptions(LR, 0.8, 0.99, 1e-3, 0.01, True, True, True),
}
every_update = pytest.mark.parametrize("options", UPDATES.values(), ids=UPDATES)


class Scene:
    """A table over tensors with canaries around each of them, and float64 copies of everything in it."""

    def __init__(self, shapes, dtype, device, offset=0, groups=None, seed=0, size=1.0):
        self.canaries = Canaries()
        self.shapes, self.dtype, self.device, self.offset = shapes, dtype, device, offset
        self.groups = groups or [0] * len(shapes)
        self.params = self.place(seed + 100)
        self.originals = [p.clone() for p in self.params]
        self.table = TensorTable(
            device, dtype, [Member(i, p, g) for i, (p, g) in enumerate(zip(self.params, self.groups, strict=True))]
        )
        self.grads = []
        self.give_grads(size=size, seed=seed)

    def place(self, seed, scale=1.0):
        return [
            self.canaries.around(scale * values(shape, self.dtype, self.device, seed + i), offset=self.offset)
            for i, shape in enumerate(self.shapes)
        ]

    def give_grads(self, *, size=1.0, seed=0, absent=()):
        """New gradients, of magnitude ``size``; none for the parameters ``absent``."""
        self.grads = [None if i in absent else grad for i, grad in enumerate(self.place(seed + 200, scale=size))]
        self.kept_grads = [None if g is None else g.clone() for g in self.grads]
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        self.table.read_grads()

    def begin_climb(self, perturb=None):
        """Backups, full of NaN."""
        self.table.begin_climb(perturb or [True] * (max(self.groups) + 1))
        self.backups = [self.table.backups[i] for i in self.table.climbing]
        if self.backups:
            self.poison = poison_allocation(self.backups[0])

    def give_state(self, options, steps):
        """A state as after ``steps[i]`` updates of each parameter; without any where that is 0."""
        entries = {}
        names = state_names(options)
        for i, (param, step) in enumerate(zip(self.params, steps, strict=True)):
            if step == 0:
                continue
            moments = self.place_state(i, len(names.moments))
            entries[param] = dict(zip(names.moments, moments, strict=True))
            if names.step:
                entries[param][names.step] = torch.tensor(float(step))
        for param in self.params:
            entries.setdefault(param, {})
        prepared = self.table.prepare_state(entries, [names] * (max(self.groups) + 1))
        if prepared is not None:
            self.table.publish_state(entries, prepared)

    def place_state(self, i, count):
        first = values(self.shapes[i], self.dtype, self.device, 300 + i)
        squares = [values(self.shapes[i], self.dtype, self.device, seed + i).square() for seed in (400, 500)]
        return [self.canaries.around(t, offset=self.offset) for t in [first, *squares][:count]]

    def state(self):
        """Copies of the state that the table points at, slot by slot, and of the step counts."""
        slots = [[None if t is None else t.clone() for t in slot] for slot in self.table.state]
        return slots, self.table.steps.clone()

    def assert_surroundings(self):
        """Nobody wrote where nothing of this table lies, or to its gradients."""
        self.canaries.assert_alive()
        assert_same_bits(self.grads, self.kept_grads, "gradients")
        if self.backups:
            assert_nothing_written_between(self.backups, self.poison)


def state_names(options):
    if isinstance(options, AdamOptions):
        return StateNames(("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if options.amsgrad else 2], "step")
    return StateNames(("momentum_buffer",) if options.momentum else (), "fastsam_step" if options.momentum else None)


def expected_update(options, w, g, moments, step):
    """The oracle's new weights and moments after ``step`` updates."""
    named = options._asdict()
    del named["rounding_seed"]
    if isinstance(options, SGDOptions):
        w, buffer = oracle.sgd(w, g, moments[0] if step else None, **named)
        return w, [buffer, None, None]
    named["betas"] = named.pop("beta1"), named.pop("beta2")
    if not step:
        moments = [torch.zeros_like(w) for _ in moments[: 3 if options.amsgrad else 2]] + [None] * (not options.amsgrad)
    w, moments = oracle.adam(w, g, moments, step + 1, **named)
    return w, list(moments)


def update(operations, scene, options, grad_scale=None, found_inf=None):
    operation = operations.restore_and_adam_ if isinstance(options[0], AdamOptions) else operations.restore_and_sgd_
    operation(scene.table, options, grad_scale, found_inf)


def scalar(number, device):
    return torch.tensor(number, dtype=torch.float32, device=device)


def norm_of(number, device):
    return torch.tensor(number, dtype=torch.float64, device=device)


@pytest.fixture
def small_chunks(operations, monkeypatch):
    if hasattr(operations, "CHUNK_SIZE"):
        monkeypatch.setattr(operations, "CHUNK_SIZE", CHUNK)


# ---- the norm ----


@every_offset
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@every_dtype
@every_shape
def test_grad_norm(operations, device, shapes, dtype, adaptive, offset):
    scene = Scene(shapes, dtype, device, offset)
    scene.begin_climb()
    norm = operations.grad_norm([scene.table], [ClimbOptions(0.05, adaptive, False)])
    assert (norm.dtype, norm.shape, norm.device.type) == (torch.float64, (), device.type)
    expected = oracle.norm(scene.originals, scene.grads, [adaptive] * len(shapes))
    assert float(norm) == pytest.approx(expected, rel=1e-12, abs=0)
    assert_same_bits(scene.params, scene.originals, "weights")
    scene.assert_surroundings()


def test_grad_norm_is_one_over_all_tables(operations, device):
    groups = [0, 1, 0]
    scenes = [Scene([(3,), (CHUNK + 1,), (0,)], dtype, device, groups=groups, seed=i) for i, dtype in enumerate(DTYPES)]
    for scene in scenes:
        scene.begin_climb()
    norm = operations.grad_norm(
        [scene.table for scene in scenes], [ClimbOptions(0.05, False, False), ClimbOptions(0.0, True, True)]
    )
    expected = [oracle.norm(s.originals, s.grads, [group == 1 for group in groups]) for s in scenes]
    assert float(norm) == pytest.approx(math.hypot(*expected), rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e25),
        (torch.float32, 1e-25),
        (torch.float64, 1e150),
        (torch.float64, 1e-150),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-30),
        (torch.float16, 1e4),
        (torch.float16, 1e-7),
    ],
    ids=str,
)
def test_squares_neither_overflow_nor_vanish(operations, device, dtype, size):
    scene = Scene([(1000,), (17,)], dtype, device, size=size)
    scene.begin_climb()
    norm = operations.grad_norm([scene.table], [ClimbOptions(0.05, False, False)])
    expected = oracle.norm(scene.originals, scene.grads, [False, False])
    assert expected > 20 * size or dtype == torch.float16  # the input is what the test says
    assert float(norm) == pytest.approx(expected, rel=1e-12, abs=0)


@every_dtype
def test_the_norm_leaves_out_who_does_not_climb(operations, device, dtype):
    scene = Scene([(5,), (6,), (7,)], dtype, device, groups=[0, 1, 0])
    scene.give_grads(absent=[2])
    scene.begin_climb(perturb=[True, False])
    norm = operations.grad_norm([scene.table], [ClimbOptions(0.05, False, False)] * 2)
    assert float(norm) == pytest.approx(float(scene.grads[0].double().norm()), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("at", [0, 1023, 1040], ids=["first", "inside", "last"])
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@every_dtype
def test_one_bad_gradient_makes_the_norm_bad(operations, device, dtype, adaptive, at, bad):
    scene = Scene([(33,), (1041,), (0,)], dtype, device)
    with torch.no_grad():
        scene.params[1][at] = 0.0  # 0 * inf must not hide it
        scene.grads[1][at] = bad
    scene.begin_climb()
    assert not operations.grad_norm([scene.table], [ClimbOptions(0.05, adaptive, False)]).isfinite()


# ---- the climb ----


@every_offset
@every_climb
@every_dtype
@every_shape
def test_perturb(operations, device, shapes, dtype, climb, offset):
    scene = Scene(shapes, dtype, device, offset)
    scene.begin_climb()
    norm = oracle.norm(scene.originals, scene.grads, [climb.adaptive] * len(shapes))
    rho = 0.05 * norm  # each weight moves by about a twentieth of itself
    operations.perturb_(scene.table, norm_of(norm, device), [climb._replace(rho=rho)])
    expected = [
        oracle.climbed(w, g, norm, rho, climb.adaptive, climb.maximize)
        for w, g in zip(scene.originals, scene.grads, strict=True)
    ]
    assert_same_bits(scene.backups, scene.originals, "backups")
    assert_within(scene.params, expected, scene.originals, "weights")
    scene.assert_surroundings()


@every_dtype
def test_groups_climb_each_their_way(operations, device, dtype):
    rho = torch.tensor(2.0, dtype=torch.float64)
    options = [ClimbOptions(1.5, False, False), ClimbOptions(rho, True, True), ClimbOptions(0.0, False, False)]
    scene = Scene([(40,), (41,), (0,), (42,), (43,)], dtype, device, groups=[0, 1, 1, 2, 3])
    scene.begin_climb(perturb=[True, True, True, False])
    operations.perturb_(scene.table, norm_of(10.0, device), [*options, ClimbOptions(9.0, False, False)])
    w, g = scene.originals, scene.grads
    expected = [oracle.climbed(w[0], g[0], 10.0, 1.5), oracle.climbed(w[1], g[1], 10.0, 2.0, True, True)]
    assert_within(scene.params[:2], expected, w[:2])
    assert_same_bits(scene.params[2:], w[2:], "who has rho = 0, or does not climb")
    assert_same_bits(scene.backups, w[:4], "backups")
    scene.assert_surroundings()


@every_dtype
def test_a_zero_gradient_moves_nothing(operations, device, dtype):
    scene = Scene([(100,)], dtype, device, size=0.0)
    scene.begin_climb()
    norm = operations.grad_norm([scene.table], [CLIMBS["sam"]])
    operations.perturb_(scene.table, norm, [CLIMBS["sam"]])
    assert float(norm) == 0.0
    assert_same_bits(scene.params, scene.originals)


@pytest.mark.parametrize("norm", [math.nan, math.inf], ids=str)
@every_climb
@every_dtype
def test_a_bad_norm_leaves_the_weights_alone(operations, device, dtype, climb, norm):
    scene = Scene([(2000,), ()], dtype, device)
    special(scene.params[0])
    scene.originals = [p.clone() for p in scene.params]
    scene.grads[0][::3] = math.nan
    scene.grads[0][1::3] = math.inf
    scene.kept_grads = [g.clone() for g in scene.grads]
    scene.begin_climb()
    operations.perturb_(scene.table, norm_of(norm, device), [climb])
    assert_same_bits(scene.params, scene.originals, "weights")
    assert_same_bits(scene.backups, scene.originals, "backups")
    scene.assert_surroundings()


# ---- the way back ----


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


@every_offset
@every_dtype
@pytest.mark.parametrize("way", ["restore", "found_inf", "no gradient"])
def test_restore_returns_every_bit(operations, device, dtype, offset, way):
    scene = Scene([(CHUNK + 9,), (), (0,)], dtype, device, offset)
    special(scene.params[0])
    scene.originals = [p.clone() for p in scene.params]
    scene.begin_climb()
    operations.perturb_(scene.table, norm_of(1.0, device), [ClimbOptions(3.0, False, False)])
    addresses = [p.data_ptr() for p in scene.params]
    for param in scene.params:
        param.fill_(math.nan)
    if way == "restore":
        operations.restore_(scene.table)
    elif way == "found_inf":
        operations.restore_and_sgd_(scene.table, [UPDATES["sgd"]], None, scalar(1.0, device))
    else:
        for param in scene.params:
            param.grad = None
        scene.grads = scene.kept_grads = []
        scene.table.read_grads()
        operations.restore_and_sgd_(scene.table, [UPDATES["sgd"]], None, None)
    assert_same_bits(scene.params, scene.originals, "weights")
    assert [p.data_ptr() for p in scene.params] == addresses
    scene.assert_surroundings()


def test_restore_touches_only_who_climbed(operations, device):
    scene = Scene([(40,), (41,), (42,)], torch.float32, device, groups=[0, 1, 0])
    scene.give_grads(absent=[2])
    scene.begin_climb(perturb=[True, False])
    operations.perturb_(scene.table, norm_of(1.0, device), [ClimbOptions(1.0, False, False)] * 2)
    assert not torch.equal(scene.params[0], scene.originals[0])
    assert_same_bits(scene.params[1:], scene.originals[1:])
    for param in scene.params:
        param.fill_(5.0)
    operations.restore_(scene.table)
    assert_same_bits(scene.params[0], scene.originals[0])
    assert all(bool((p == 5.0).all()) for p in scene.params[1:])


# ---- the update ----


@every_offset
@every_update
@every_dtype
@every_shape
def test_update(operations, device, shapes, dtype, options, offset):
    scene = Scene(shapes, dtype, device, offset)
    scene.begin_climb()
    operations.perturb_(scene.table, norm_of(1.0, device), [ClimbOptions(1.0, False, False)])
    for param in scene.params:
        param.fill_(math.nan)  # an update that does not start from the backup shows
    scene.give_grads(seed=1000)
    steps = [(0, 1, 300)[i % 3] for i in range(len(shapes))]
    scene.give_state(options, steps)
    before, _ = scene.state()
    update(operations, scene, [options])
    assert_updated(scene, [options], before, steps)


def assert_updated(scene, options, before, steps, grad_scale=1.0):
    after, step_counts = scene.state()
    for i, (w, g, step) in enumerate(zip(scene.originals, scene.grads, steps, strict=True)):
        group = options[scene.groups[i]]
        if g is None:
            assert_same_bits(scene.params[i], w, f"weights of {i}")
            continue
        old = [slot[i] for slot in before]
        expected, moments = expected_update(group, w, g.double() / grad_scale, old, step)
        assert_within(scene.params[i], expected, w, f"weights of {i}")
        for new, moment, start in zip([slot[i] for slot in after], moments, old, strict=True):
            assert (new is None) == (moment is None)
            if new is not None:
                assert_within(new, moment, start, f"state of {i}")
        if state_names(group).step:
            assert step_counts[i] == step + 1
    scene.assert_surroundings()


@every_update
@every_dtype
def test_groups_update_each_their_way(operations, device, dtype, options):
    other = options._replace(lr=0.003, weight_decay=0.02, maximize=not options.maximize)
    scene = Scene([(50,), (0,), (51,), ()], dtype, device, groups=[0, 1, 1, 0])
    scene.begin_climb()
    operations.perturb_(scene.table, norm_of(1.0, device), [ClimbOptions(1.0, False, False)] * 2)
    steps = [4, 5, 0, 6]
    scene.give_state(options, steps)
    before, _ = scene.state()
    update(operations, scene, [options, other])
    assert_updated(scene, [options, other], before, steps)


@pytest.mark.parametrize("found_inf", [None, 0.0], ids=["no-scaler", "no-overflow"])
@every_update
@every_dtype
def test_every_mix_of_gradient_and_climb(operations, device, dtype, options, found_inf):
    """Climbed and updated; climbed without a second gradient; updated without a climb; neither."""
    scene = Scene([(2000,), (45,), (46,), (47,), (48,)], dtype, device, groups=[0, 0, 1, 1, 0])
    scene.give_grads(absent=[4])
    scene.begin_climb(perturb=[True, False])
    operations.perturb_(scene.table, norm_of(1.0, device), [ClimbOptions(1.0, False, False)] * 2)
    for i in (0, 1):
        scene.params[i].fill_(math.nan)
    scene.give_grads(seed=7, absent=[1, 3])
    steps = [3, 4, 5, 6, 7]
    scene.give_state(options, steps)
    before, counts_before = scene.state()
    update(operations, scene, [options] * 2, None, None if found_inf is None else scalar(found_inf, device))
    assert_updated(scene, [options] * 2, before, steps)
    after, counts = scene.state()
    for i in (1, 3):
        assert_same_bits([slot[i] for slot in after], [slot[i] for slot in before], f"state of {i}")
        assert counts[i] == counts_before[i]


@every_update
@every_dtype
def test_an_overflow_changes_nothing(operations, device, dtype, options):
    """Neither on a first step nor on a later one, and the step after it is what it would have been."""
    scene = Scene([(1500,), (), (0,), (33,)], dtype, device)
    steps = [0, 0, 3, 3]
    for attempt in range(2):
        scene.give_grads(size=math.inf)
        scene.begin_climb()
        operations.perturb_(scene.table, norm_of(math.inf, device), [ClimbOptions(1.0, False, False)])
        if attempt == 0:
            scene.give_state(options, steps)
        before = scene.state()
        update(operations, scene, [options], scalar(1024.0, device), scalar(1.0, device))
        assert_same_bits(scene.params, scene.originals, "weights")
        assert_same_bits(list(scene.state()), list(before), "state")
        scene.assert_surroundings()
    scene.give_grads(seed=5)
    before, _ = scene.state()
    update(operations, scene, [options], None, scalar(0.0, device))
    assert_updated(scene, [options], before, steps)


@pytest.mark.parametrize("scale", [1024.0, 3.0], ids=str)
@every_update
@every_dtype
def test_gradients_are_divided_by_grad_scale(operations, device, dtype, options, scale):
    scene = Scene([(1500,), ()], dtype, device)
    scene.begin_climb()
    operations.perturb_(scene.table, norm_of(1.0, device), [ClimbOptions(1.0, False, False)])
    scene.give_grads(size=scale)
    scene.give_state(options, [2, 0])
    before, _ = scene.state()
    update(operations, scene, [options], scalar(scale, device), scalar(0.0, device))
    assert_updated(scene, [options], before, [2, 0], grad_scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_adams_bias_corrections_are_computed_in_double(operations, device, dtype):
    """With betas so close to 1, 1 - beta ** t has no more than two or three correct digits in float32."""
    options = AdamOptions(1.0, 0.99999, 0.9999999, 1e-8, 0.0, False, False, False)
    scene = Scene([(100,)], dtype, device)
    scene.begin_climb()
    operations.perturb_(scene.table, norm_of(1.0, device), [ClimbOptions(0.0, False, False)])
    scene.give_state(options, [3])
    before, _ = scene.state()
    update(operations, scene, [options])
    assert_updated(scene, [options], before, [3])


# ---- the whole ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_real_chunks(operations, device, dtype):
    """The boundaries of the chunks that the backend really uses, and enough of them for several threads."""
    size = getattr(operations, "CHUNK_SIZE", 65536)
    assert_whole_step(operations, Scene([(size - 1,), (0,), (size,), (size + 1,), (2 * size + 5,)], dtype, device))


def test_tables_too_large_for_the_cache(operations, backend, device):
    """Large tables may be written by other instructions; here with tails and starts that suit none of them."""
    size = 100_000 if triton_interpreter.runs(backend, device) else (16 << 20) // 4
    assert_whole_step(operations, Scene([(size + 3,), (1021,)], torch.float32, device, offset=1))


def assert_whole_step(operations, scene):
    """All operations in the order of a step."""
    scene.begin_climb()
    norm = operations.grad_norm([scene.table], [CLIMBS["sam"]])
    assert float(norm) == pytest.approx(math.hypot(*(float(g.double().norm()) for g in scene.grads)), rel=1e-9)
    rho = 0.05 * float(norm)
    operations.perturb_(scene.table, norm, [ClimbOptions(rho, False, False)])
    expected = [oracle.climbed(w, g, float(norm), rho) for w, g in zip(scene.originals, scene.grads, strict=True)]
    assert_same_bits(scene.backups, scene.originals, "backups")
    assert_within(scene.params, expected, scene.originals, "climbed")
    operations.restore_(scene.table)
    assert_same_bits(scene.params, scene.originals, "restored")
    for param in scene.params:
        param.fill_(math.nan)
    options = UPDATES["sgd-nesterov"]
    steps = [1] * len(scene.params)
    scene.give_state(options, steps)
    before, _ = scene.state()
    update(operations, scene, [options])
    assert_updated(scene, [options], before, steps)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_dtype
def test_the_same_bits_every_time(operations, device, dtype, threads):
    """Also with another number of threads."""
    options = UPDATES["adamw-amsgrad"]

    size = getattr(operations, "CHUNK_SIZE", 65536)

    def run():
        scene = Scene([(2 * size + 77,), (3,), (size,)], dtype, device)
        scene.begin_climb()
        norm = operations.grad_norm([scene.table], [CLIMBS["asam"]]).clone()
        operations.perturb_(scene.table, norm, [ClimbOptions(20.0, True, False)])
        climbed = [p.clone() for p in scene.params]
        scene.give_state(options, [0, 1, 9])
        update(operations, scene, [options])
        return [norm], climbed, scene.params, *scene.state()[0]

    results = []
    for count in (1, 2, 2):
        threads(count)
        results.append(run())
    for other in results[1:]:
        assert_same_bits(list(results[0]), list(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_arithmetic_is_rounded_once(operations, device, dtype):
    """A climb and an update, each of a step that is lost if intermediate results are rounded to ``dtype``.

    In bfloat16, 1 + 2^-9 is 1. Here each term alone is that small, and only their sum shows.
    """
    tiny = torch.finfo(dtype).eps / 4
    scene = Scene([(64,)], dtype, device)
    with torch.no_grad():
        scene.params[0].fill_(1.0)
        scene.grads[0].fill_(-1.0)
    scene.originals = [p.clone() for p in scene.params]
    scene.kept_grads = [g.clone() for g in scene.grads]
    scene.begin_climb()
    operations.perturb_(scene.table, norm_of(1.0, device), [ClimbOptions(0.0, False, False)])
    # Decay and gradient: 1 - 3 * tiny + 8 * tiny.
    options = SGDOptions(tiny, 0.0, 0.0, -3.0, False, False)
    update(operations, scene, [options])
    expected, _ = oracle.sgd(scene.originals[0], scene.grads[0], None, lr=tiny, weight_decay=-3.0)
    assert float(expected[0]) == 1 + 4 * tiny
    assert_same_bits(scene.params[0], expected.to(dtype))
