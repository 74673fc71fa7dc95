"""What only a GPU can show. One file, the most important first: a GPU may be at hand for minutes.

Of every backend with kernels for it: waiting, graphs, streams, devices, sizes.
"""

import math
import re

import gpu_steps
import pytest
import torch
from checks import DTYPE_IDS, DTYPES, assert_same_bits, assert_within, values
from expected import assert_whole_step
from scene import Scene

from fastsam import FastSAM, methods, schedules
from fastsam.backends import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize("device", ["cuda"], indirect=True),
    pytest.mark.parametrize("backend", ["native", "triton"], indirect=True),
]


def make_training(backend, base=torch.optim.SGD, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8)).to("cuda", dtype)
    x, y = (torch.randn(32, size, device="cuda").to(dtype) for size in (16, 8))
    optimizer = FastSAM(model.parameters(), base, backend=backend, **options)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    return model, optimizer, closure


BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "capturable": True}),
}
every_base = pytest.mark.parametrize(("base", "options"), BASES.values(), ids=BASES)


# Beside a base's options.
PRECISIONS = {
    "float32": {},
    "stochastic": {"dtype": torch.bfloat16, "rounding": "stochastic"},
    "masters": {"dtype": torch.bfloat16, "master_weights": True},
    "stochastic-masters": {"dtype": torch.bfloat16, "rounding": "stochastic", "master_weights": True},
}
every_precision = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)


