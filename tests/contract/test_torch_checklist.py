"""What torch checks of each of its own optimizers (its test_optim.py) and no other file here does, for every base."""

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
import triton_interpreter
from checks import as_real, assert_same_bits, values
from internals import FUSED_CLASSES
from problem import Matrices, Problem, assert_same_state, state_of
from torch import nn
from torch_options import OPTIONS, TWO_RATES, WRONG

from fastsam import FastSAM

pytestmark = pytest.mark.face

CASES = [(getattr(torch.optim, name), options) for name, several in OPTIONS.items() for options in several]


def _name(value):
    if isinstance(value, type):
        return value.__name__
    return "-".join(f"{name}={setting}" for name, setting in value.items()) or "defaults"


every_case = pytest.mark.parametrize(("base", "options"), CASES, ids=_name)
every_class = pytest.mark.parametrize("base", [getattr(torch.optim, name) for name in OPTIONS], ids=_name)


def problem_for(base, device):
    return (Matrices if base.__name__ == "Muon" else Problem)(device)


def make_base(base, params, options):
    """The base alone; of the fused ones torch's for-loop, whose bits they are."""
    return base(params, **copy.deepcopy(options), **({"foreach": False} if base in FUSED_CLASSES else {}))


# Prints the options that torch tests each of its classes with. In a process of its own: torch's test utilities change
# settings as they are imported, and want a package that they are not used with here.
ASK_TORCH = """
import sys, types
sys.modules["expecttest"] = types.SimpleNamespace(TestCase=object, assert_expected_inline=None)
from torch.testing._internal.common_optimizers import optim_db
for info in optim_db:
    for case in info.optim_inputs_func("cpu"):
        print(info.name, sorted(case.kwargs.items()), sep="\t")
"""


@pytest.mark.slow
@pytest.mark.thorough  # torch takes ten seconds to list them
def test_options_are_all_of_torchs():
    answer = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True)
    if answer.returncode != 0:
        pytest.skip(f"this torch has no list to compare with: {answer.stderr.splitlines()[-1]}")
    theirs = {tuple(line.split("\t")) for line in answer.stdout.splitlines()}
    mine = {(name, str(sorted(options.items()))) for name, several in OPTIONS.items() for options in several}
    assert len(theirs) > 50
    assert {(name, options) for name, options in theirs - mine if name in OPTIONS} == set()


@every_case
def test_every_option_as_in_base(backend, device, base, options):
    mine, theirs = (problem_for(base, device) for _ in range(2))
    if options.get("capturable"):
        options = {**options, "capturable": device.type != "cpu"}
    optimizer = FastSAM(mine.params, base, rho=torch.tensor(0.0), backend=backend, **copy.deepcopy(options))
    alone = make_base(base, theirs.params, options)
    start = mine.weights()
    for _ in range(3):
        mine.step(optimizer)
        theirs.plain_step(alone)
    assert not torch.equal(mine.weights()[0], start[0])
    if base in FUSED_CLASSES:
        torch.testing.assert_close(mine.weights(), theirs.weights(), rtol=1e-5, atol=1e-6)
    else:
        assert_same_bits(mine.weights(), theirs.weights())
        assert_same_state(state_of(optimizer), state_of(alone))


@every_class
def test_loss_falls_with_scheduler_and_groups(backend, device, base):
    """torch's test_forloop_goes_right_direction and test_param_group_with_lrscheduler_goes_right_direction."""
    problem = problem_for(base, device)
    weights, biases = problem.params[::2], problem.params[1::2]  # of Muon's, which has none, the second layer
    rate = {"SGD": 0.05, "ASGD": 0.05, "Rprop": 0.01}.get(base.__name__, 0.02)
    groups = [{"params": weights}, {"params": biases, "lr": rate / 2, "rho": 0.01}]
    optimizer = FastSAM(groups, base, rho=0.02, lr=rate, backend=backend)
    schedulers = [
        torch.optim.lr_scheduler.StepLR(optimizer, gamma=0.9, step_size=10),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    ]
    before = problem.loss().item()
    for _ in range(30):
        loss = problem.step(optimizer)
        schedulers[0].step()
        schedulers[1].step(loss)
    assert problem.loss().item() < 0.9 * before


