"""What ``pytest benchmarks/ --benchmark`` runs; each test measures one case of the plan (plan.py)."""

from __future__ import annotations

import time
from typing import Any

import pytest

from benchmarks import operations, plan
from benchmarks.device import Unavailable, reason_of
from benchmarks.host_time import host_time
from benchmarks.implementations import FUSED_BASE
from benchmarks.measure import Visit, driven_by, interleaved
from benchmarks.optimizer_part import PartRun, method_costs
from benchmarks.ranks import rank_costs
from benchmarks.records import TrainingStep
from benchmarks.session import Session
from benchmarks.training import FASTSAM, FASTSAM_IN_A_GRAPH, HALF_BATCH, HALF_BATCH_IN_A_GRAPH, prepare, rows


def test_operations(case: plan.Backend, session: Session) -> None:
    """Checks the operations before anything is timed."""
    if reason := operations.obstacle(case.name, session.device.type):
        if case.name in session.required:
            pytest.fail(f"{case.name}: {reason}", pytrace=False)
        raise Unavailable(reason)
    start = time.perf_counter()
    outcome = operations.compare_with_reference(case.name, session.device.type)
    session.say(f"{case.name}: {outcome.steps} steps, largest error {outcome.error:.2g} eps ({outcome.where})")
    session.say(f"{case.name}: compared with reference in {time.perf_counter() - start:.0f} s")
    assert outcome.ok, f"{case.name}: {outcome.error:.3g} eps at {outcome.where}"


def test_optimizer_part(case: plan.Part, session: Session, benchmark: Any) -> None:
    run = PartRun(session.device, case, compiler="eager" if session.dry else "inductor", fewest=session.fewest)
    names, skipped = run.names()
    record = run.measure(names, skipped, session.seconds * case.pace, driven_by(benchmark))
    session.add(record, needed={*session.required, FUSED_BASE})


def test_method_costs(case: plan.MethodCosts, session: Session, benchmark: Any) -> None:
    drive = driven_by(benchmark)
    record = method_costs(session.device, case.model, case.base, session.seconds, drive, session.fewest)
    session.add(record, needed=set(record.skipped))


def test_rank_costs(case: plan.RankCosts, session: Session) -> None:
    session.add(rank_costs(case.model, case.base, session.seconds, session.fewest), needed=set())


def test_host_time(case: plan.HostTime, session: Session) -> None:
    record = host_time(session.device, case.model, session.seconds / 12, case.frozen)
    session.add(record, needed=session.required if session.device.asynchronous else {"native"})


def test_training_step(case: plan.Training, session: Session, benchmark: Any) -> None:
    network, device = case.network, session.device
    visits: dict[str, Visit] = {}
    skipped: dict[str, str] = {}
    for row in rows(network, device.type, methods=case.methods):
        try:
            visits[row] = prepare(network, device, row)
            visits[row]()
        except Exception as error:
            if row == network.base:
                raise  # in whose time all others are counted
            visits.pop(row, None)
            skipped[row] = reason_of(error)
            device.release_memory()
    # A round is long: with fewer of them a hundredth cannot be told from noise.
    rounds = interleaved(visits, session.training_seconds, driven_by(benchmark), session.fewest)
    sizes = [p.numel() for p in network.build().parameters()]
    record = TrainingStep(
        model=network.name,
        base=network.base,
        batch=network.batch,
        parameters=sum(sizes),
        tensors=len(sizes),
        rounds=rounds.count,
        times=rounds.times,
        skipped=skipped,
    )
    session.add(record, needed={FASTSAM, HALF_BATCH, FASTSAM_IN_A_GRAPH, HALF_BATCH_IN_A_GRAPH})