@pytest.fixture
def no_sync(backend):
    """Any wait for the device raises, from when the fixture's value is called on."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@every_precision
@every_base
def test_a_step_does_not_wait_for_the_device(backend, no_sync, base, options, precision):
    lr = torch.tensor(options["lr"], device="cuda")
    _, optimizer, closure = make_training(backend, base, **{**options, **precision, "lr": lr})
    optimizer.step(closure)
    no_sync()
    for _ in range(3):
        optimizer.step(closure)


# LESAM with a schedule is that of the capture in each replay.
METHODS = gpu_steps.METHODS | {"lesam": methods.LESAM(0.05)}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
# Others perturb by a sign, or by whether an element is beyond a quantile, where a rounding decides.
STEADY = {name: method for name, method in METHODS.items() if name not in ("sam-inf", "zsharp")}


@every_method
def test_no_method_waits_for_the_device(backend, no_sync, method):
    tensors = {"lr": torch.tensor(0.1, device="cuda"), "rho": torch.tensor(0.05, device="cuda")}
    _, optimizer, closure = make_training(backend, method=method, momentum=0.9, **tensors)
    for _ in range(2):
        optimizer.step(closure)
    no_sync()
    for _ in range(4):
        optimizer.step(closure)


def run_captured(backend, options, kinds):
    """Weights after eager steps, and after as many replays of a graph for each kind of step."""
    results = []
    for is_captured in (False, True):
        model, optimizer, closure = make_training(backend, **options)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2 * kinds):
                optimizer.step(closure)
        torch.cuda.current_stream().wait_stream(stream)
        graphs = [torch.cuda.CUDAGraph() for _ in range(kinds)] if is_captured else []
        for graph in graphs:
            with torch.cuda.graph(graph):
                optimizer.step(closure)
        for _ in range(3):
            for kind in range(kinds):
                if is_captured:
                    graphs[kind].replay()
                else:
                    optimizer.step(closure)
        torch.cuda.synchronize()
        results.append([p.detach().clone() for p in model.parameters()])
    return results


@every_method
def test_every_method_is_captured(backend, method):
    """Each kind of step (with an ascent, without) in a graph of its own."""
    kinds = method.k if isinstance(method, methods.LookSAM) else 1
    eager, replayed = run_captured(backend, {"lr": 0.1, "momentum": 0.9, "method": method}, kinds)
    assert_same_bits(replayed, eager)


def test_a_step_without_an_ascent_is_captured(backend):
    eager, replayed = run_captured(backend, {"lr": 0.1, "momentum": 0.9, "interval": 2}, 2)
    assert_same_bits(replayed, eager)


def test_an_adaptive_schedule_is_captured_as_two_graphs(backend):
    """As in docs/backends.md; the decisions are those of eager steps, and so are the weights."""

    def run(is_captured):
        schedule = schedules.AESAM(30)
        model, optimizer, closure = make_training(backend, lr=0.1, momentum=0.9, schedule=schedule)
        kinds, seen, graphs = [], set(), {}
        for _ in range(30):
            ascends = optimizer.ascends_next
            kinds.append(ascends)
            if not is_captured or ascends not in seen:
                optimizer.step(closure)
                seen.add(ascends)
                continue
            if ascends not in graphs:
                graphs[ascends] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[ascends]):
                    optimizer.step(closure)
            graphs[ascends].replay()
        torch.cuda.synchronize()
        return kinds, [p.detach().clone() for p in model.parameters()]

    (eager_kinds, eager), (kinds, replayed) = run(False), run(True)
    assert set(eager_kinds) == {True, False}
    assert kinds == eager_kinds
    assert_same_bits(replayed, eager)


@pytest.mark.parametrize("precision", ["float32", "stochastic", "masters"])
@pytest.mark.parametrize("method", STEADY.values(), ids=STEADY)
def test_methods_agree_with_reference(backend, method, precision):
    """Over some steps, where rounding is a small part of the weights."""

    def run(name):
        model, optimizer, closure = make_training(name, method=method, lr=0.1, momentum=0.9, **PRECISIONS[precision])
        for _ in range(4):
            optimizer.step(closure)
        return [p.detach().double() for p in model.parameters()]

    close = 2e-5 if precision == "float32" else 0.02
    for one, other in zip(run(backend), run("reference"), strict=True):
        torch.testing.assert_close(one, other, rtol=close, atol=close)


# Kernels by name. Triton uploads the addresses of new gradients.
KERNELS = {
    "native": (["grad_norm_kernel", "perturb_kernel", "restore_and_update_kernel"], 0),
    "triton": (["grad_norm_kernel", "perturb_kernel", "restore_and_update_kernel"], 1),
}


def test_the_device_sees_three_kernels(backend):
    _, optimizer, closure = make_training(backend, lr=0.1, momentum=0.9)
    optimizer.step(closure)
    closure()
    with torch.profiler.profile() as profile:
        optimizer.first_step(zero_grad=False)
        optimizer.second_step()
        torch.cuda.synchronize()
    on_the_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    seen = [event.name for event in on_the_device if not event.is_user_annotation]
    copies = [name for name in seen if name.startswith("Mem")]
    kernels, most_copies = KERNELS[backend]
    assert [re.search(r"\w+_kernel", name)[0] for name in seen if name not in copies] == kernels
    # Both phases have the same gradients here, but not those of the step before.
    assert copies in ([], ["Memcpy HtoD (Pinned -> Device)"])
    assert len(copies) <= most_copies


@every_precision
@every_base
def test_a_captured_step_replays_as_it_would_have_run(backend, base, options, precision):
    """Over 10 steps, bit for bit, with lr and rho changed on the way through their tensors; random numbers, too."""

    def schedule(optimizer, step):
        optimizer.param_groups[0]["lr"].fill_(options["lr"] / (1 + step))
        optimizer.param_groups[0]["rho"].fill_(0.05 * (1 + step))

    def start():
        tensors = {"lr": torch.tensor(options["lr"], device="cuda"), "rho": torch.tensor(0.05, device="cuda")}
        model, optimizer, closure = make_training(backend, base, **{**options, **precision, **tensors})
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                optimizer.step(closure)
        torch.cuda.current_stream().wait_stream(stream)
        return model, optimizer, closure

    eager_model, eager, eager_closure = start()
    for step in range(10):
        schedule(eager, step)
        eager.step(eager_closure)
    model, optimizer, closure = start()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step(closure)
    for step in range(10):
        schedule(optimizer, step)
        graph.replay()
    torch.cuda.synchronize()
    assert_same_bits([*model.parameters()], [*eager_model.parameters()])


@pytest.mark.parametrize("seen", ["perturbation", "update"])
def test_every_replay_draws_numbers_of_its_own(backend, seen):
    """From the same weights and gradients: the steps are counted on the device."""
    weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16, device="cuda"))
    perturbed = torch.empty_like(weight)
    # Both the perturbation and the update are by 2**-10: an eighth of the spacing above 1, a quarter of that below.
    grad = torch.full_like(weight, 2.0**-10)
    optimizer = FastSAM([weight], lr=1.0, rho=2.0**-4, backend=backend, rounding="stochastic")
    weight.grad = grad

    def step():
        optimizer.first_step(zero_grad=False)
        perturbed.copy_(weight.detach())
        optimizer.second_step()

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    results = []
    for _ in range(3):
        with torch.no_grad():
            weight.fill_(1)
        graph.replay()
        results.append({"perturbation": perturbed, "update": weight.detach()}[seen].clone())
    assert all(len(result.unique()) == 2 for result in results)
    assert not any(torch.equal(results[i], results[i - 1]) for i in range(3))


def test_eager_steps_do_not_disturb_a_graph(backend):
    """A replay after an eager step, whose gradients lie elsewhere, uses the addresses that it was captured with."""
    model, optimizer, closure = make_training(backend, lr=0.1)
    optimizer.step(closure)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step(closure)
    graph.replay()
    ballast = [torch.randn(64, 16, device="cuda") for _ in range(5)]
    optimizer.step(closure)
    graph.replay()
    other, reference, other_closure = make_training(backend, lr=0.1)
    for _ in range(4):
        reference.step(other_closure)
    torch.cuda.synchronize()
    assert ballast
    assert_same_bits([*model.parameters()], [*other.parameters()])


def test_a_capture_without_a_step_before_it_is_refused(backend):
    _, optimizer, closure = make_training(backend, lr=0.1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        closure()
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="run a step outside the capture first"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step(closure)


@every_base
def test_a_step_on_a_side_stream(backend, base, options):
    results = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        model, optimizer, closure = make_training(backend, base, **options)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(5):
                optimizer.step(closure)
        torch.cuda.current_stream().wait_stream(stream)
        results.append([p.detach().clone() for p in model.parameters()])
    assert_same_bits(*results)


@every_base
def test_a_rerun_has_the_same_bits(backend, base, options):
    """Of chunks that finish in any order."""
    results = []
    for _ in range(3):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(size, device="cuda")) for size in (3_000_001, 70_000, 5)]
        optimizer = FastSAM(weights, base, backend=backend, **options)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.first_step(zero_grad=False)
            optimizer.second_step()
        results.append([w.detach() for w in weights])
    assert_same_bits(results[1:], [results[0]] * 2)


def test_uploads_wait_for_those_in_flight(backend):
    """Steps queue up behind a busy device, each with gradients at other addresses."""
    results = []
    for is_busy in (False, True):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(1000, device="cuda"))
        optimizer = FastSAM([weight], lr=0.1, backend=backend)
        grads = [torch.randn_like(weight) for _ in range(40)]
        torch.cuda.synchronize()
        for grad in grads:
            if is_busy:
                torch.cuda._sleep(10_000_000)
            else:
                torch.cuda.synchronize()
            weight.grad = grad
            optimizer.first_step(zero_grad=False)
            optimizer.second_step()
        results.append(weight.detach())
    assert_same_bits(*results)


def test_two_devices_have_one_norm_and_a_bucket_each(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    weights = [torch.nn.Parameter(torch.ones(1000, device=f"cuda:{i}")) for i in range(2)]
    optimizer = FastSAM(weights, lr=0.1, rho=1.0, backend=backend)
    for weight in weights:
        weight.grad = torch.full_like(weight, 2.0)
    optimizer.first_step()
    for weight in weights:
        assert torch.allclose(weight.detach().cpu(), torch.full((1000,), 1 + 1 / math.sqrt(2000)), rtol=1e-6)


def test_optimizers_on_two_streams_do_not_meet(backend):
    """Each has memory of its own for its norm and its counts."""

    def train(streams):
        trainings = [make_training(backend, torch.optim.AdamW, lr=0.01 * (i + 1)) for i in range(2)]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        for _ in range(20):
            for stream, (_, optimizer, closure) in zip(streams, trainings, strict=True):
                with torch.cuda.stream(stream):
                    optimizer.step(closure)
        torch.cuda.synchronize()
        return [[*model.parameters()] for model, *_ in trainings]

    alone = train([torch.cuda.current_stream()] * 2)
    together = train([torch.cuda.Stream(), torch.cuda.Stream()])
    assert_same_bits(together, alone)


def test_tables_are_kept_until_the_stream_that_used_them_is_done(backend):
    """Dropped while another stream's kernels wait to read them, their memory must not be handed out again."""
    _, optimizer, closure = make_training(backend, lr=0.1)
    copies, expected, again = make_training(backend, lr=0.1)
    optimizer.step(closure)
    expected.step(again)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        torch.cuda._sleep(200_000_000)
        optimizer.step(closure)
        optimizer._engine.tables.drop()
    for _ in range(20):  # would overwrite what was let go of
        torch.full((1 << 20,), -1, dtype=torch.int64, device="cuda")
        torch.full((64,), -1, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    expected.step(again)
    assert_same_bits(list(optimizer.param_groups[0]["params"]), list(copies.parameters()), "parameters")


@pytest.mark.parametrize("count", [481, 4065])
def test_thousands_of_tensors(backend, device, count):
    """More than one launch's arguments hold, where gradients travel in them; with empty ones at the boundary."""
    shapes = [(1 + i % 3,) for i in range(count)]
    for i in (0, 479, 480, 4063, 4064):
        if i < count:
            shapes[i] = (0,)
    assert_whole_step(load(backend, "cuda"), Scene(shapes, torch.float32, device))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_training_step(backend, compiler):
    """Closure and all: what FastSAM does is left out of the graphs."""

    def train(wrap):
        torch.manual_seed(0)
        model, optimizer, _ = make_training(backend, lr=0.1, momentum=0.9)
        x = torch.randn(32, 16, device="cuda")

        def step():
            def closure():
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            return optimizer.step(closure)

        run = wrap(step)
        losses = [run().detach() for _ in range(4)]
        return torch.stack(losses)

    torch._dynamo.reset()
    eager, compiled = train(lambda step: step), train(lambda step: torch.compile(step, backend=compiler))
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
    assert compiled[-1] < compiled[0]


def test_tables_of_two_dtypes_have_one_norm(backend):
    """And numbers of tensors that differ."""
    params = [torch.nn.Parameter(torch.ones(3, device="cuda")) for _ in range(5)]
    params += [torch.nn.Parameter(torch.ones(2, device="cuda", dtype=torch.bfloat16)) for _ in range(8)]
    optimizer = FastSAM(params, lr=0.5, rho=math.sqrt(31), backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.first_step(zero_grad=False)
    assert all(bool((param.detach() == 2).all()) for param in params)
    optimizer.second_step()
    assert all(bool((param.detach() == 0.5).all()) for param in params)


@pytest.mark.slow
def test_more_elements_than_32_bits_count(backend, device):
    size = 2**31 + 9
    if torch.cuda.get_device_properties(device).total_memory < 40 << 30:
        pytest.skip("a GPU with less than 40 GiB")
    weight = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device=device))
    weight.grad = torch.ones_like(weight)
    optimizer = FastSAM([weight], lr=0.5, rho=math.sqrt(size), backend=backend)
    optimizer.first_step(zero_grad=False)
    assert bool((weight.detach() == 2).all()), "every element is perturbed by 1"
    optimizer.restore()
    assert bool((weight.detach() == 1).all())
    optimizer.first_step(zero_grad=False)
    optimizer.second_step()
    assert bool((weight.detach() == 0.5).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@every_base
def test_agrees_with_reference_over_a_step(backend, device, base, options, dtype):
    """And so with every other backend: within the design's tolerance after the perturbation and the update."""

    def run(name):
        params = [
            torch.nn.Parameter(values(shape, dtype, device, i)) for i, shape in enumerate([(70000,), (33, 7), ()])
        ]
        start = [p.detach().clone() for p in params]
        optimizer = FastSAM(params, base, rho=2.0, backend=name, **options)
        results = []
        for seed in (100, 200):
            for i, param in enumerate(params):
                param.grad = values(param.shape, dtype, device, seed + i)
            optimizer.first_step(zero_grad=False)
            results.append([p.detach().clone() for p in params])
            optimizer.restore()
            if seed == 100:
                assert_same_bits([p.detach() for p in params], start)
        optimizer.first_step(zero_grad=False)
        optimizer.second_step()
        return start, *results, [p.detach().clone() for p in params]

    start, *expected = run("reference")
    _, *found = run(backend)
    for stage, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_within(one, other, start, f"stage {stage}")
