"""``python -m fastsam demo``: its data, its training, its loss profiles, its table, its picture, its errors."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from registry import by_default

from fastsam import FastSAM, demo
from fastsam import __main__ as command_line
from fastsam.demo.averaging import WeightAverage
from fastsam.demo.data import TRAIN_SIZE, load_noisy_digits
from fastsam.demo.methods import AVERAGED, FAMILY, LEARNING_RATES, METHODS, MIXED, chosen, rows
from fastsam.demo.mixup import mix, plain
from fastsam.demo.model import make_cnn
from fastsam.demo.options import FAMILY_NAMES, Options
from fastsam.demo.plot import draw, line_styles
from fastsam.demo.report import results_table, sweep_table
from fastsam.demo.train import Run, train_model

for extra in demo.EXTRAS:
    pytest.importorskip(extra)

SGD, LONGER_SGD, FASTSAM = METHODS
TINY = Options(seeds=1, epochs=2, batch_size=100)


@pytest.fixture(autouse=True)
def _one_thread():
    with demo.one_thread():
        yield


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def train_quietly(method, options=TINY, seed=0):
    return train_model(method, load_noisy_digits(options.noise, seed), seed, options, lambda *_: None)


# ---- data ----


@pytest.mark.parametrize("noise", [0.0, 0.4, 0.333, 1.0])
def test_noise_hits_exactly_its_share_and_never_keeps_label(noise):
    data = load_noisy_digits(noise, seed=0)
    assert data.mislabelled.sum() == round(noise * TRAIN_SIZE)
    assert data.train_labels.min() >= 0
    assert data.train_labels.max() <= 9


def test_wrong_labels_are_evenly_spread_over_nine_others():
    data = load_noisy_digits(1.0, seed=0)
    shifts = (data.train_labels - data.true_train_labels) % 10
    counts = torch.bincount(shifts, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 0.6 * TRAIN_SIZE / 9


def test_splits_are_disjoint_and_complete():
    from sklearn.datasets import load_digits

    data = load_noisy_digits(0.4, seed=3)
    digits = load_digits()
    split = torch.cat([data.train_images, data.test_images]).flatten(1) * 16
    labels = torch.cat([data.true_train_labels, data.test_labels])
    rows = sorted(map(tuple, torch.cat([split, labels[:, None]], dim=1).int().tolist()))
    assert rows == sorted(
        (*map(int, image), int(label)) for image, label in zip(digits.data, digits.target, strict=True)
    )
    assert len(data.train_images) == TRAIN_SIZE


def test_seed_decides_data():
    assert same(load_noisy_digits(0.4, seed=1), load_noisy_digits(0.4, seed=1))
    assert not same(load_noisy_digits(0.4, seed=1), load_noisy_digits(0.4, seed=2))


def test_noise_leaves_split_alone():
    clean, noisy = load_noisy_digits(0.0, seed=1), load_noisy_digits(0.4, seed=1)
    assert torch.equal(clean.train_images, noisy.train_images)
    assert torch.equal(clean.test_labels, noisy.test_labels)


# ---- training ----


def test_model_leaves_global_random_state_alone():
    before = torch.get_rng_state()
    first, second = make_cnn(0), make_cnn(0)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("method", [SGD, FASTSAM], ids=lambda method: method.name)
def test_seed_decides_every_bit(method):
    options = dataclasses.replace(TINY, epochs=1)
    first, second = train_quietly(method, options), train_quietly(method, options)
    states = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert first.test_accuracy == second.test_accuracy
    other = train_quietly(method, options, seed=1).model.state_dict()
    assert not all(torch.equal(states[0][name], other[name]) for name in other)


def test_methods_differ_in_optimizer_alone():
    sgd = train_quietly(SGD, dataclasses.replace(TINY, lr=0.01))
    flat = train_quietly(FASTSAM, dataclasses.replace(TINY, lr=0.01, rho=0.0, backend="reference"))
    for a, b in zip(sgd.model.parameters(), flat.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)  # torch's SGD rounds in another order; chaos does the rest


def test_fastsam_takes_options():
    options = dataclasses.replace(TINY, rho=0.123, backend="foreach")
    optimizer = FASTSAM.make_optimizer(make_cnn(0), 0.01, options)
    assert isinstance(optimizer, FastSAM)
    assert optimizer.param_groups[0]["rho"] == 0.123
    assert optimizer.backend == "foreach"


def test_epochs_passes_and_progress():
    calls = []
    data = load_noisy_digits(0.4, 0)
    for method in METHODS:
        calls.clear()
        run = train_model(method, data, 0, TINY, lambda *call: calls.append(call))
        assert len(run.test_accuracy) == TINY.epochs * method.epochs_factor
        assert len(calls) == 9 * len(run.test_accuracy)
        assert {passes for passes, _, _ in calls} == {method.passes}
        assert calls[0][2] is None
        assert calls[-1][2] == run.test_accuracy[-2]
        assert 0 < run.optimizer_ms < run.step_ms
    assert LONGER_SGD.epochs_factor == FASTSAM.passes == 2  # the same number of gradients


def test_methods_learning_rates_are_in_sweep():
    assert {method.lr for method in METHODS} <= set(LEARNING_RATES)
    assert all(min(LEARNING_RATES) <= method.lr < max(LEARNING_RATES) for method in METHODS)


# ---- the command ----


def test_command_prints_table_and_draws_png(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "RADII", demo.RADII[::3])
    picture = tmp_path / "demo.png"
    assert command_line.main(["demo", "--quick", "--batch-size", "450", "--output", str(picture)]) == 0
    printed = capsys.readouterr()
    for method in METHODS:
        (line,) = (line for line in printed.out.splitlines() if line.startswith(f"{method.name}  "))
        assert "%" in line
        assert f"{method.lr:g}" in line
        assert method.name in printed.err  # the progress bar
    assert "loss=" in printed.err
    assert "accuracy=" in printed.err
    assert str(picture) in printed.out
    assert max(map(len, printed.out.splitlines())) <= 100 + len(str(picture))

    from matplotlib import image

    pixels = image.imread(picture)
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 1000
    assert pixels.std() > 0.05  # something is drawn


def test_sweep_trains_every_method_at_every_rate(monkeypatch, tmp_path, capsys):
    torch.set_num_threads(2)
    monkeypatch.setattr(demo, "LEARNING_RATES", (0.001, 0.1))
    monkeypatch.chdir(tmp_path)
    assert command_line.main(["demo", "--sweep", "--quick", "--batch-size", "450"]) == 0
    printed = capsys.readouterr().out
    assert "lr 0.001" in printed
    assert "lr 0.1" in printed
    assert all(method.name in printed for method in METHODS)
    assert not list(tmp_path.iterdir())
    assert torch.get_num_threads() == 2  # the demo's one thread is for the demo


def test_sweep_of_one_method_at_given_rates(capsys):
    assert command_line.main(["demo", "--sweep", "0.02", "--quick", "--batch-size", "450", "--method", "late"]) == 0
    *_, heading, _, line = capsys.readouterr().out.splitlines()
    assert heading.split() == ["method", "lr", "0.02"]
    assert line.startswith("SAM, last quarter")


def test_tables():
    run = Run(model=make_cnn(0), test_accuracy=[50.0, 90.0], wrong_labels_learned=12.0, step_ms=4.0, optimizer_ms=1.0)
    better = dataclasses.replace(run, test_accuracy=[60.0, 92.0], wrong_labels_learned=14.0)
    *_, line = results_table({FASTSAM: [run, better]}, Options(seeds=2)).splitlines()
    assert line.split() == ["FastSAM", f"{FASTSAM.lr:g}", "60", "91.0", "(90.0-92.0)", "13", "4.00", "25%"]
    unlearnable = dataclasses.replace(run, wrong_labels_learned=math.nan)
    assert "nan" not in results_table({SGD: [unlearnable]}, Options(noise=0.0))
    *_, line = sweep_table({SGD: {0.1: 80.0, 0.2: 90.0, 0.3: 85.0}}).splitlines()
    assert line.split() == ["SGD", "80.0", "90.0*", "85.0"]


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--noise", "1.5", "in [0, 1], got '1.5'"),
        ("--noise", "much", "in [0, 1], got 'much'"),
        ("--rho", "-0.1", ">= 0, got '-0.1'"),
        ("--rho", "nan", ">= 0, got 'nan'"),
        ("--seeds", "0", ">= 1, got '0'"),
        ("--epochs", "2.5", ">= 1, got '2.5'"),
        ("--batch-size", "-1", ">= 1, got '-1'"),
        ("--lr", "0", "> 0, got '0'"),
        ("--device", "abacus", "'abacus' cannot be used here"),
        ("--device", "meta", "'meta' cannot be used here"),
        ("--backend", "warp", "'warp'"),
        ("--output", "demo.jpg", "must end in .png, got 'demo.jpg'"),
        ("--output", "nowhere/demo.png", "the folder 'nowhere' does not exist"),
    ],
)
def test_invalid_options_name_themselves_and_their_value(option, value, reason, capsys):
    with pytest.raises(SystemExit) as exit_:
        command_line.main(["demo", f"{option}={value}"])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert f"argument {option}: " in message
    assert reason in message


def test_backend_that_cannot_run_gives_its_reason(monkeypatch, capsys):
    from fastsam.backends import BackendUnavailable
    from fastsam.demo import options

    def resolve(name, device_type):
        raise BackendUnavailable("needs a full moon")

    monkeypatch.setattr(options, "resolve", resolve)
    with pytest.raises(SystemExit) as exit_:
        command_line.main(["demo", "--backend=native"])
    assert exit_.value.code == 2
    assert "argument --backend: 'native' cannot run on 'cpu': needs a full moon" in capsys.readouterr().err


@pytest.mark.parametrize("extra", demo.EXTRAS)
def test_missing_extras_are_named_in_one_line(extra, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == extra else find_spec(name))
    assert command_line.main(["demo"]) == 1
    message = capsys.readouterr().err
    assert message == f"the demo also needs: pip install {demo.EXTRAS[extra]}\n"


def test_importing_command_line_needs_no_extras():
    package = Path(demo.__file__).parent
    for module in ("__init__", "data", "methods", "model", "options", "report", "train"):
        lines = (package / f"{module}.py").read_text().splitlines()
        assert not any(line.startswith(("import", "from")) and extra in line for line in lines for extra in demo.EXTRAS)


def test_whole_family_can_be_compared(tmp_path):
    assert tuple(FAMILY) == FAMILY_NAMES
    assert chosen("sam") == METHODS
    assert chosen("all") == (*METHODS, *FAMILY.values())
    (*usual, added) = chosen("looksam")
    assert tuple(usual) == METHODS
    assert (added.name, added.passes, added.profiled) == ("LookSAM", 1.2, True)


@pytest.mark.parametrize("name", by_default(FAMILY_NAMES, FAMILY_NAMES[::4]))
def test_member_of_family_trains(name):
    options = Options(seeds=1, epochs=1, batch_size=300)
    (split,) = [load_noisy_digits(0.4, 0, torch.device("cpu"))]
    runs = demo.train_all([FAMILY[name]], [split], options)[FAMILY[name]]
    assert runs[0].test_accuracy[-1] > 5


# ---- mixtures, averaged weights ----


def test_mixtures():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6)
    mixture = mix(images, labels, 1.0, generator)
    assert 0 < mixture.share < 1
    assert mixture.others.sort().values.tolist() == labels.tolist()
    expected = mixture.share * images + (1 - mixture.share) * images[mixture.others]
    torch.testing.assert_close(mixture.images, expected)
    model = make_cnn(0).eval()
    soft = mixture.share * torch.eye(10)[labels] + (1 - mixture.share) * torch.eye(10)[mixture.others]
    torch.testing.assert_close(mixture.loss(model), torch.nn.functional.cross_entropy(model(expected), soft))
    unmixed = plain(images, labels)
    assert unmixed.images is images
    torch.testing.assert_close(unmixed.loss(model), torch.nn.functional.cross_entropy(model(images), labels))
    assert [len(part.labels) for part in mixture.split(4)] == [4, 2]
    shares = [mix(images, labels, 0.2, generator).share for _ in range(300)]
    assert sum(shares) / 300 == pytest.approx(0.5, abs=0.08)
    assert sum(0.1 < share < 0.9 for share in shares) < 150, "Beta(0.2, 0.2) is near 0 or 1"


def test_both_passes_see_one_mixture():
    seen = []

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_cnn(0)

        def forward(self, images):
            seen.append(images)
            return self.net(images)

    model = Watched()
    optimizer = FastSAM(model.parameters(), rho=0.1, lr=0.1)
    mixture = mix(torch.rand(4, 1, 8, 8), torch.arange(4), 1.0, torch.Generator().manual_seed(0))
    from fastsam.demo import train

    data = load_noisy_digits(0.4, 0)
    train._step(MIXED[1], model, optimizer, mixture, data, train._Stopwatch(torch.device("cpu")))
    first, second = seen
    assert first is second


def test_rows():
    assert rows(Options()) == METHODS
    assert rows(Options(mixup=0.2, swa=True)) == (*METHODS, *MIXED, *AVERAGED)
    assert [method.name for method in MIXED] == ["SGD + Mixup", "FastSAM + Mixup"]


@pytest.mark.parametrize("method", [MIXED[1], AVERAGED[1]], ids=lambda method: method.name)
def test_added_rows_train(method):
    run = train_quietly(method, dataclasses.replace(TINY, epochs=4, mixup=0.2))
    assert len(run.test_accuracy) == 4
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_average_is_of_the_last_epochs():
    data, model = load_noisy_digits(0.4, 0), make_cnn(0)
    optimizer = FastSAM(model.parameters(), rho=0.1, lr=0.1)
    average = WeightAverage(model, optimizer, 8, data, 100)
    taken = []
    for epoch in range(8):
        with torch.no_grad():
            model[0].weight.fill_(float(epoch))
        solution = average.after_epoch(epoch)
        taken.append(solution is not model)
    assert taken == [False] * 6 + [True] * 2
    assert solution[0].weight.unique().tolist() == [6.5]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_network_without_batch_norm():
    model = make_cnn(0, batch_norm=False)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert model[0].bias is not None


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("options", [Options(), Options(method="all", mixup=0.2, swa=True)], ids=["few", "all"])
def test_picture_shows_all_curves_and_all_of_its_legend(options, epochs, tmp_path):
    def run(last):
        curve = [10.0 + (last - 10) * (epoch + 1) / epochs for epoch in range(epochs)]
        return Run(make_cnn(0), test_accuracy=curve, wrong_labels_learned=0.0, step_ms=1.0, optimizer_ms=1.0)

    results = {method: [run(30.0 + 2 * i)] for i, method in enumerate(rows(options))}
    profiles = {SGD: [[1.0, 0.5, 1.0]], FASTSAM: [[0.9, 0.5, 0.9]]}
    options = dataclasses.replace(options, output=tmp_path / "demo.png")
    figure = draw(results, profiles, [-1.0, 0.0, 1.0], options)
    frame = figure.bbox.padded(1)  # of rounding, in pixels
    for axes in figure.axes:
        box = axes.get_legend().get_window_extent()
        assert frame.containsx(box.x0)
        assert frame.containsx(box.x1)
        assert frame.containsy(box.y0)
        assert frame.containsy(box.y1)
        assert axes.bbox.height > 0.6 * figure.bbox.height
        assert axes.bbox.width > 0.25 * figure.bbox.width
        lines = axes.get_lines()
        assert len(axes.get_legend().get_texts()) == len(lines)
        for line in lines:
            assert axes.get_ylim()[0] < line.get_ydata()[-1] < axes.get_ylim()[1]
            assert len(line.get_ydata()) > 1 or line.get_marker() == "o"
    assert len(figure.axes[0].get_lines()) == len(results)


def test_each_of_all_methods_has_a_line_of_its_own():
    styles = line_styles(rows(Options(method="all", mixup=0.2, swa=True)))
    assert len({tuple(style.values()) for style in styles.values()}) == len(styles) > 20
