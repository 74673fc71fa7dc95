"""What the benchmarks make of figures: records, verdicts, tables, plots, the README."""

# ruff: noqa: E402 - benchmarks/ is a package that is not installed: it has to be put in place before it is imported.

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from checkout import ROOT, import_benchmarks
from child import run_python

import_benchmarks()

from benchmarks import docs, environment, report
from benchmarks.device import Device
from benchmarks.implementations import COMPILED, FUSED_BASE, LISTS, LISTS_ON_HOST, LOOP, PEER
from benchmarks.measure import DEVICE, HOST, STEP, Timing
from benchmarks.operations import BACKENDS, UPDATE
from benchmarks.plan import plan
from benchmarks.records import (
    CHANGING_LR,
    IN_A_GRAPH,
    LOCAL,
    NEW_GRADIENTS,
    OPTIMIZER,
    SHARDED,
    SHARDED_BASE,
    STATIC,
    WATCH,
    HostTime,
    MethodCosts,
    OptimizerPart,
    RankCosts,
    Record,
    Results,
    TrainingStep,
)
from benchmarks.session import Session
from benchmarks.targets import Verdict, verdicts
from benchmarks.training import FASTSAM, FASTSAM_IN_A_GRAPH, HALF_BATCH, HALF_BATCH_IN_A_GRAPH, of_method

# ---- figures, made up ----

CPU = {"cpu": "Some CPU", "threads": 2, "torch": "2.13.0", "date": "2026-11-21-120000", "commit": "abc1234"}
GPU = {**CPU, "gpu": "NVIDIA Some GPU", "driver": "1.2", "triton": "3.6"}
MILLISECONDS = {LOOP: 200.0, PEER: 210.0, LISTS: 60.0, LISTS_ON_HOST: 50.0, "foreach": 100.0, "triton": 20.0}
MILLISECONDS |= {"native": 10.0, FUSED_BASE: 5.0}


def timing(milliseconds: float) -> Timing:
    return Timing(milliseconds, 0.9 * milliseconds, 1.2 * milliseconds, 0.8 * milliseconds)


def part(model: str = "Llama 1B", base: str = "SGD", *, gpu: bool = True, **changed: float) -> OptimizerPart:
    """10^8 parameters; a copy of 4 TB/s; a step's device time is 95% of that from idle to idle."""
    times = {}
    for name, ms in {**MILLISECONDS, **changed}.items():
        clocks = {HOST: timing(0.1), DEVICE: timing(0.095 * ms)} if gpu else {}
        own = {"grad_norm": 0.1, "perturb_": 0.4, UPDATE: 0.5, "restore_": 0.2} if name in BACKENDS else {}
        times[name] = {STEP: timing(ms), **clocks, **{operation: timing(ms * x) for operation, x in own.items()}}
    floor = {name: 20 if name == FUSED_BASE else 40 for name in times}
    return OptimizerPart(
        model=model,
        base=base,
        parameters=10**8,
        tensors=146,
        rounds=7,
        times=times,
        skipped={COMPILED: "because"},
        copy_gb_s=4000.0,
        bytes_per_parameter=floor,
        page_faults={} if gpu else dict.fromkeys(times, 1234),
    )


def training_step(model: str = "WRN-28-10", **changed: float) -> TrainingStep:
    names = {"SGD": 100.0, LOOP: 230.0, FASTSAM: 201.0, HALF_BATCH: 156.0, f"SGD {IN_A_GRAPH}": 80.0}
    names |= {FASTSAM_IN_A_GRAPH: 161.0, HALF_BATCH_IN_A_GRAPH: 125.0, **changed}
    times = {name: {STEP: timing(ms), OPTIMIZER: timing(0.1 * ms)} for name, ms in names.items()}
    sized = {"parameters": 1000, "tensors": 10, "rounds": 7, "batch": 128}
    return TrainingStep(model=model, base="SGD", times=times, **sized)