ALL_WRONG = [
    (getattr(torch.optim, name), *wrong)
    for name in OPTIONS
    for wrong in [*WRONG[name], (TWO_RATES, "Tensor lr must be 1-element")]
]


@pytest.mark.parametrize(
    ("base", "options", "message"),
    ALL_WRONG,
    ids=lambda value: None if isinstance(value, str) else _name(value),
)
def test_options_that_base_refuses(base, options, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        base([nn.Parameter(torch.ones(2, 2))], **options)
    with pytest.raises((ValueError, RuntimeError), match=message):
        FastSAM([nn.Parameter(torch.ones(2, 2))], base, **options)


def test_names_for_all_parameters_or_for_none():
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for mixed in ([("one", params[0]), params[1]], [{"params": [("one", params[0])]}, {"params": [params[1]]}]):
        with pytest.raises(ValueError, match="all optimizer param"):
            FastSAM(mixed)


@every_class
def test_zero_gradients_move_nothing(backend, device, base):
    """Without weight decay, as in torch's test_step_is_noop_for_zero_grads."""
    param = nn.Parameter(torch.randn(5, 1, device=device))
    quiet = {"AdamW": {"weight_decay": 0.0}, "Muon": {"weight_decay": 0.0}, "ASGD": {"lambd": 0.0}}
    quiet = quiet.get(base.__name__, {})
    optimizer = FastSAM([param], base, lr=0.001, backend=backend, **quiet)
    start = param.detach().clone()

    def closure():
        param.grad = torch.zeros_like(param)

    optimizer.step(closure)
    torch.testing.assert_close(param.detach(), start, rtol=0, atol=0)
    assert not optimizer.perturbed


def assert_both_go_on(mine, optimizer, theirs, alone, saved):
    """From one checkpoint of the base alone, FastSAM and the base take the same step."""
    mine.model.load_state_dict(theirs.model.state_dict())
    optimizer.load_state_dict(saved)
    alone.load_state_dict(saved)
    mine.step(optimizer)
    theirs.plain_step(alone)
    torch.testing.assert_close(mine.weights(), theirs.weights(), rtol=1e-5, atol=1e-6)


@every_class
def test_step_counts_may_be_numbers(backend, device, base):
    """Checkpoints of torch before 1.12 have ``step`` as a number: torch's test_load_nontensor_step."""
    mine, theirs = (problem_for(base, device) for _ in range(2))
    optimizer = FastSAM(mine.params, base, rho=torch.tensor(0.0), backend=backend)
    alone = make_base(base, theirs.params, {})
    for _ in range(2):
        theirs.plain_step(alone)
    saved = copy.deepcopy(alone.state_dict())
    for entries in saved["state"].values():
        if "step" in entries:
            entries["step"] = entries["step"].item()
    assert_both_go_on(mine, optimizer, theirs, alone, saved)


@every_class
def test_groups_of_older_checkpoints_lack_newer_options(backend, device, base):
    """torch's test_can_load_older_state_dict: what classes have learnt since gets its default."""
    mine, theirs = (problem_for(base, device) for _ in range(2))
    optimizer = FastSAM(mine.params, base, rho=torch.tensor(0.0), backend=backend)
    alone = make_base(base, theirs.params, {})
    theirs.plain_step(alone)
    saved = copy.deepcopy(alone.state_dict())
    newer = ("foreach", "maximize", "amsgrad", "fused", "capturable", "differentiable", "decoupled_weight_decay")
    if base is torch.optim.Adafactor:  # it has always had the option, and adds it to nothing
        newer = tuple(name for name in newer if name != "maximize")
    for group in saved["param_groups"]:
        for name in newer:
            group.pop(name, None)
    assert_both_go_on(mine, optimizer, theirs, alone, saved)


@every_class
def test_state_dict_is_repeatable(backend, device, base):
    problem = problem_for(base, device)
    optimizer = FastSAM(problem.params, base, backend=backend)
    problem.step(optimizer)
    one, other = optimizer.state_dict(), optimizer.state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert_same_state(one["state"], other["state"])
    # A state dict's tensors are the optimizer's own, as torch's are; but not step counts, which would go on counting in
    # what DCP has gathered.
    problem.step(optimizer)
    assert_same_state(*map(without_steps, (one["state"], state_of(optimizer))))


def without_steps(state):
    return {key: {name: value for name, value in mine.items() if name != "step"} for key, mine in state.items()}


@every_class
def test_deepcopy_has_every_public_attribute(backend, device, base):
    problem = problem_for(base, device)
    optimizer = FastSAM(problem.params, base, backend=backend)
    problem.step(optimizer)
    other = copy.deepcopy(optimizer)
    assert {name for name in dir(other) if not name.startswith("_")} == {
        name for name in dir(optimizer) if not name.startswith("_")
    }
    assert other.defaults == {**optimizer.defaults, "differentiable": False}  # torch adds it to every copy
    assert repr(other) == repr(optimizer)


# Where a base's own state or step refuses complex numbers.
REAL_ONLY = ("Adafactor", "Muon")


@pytest.mark.parametrize(("base", "options"), [case for case in CASES if _name(case[0]) not in REAL_ONLY], ids=_name)
def test_complex_parameters_are_pairs_of_reals(backend, device, base, options):
    """torch's test_complex: real parameters beside them."""
    if options.get("capturable"):
        options = {**options, "capturable": device.type != "cpu"}
    numbers = [values((10, 5), torch.complex64, device), values((10, 5), torch.float32, device, 1)]
    complex_params = [nn.Parameter(number.clone()) for number in numbers]
    real_params = [nn.Parameter(as_real(number).clone()) for number in numbers]
    one, two = (FastSAM(p, base, backend=backend, **copy.deepcopy(options)) for p in (complex_params, real_params))
    for step in range(triton_interpreter.fewer(3, 2, backend, device)):
        for phase in ("first_step", "second_step"):
            for i, (z, pair) in enumerate(zip(complex_params, real_params, strict=True)):
                z.grad = values(z.shape, z.dtype, device, 10 * step + 2 * i + (phase == "second_step"))
                pair.grad = as_real(z.grad).clone()
            getattr(one, phase)()
            getattr(two, phase)()
            trained, expected = [as_real(z.detach()) for z in complex_params], [p.detach() for p in real_params]
            if base in FUSED_CLASSES:
                assert_same_bits(trained, expected, phase)
            else:  # torch's complex arithmetic rounds its own way
                torch.testing.assert_close(trained, expected)
    if base in FUSED_CLASSES:
        for z, pair in zip(complex_params, real_params, strict=True):
            assert one.state[z].keys() == two.state[pair].keys()
            for name, value in two.state[pair].items():
                assert one.state[z][name].is_complex() == (z.is_complex() and value.dim() > 0)
                assert_same_bits(as_real(one.state[z][name]), value, name)


@pytest.mark.parametrize("name", REAL_ONLY)
def test_base_that_refuses_complex_numbers_leaves_weights(backend, device, name):
    param = nn.Parameter(values((5, 4), torch.complex64, device))
    optimizer = FastSAM([param], getattr(torch.optim, name), rho=0.5, backend=backend)
    start = param.detach().clone()

    def closure():
        param.grad = torch.ones_like(param)

    with pytest.raises(RuntimeError, match=f"{name} does not support complex parameters"):
        optimizer.step(closure)
    assert not optimizer.perturbed
    assert_same_bits(param.detach(), start)


@every_class
def test_no_parameter_needs_gradient(backend, device, base):
    """torch's test_step_is_noop_when_params_have_no_grad."""
    params = [torch.randn(2, 3, device=device) for _ in range(2)]
    start = [p.clone() for p in params]
    optimizer = FastSAM(params, base, backend=backend)
    assert optimizer.step(lambda: torch.tensor(1.0)) == 1
    assert_same_bits(params, start)
    assert not optimizer.perturbed


class Strided(Problem):
    """Parameters with gaps in memory, as torch's test_forloop_goes_right_direction has them; matrices all of them."""

    def __init__(self, device):
        super().__init__(device)
        weights = [torch.randn(6, 4, 2, device=device)[..., 0], torch.randn(3, 6, 2, device=device)[..., 0]]
        self.weights_with_gaps = [nn.Parameter(w) for w in weights]

    @property
    def params(self):
        return self.weights_with_gaps

    def loss(self):
        first, last = self.params
        return ((self.x @ first.t()).tanh() @ last.t() - self.y).square().mean()


@every_case
def test_parameters_with_gaps_go_in_right_direction(backend, device, base, options):
    if options.get("capturable"):
        options = {**options, "capturable": device.type != "cpu"}
    problem = Strided(device)
    optimizer = FastSAM(problem.params, base, rho=0.02, backend=backend, **copy.deepcopy(options))
    assert not any(p.is_contiguous() for p in problem.params)
    before = problem.loss().item()
    for _ in range(triton_interpreter.fewer(10, 4, backend, device)):
        problem.step(optimizer)
    after = problem.loss().item()
    assert after > before if options.get("maximize") else after < before


@every_class
def test_group_of_its_own_weight_decay_and_one_of_no_rate(backend, device, base):
    """torch's test_param_groups_weight_decay and test_param_groups_lr."""
    problem = problem_for(base, device)
    still = nn.Parameter(torch.randn(2, 2, device=device))
    start = still.detach().clone()
    rest = {"step_sizes": (0, 50)} if base.__name__ == "Rprop" else {}
    groups = [{"params": problem.params[:1]}, {"params": problem.params[1:]}, {"params": [still], "lr": 1e-28}]
    if "weight_decay" in base(problem.params).defaults:
        groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.01, 0.0
    optimizer = FastSAM(groups, base, rho=0.02, lr=0.01, backend=backend, **rest)
    before = problem.loss().item()
    for _ in range(triton_interpreter.fewer(10, 4, backend, device)):

        def closure():
            loss = problem.closure(optimizer)()
            still.grad = torch.rand_like(still)
            return loss

        optimizer.step(closure)
    assert problem.loss().item() < before
    torch.testing.assert_close(still.detach(), start, rtol=0, atol=1e-25)


@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop], ids=_name)
def test_torchs_default_dtype_changes_nothing(backend, device, base, default):
    """torch's test_set_default_dtype_works_with_foreach."""
    one, two = Problem(device), Problem(device)
    options = {"lr": 0.0625, "weight_decay": 0.125}
    usual, other = (FastSAM(p.params, base, backend=backend, **options) for p in (one, two))
    for _ in range(3):
        one.step(usual)
        closure = two.closure(other)
        torch.set_default_dtype(default)
        try:
            other.step(closure)
        finally:
            torch.set_default_dtype(torch.float32)
        assert_same_bits(two.weights(), one.weights())


@pytest.mark.parametrize("use", ["closure", "given up", "loaded", "scheduled"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop], ids=_name)
def test_optimizer_is_freed_without_garbage_collection(backend, device, base, use):
    """torch's test_no_cyclic_references: the memory does not wait for the garbage collector."""
    problem = Problem(device)
    optimizer = FastSAM(problem.params, base, model=problem.model, backend=backend)
    problem.step(optimizer)
    if use == "given up":
        problem.first_step(optimizer)
        optimizer.restore()
    elif use == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    elif use == "scheduled":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        problem.step(optimizer)
        scheduler.step()
        del scheduler
        gc.collect()  # torch's schedulers are in a ring with what they wrap
    reference = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert reference() is None
    finally:
        gc.enable()


def test_profile_names_step(backend, device):
    """torch's test_profile_hook; other tools look for the name, too."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        problem.step(optimizer)
        problem.two_phase(optimizer)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["Optimizer.step#FastSAM.step"] == 2
    assert not any("SGD.step" in key for key in counts)