def host(native: float = 0.07, *, copies: float = 1.001, stubbed: bool = False) -> HostTime:
    times = {
        name: {STATIC: timing(ms), NEW_GRADIENTS: timing(ms), CHANGING_LR: timing(ms + 0.004)}
        for name, ms in {FUSED_BASE: 0.15, "native": native, "triton": 0.11}.items()
    }
    times[WATCH] = {STATIC: timing(0.001), NEW_GRADIENTS: timing(0.002)}
    extra = {} if stubbed else {"native": copies}
    launches = {} if stubbed else {name: {"kernel": 3} for name in times if name != WATCH}
    sized = {"model": "ResNet-50", "parameters": 25_557_032, "tensors": 161}
    return HostTime(**sized, base="SGD", times=times, stubbed=stubbed, launches=launches, extra_copies=extra)


def ranks(sharded: float) -> RankCosts:
    times = {name: {STEP: timing(ms)} for name, ms in {LOCAL: 200.0, SHARDED: sharded, SHARDED_BASE: 130.0}.items()}
    return RankCosts(model="ResNet-50", parameters=25_557_032, tensors=161, base="AdamW", ranks=2, times=times)


def costs() -> MethodCosts:
    times = {name: {STEP: timing(ms)} for name, ms in {"SAM()": 20.0, "GSAM()": 30.0, "AMP()": 22.0}.items()}
    sized = {"parameters": 2**24, "tensors": 62, "rounds": 9, "copy_gb_s": 26.8435}
    floor = {"SAM()": 40.0, "GSAM()": 52.0, "AMP()": 40.0}
    return MethodCosts(model="ResNet-18", base="SGD", times=times, bytes_per_parameter=floor, **sized)


def results(*records: Record, gpu: bool = True) -> Results:
    return Results(dict(GPU if gpu else CPU), [*records], ["GPT-2 small: there was no time left"])


def test_figures_follow_from_the_timings() -> None:
    one = part()
    assert one.gb_s("native") == pytest.approx(40 * 10**8 / 0.95e-3 / 1e9)
    assert one.share_of_copy("native") == pytest.approx(1 / 0.95)
    assert one.faster("native", LOOP) == pytest.approx(20)
    assert one.best_plain == LISTS_ON_HOST
    assert one.faster("native", one.best_plain) == pytest.approx(5)
    assert one.faster("native", "not measured") is None
    assert one.ratio("native", FUSED_BASE) == pytest.approx(2)
    assert one.operation_share_of_copy("native", "perturb_") == pytest.approx(16e8 / 4e-3 / 4e12)
    assert part(gpu=False).device("native") == part().step("native")
    assert costs().sam_steps("GSAM()") == pytest.approx(1.5)
    assert training_step().base_steps(FASTSAM) == pytest.approx(2.01)


def test_results_come_back_from_json_and_from_lines(tmp_path: Path) -> None:
    records = [part(), costs(), training_step(), host(), ranks(220.0)]
    path = report.write_json(results(*records), tmp_path)
    assert path.name == "nvidia-some-gpu_2026-11-21-120000_abc1234.json"
    assert Results.read(path) == results(*records)
    assert str(tmp_path) not in path.read_text()
    written = json.loads(path.read_text())
    assert written["records"][0]["figures"]["native"]["times_faster_than_loop"] == pytest.approx(20)
    assert environment.file_name(CPU) == "some-cpu_2-threads_2026-11-21-120000_abc1234"

    lines = tmp_path / "measure.jsonl"
    with lines.open("w") as file:
        run = Results(dict(GPU), lines=lambda line: file.write(line + "\n") and None)
        for record in records:
            run.add(record)
        run.leave_out("x: why")
        file.write('{"outcome": {}}\n{"record": {"mod')  # a run that was cut off
    found = Results.read(lines)
    assert (found.environment, found.records, found.not_measured) == (GPU, records, ["x: why"])


def judged(*records: Record, gpu: bool = True) -> dict[str, bool | None]:
    return {verdict.what: verdict.reached for verdict in verdicts(results(*records, gpu=gpu))}


def test_verdicts_on_a_gpu() -> None:
    models = ("ResNet-50", "Llama 1B", "2,000 x 256")
    good = judged(
        *(part(model, **{LOOP: 400.0}) for model in models), host(), training_step(**{HALF_BATCH_IN_A_GRAPH: 123.0})
    )
    mine = {what: reached for what, reached in good.items() if "triton" not in what}
    missing = {what for what, reached in mine.items() if reached is None}
    assert missing == {"native: share of the copy, AdamW, from 86M parameters up"}
    assert {reached for what, reached in mine.items() if what not in missing} == {True}
    slow = {"native": 41.0, "triton": 41.0}
    worse = {FASTSAM: 203.0, FASTSAM_IN_A_GRAPH: 163.0}
    bad = judged(*(part(model, **slow) for model in models), host(0.2, copies=1.1), training_step(**worse))
    assert {what for what, reached in bad.items() if reached} == {
        f"ResNet-50, SGD, 161 tensors: {what}"
        for what in (
            "triton, host time",
            "native, host time of a changing lr",
            "triton, host time of a changing lr",
            WATCH,
        )
    }
    assert [what for what, reached in bad.items() if reached is None and "AdamW" not in what] == [
        "triton: extra memory, copies of the parameters"
    ]
    assert set(judged().values()) == {None}


def test_verdicts_on_the_cpu() -> None:
    speed = judged(part("2,000 x 256", gpu=False), part("4 x 4096^2", gpu=False, native=60.0), gpu=False)
    assert [what for what, reached in speed.items() if not reached] == [
        "2,000 x 256, SGD: native, fused base steps",
        "4 x 4096^2, SGD: native, faster than the loop",
        "4 x 4096^2, SGD: native, fused base steps",
    ]
    assert judged(part(PEER, gpu=False, **{PEER: 260.0}), gpu=False) == {}
    peer = judged(part("ResNet-50", gpu=False, **{PEER: 260.0}), gpu=False)
    assert peer[f"ResNet-50, SGD: the loop in units of {PEER}"] is False
    assert judged(costs(), gpu=False) == {"ResNet-18, SGD: AMP() in units of SAM()": False}
    training = training_step("CNN", **{HALF_BATCH: 159.0, of_method("LookSAM()"): 124.0})
    assert set(judged(training, gpu=False).values()) == {True}
    for milliseconds, reached in ((220.0, True), (240.0, False)):
        assert list(judged(ranks(milliseconds), gpu=False).values()) == [reached]
    host_times = judged(host(0.09, stubbed=True), gpu=False)
    assert list(host_times.values()) == [False, True, True, True, False, True]
    assert str(Verdict("x", ">= 2x", "1x", False)) == "NOT REACHED  x: 1x, wanted >= 2x"


def test_the_report_has_everything() -> None:
    text = report.lines(results(part(), part(gpu=False), costs(), training_step(), host()))
    cells = [line.split() for line in text]
    row = ["native", "10.0", "3.00", "0.100", "0.950", "0.285", "4,210.5", "105%", "20.00x", "5.00x", "2.00"]
    assert row in cells
    assert ["native", "10.0", "3.00", "8.00", "400.0", "10%", "20.00x", "5.00x", "2.00", "1,234"] in cells
    assert ["GSAM()", "30.0", "9.00", "1.50", "52.0", "1.30", "29.1", "108%"] in cells
    assert ["FastSAM", "201", "60.3", "2.010", "20.1", "10.0%"] in cells
    assert ["native", "70", "(21)", "70", "(21)", "74", "(22)", "3", "1.0010"] in cells
    assert "not measured: compiled lists (because)" in text
    assert "GPT-2 small: there was no time left" in text
    operations_rows = [line for line in cells if line[:4] == ["Llama", "1B,", "SGD", "native"]]
    assert operations_rows[0][4:] == ["1.00", "10%", "4.00", "10%", "2.00", "10%", "5.00", "10%"]


def test_what_must_run_and_did_not_fails_the_case() -> None:
    said: list[str] = []
    session = Session(Device(), results(), said.append, dry=False, seconds=0.0)
    session.add(part(), needed={"native", FUSED_BASE})
    with pytest.raises(pytest.fail.Exception, match="Llama 1B, SGD: compiled lists: because"):
        session.add(part(), needed={COMPILED})
    assert len(session.results.records) == 2, "what was measured stays"
    assert any(line.startswith("native") for line in said)


def test_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plot import draw

    draw(results(part(), part(gpu=False), gpu=False), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


# ---- pytest benchmarks/ ----


def benchmarks(*options: str, status: int = 0, **variables: str) -> str:
    arguments = ["-p", "no:cacheprovider", "-p", "no:xdist", str(ROOT / "benchmarks"), *options]
    program = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    done = run_python(program, *arguments, folder=ROOT, environment=variables)
    assert done.returncode == status, done.stdout
    return done.stdout


def test_without_the_flag_everything_is_skipped_with_the_reason() -> None:
    text = benchmarks("-rs", "--device", "cpu")
    assert "a benchmark: pytest benchmarks/ --benchmark" in text
    assert f"{len(list(plan('cpu')))} skipped" in text
    assert "passed" not in text


def test_findings_are_written_as_they_come_and_what_comes_too_late_is_named(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    options = [
        "--benchmark",
        "--dry",
        "--threads",
        "1",
        "-k",
        "tinyCNN",
        "--lines",
        str(lines),
        "--results",
        str(tmp_path),
    ]
    text = benchmarks(*options, FASTSAM_COMMIT="abc")
    assert [record.name for record in Results.read(lines).records] == ["tiny CNN, SGD, batch 2"]
    assert len(list(tmp_path.glob("*_abc.json"))) == 1
    assert text.index("tiny CNN, SGD, batch 2:") < text.index("FastSAM's benchmarks")
    benchmarks(*options, "--until", str(time.time()))
    assert Results.read(lines).not_measured == ["test_training_step[tinyCNN]: there was no time left"]


# ---- what the README says ----


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(f"before\n{docs.BEGIN}\nold\n{docs.END}\nafter\n")
    for folder in ("docs", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def test_this_readme_is_what_the_results_make_it() -> None:
    if not (ROOT / "README.md").exists():
        pytest.skip("the tests run without the checkout")
    assert docs.differences(ROOT) == []


def test_the_readme_follows_the_newest_results(checkout: Path) -> None:
    pytest.importorskip("matplotlib")
    assert docs.differences(checkout) == ["README.md's GPU table"]
    docs.write(checkout)
    assert (checkout / "README.md").read_text() == f"before\n{docs.BEGIN}\n{docs.NONE_YET}\n{docs.END}\nafter\n"
    assert docs.differences(checkout) == []
    folder = checkout / "benchmarks" / "results"
    (folder / "some-cpu.json").write_text(json.dumps({"environment": CPU}))
    for gpu, date in (("NVIDIA Some GPU", "2026-11-21"), ("Another (GPU)", "2026-11-20")):
        one = results(part("ResNet-50"), part("ResNet-50", "AdamW", gpu=True))
        one.environment |= {"gpu": gpu, "date": date}
        docs.take_over(report.write_json(one, checkout), folder)
    assert docs.differences(checkout) == ["README.md's GPU table", "docs/gpu.png"]
    docs.write(checkout)
    assert docs.differences(checkout) == []
    text = (checkout / "README.md").read_text()
    assert "[results](benchmarks/results/nvidia-some-gpu_2026-11-21_abc1234.json)" in text
    assert "| ResNet-50, SGD | 200 | 50.0 | 10.0 | 20.00 | 5.00 | 105% |" in text
    assert (checkout / docs.PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("gpu", [False, True], ids=["no GPU", "no figures"])
def test_results_without_a_gpu_or_figures_are_not_taken_over(tmp_path: Path, gpu: bool) -> None:
    path = report.write_json(results(*([] if gpu else [part()]), gpu=gpu), tmp_path)
    with pytest.raises(SystemExit, match="no measurements of a GPU"):
        docs.take_over(path, tmp_path)


def test_a_readme_without_markers_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    with pytest.raises(SystemExit, match="has no <!-- GPU table"):
        docs.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == "nothing"
