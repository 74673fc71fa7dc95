"""Methods under a GradScaler whose scale changes: some need both passes unscaled, some one scale in both."""

import pytest
import torch
from checks import assert_same_bits
from registry import METHODS
from trajectory import Network, detached

from fastsam import FastSAM, schedules

# The length of the perturbation or of the gradient for the base, or an average over steps, depends on the scale.
BY_LENGTH = ["amp", "friendly", "vasso", "stable", "unified", "sagm", "lesam"]
# They combine the gradients of both passes, which must have the same scale.
BY_RATIO = ["gsam", "wsam", "wsam-coupled", "stable"]

pytestmark = [pytest.mark.face, pytest.mark.usefixtures("one_thread")]


class Run:
    """Float32 training; powers of two as scales change no bit."""

    def __init__(self, device, backend, scaler=None, **options):
        self.network, self.scaler = Network(device, 21), scaler
        self.params = self.network.params(torch.float32)
        self.optimizer = FastSAM(self.params, lr=0.05, momentum=0.9, rho=0.1, backend=backend, **options)

    def backward(self, step):
        self.optimizer.zero_grad()
        loss = self.network.loss(self.params, step)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def plain_step(self, step):
        self.backward(step)
        if needs_another := self.optimizer.first_step():
            self.backward(step)
        self.optimizer.step()
        return needs_another

    def unscaled_step(self, step):
        """The loop of the documentation: both passes are unscaled, each with the scale of its own."""
        self.backward(step)
        self.scaler.unscale_(self.optimizer)
        if needs_another := self.optimizer.first_step():
            self.scaler.update()
            self.backward(step)
            self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return needs_another

    def scaled_step(self, step):
        """Neither is unscaled: the update is, and what it combines has one scale."""
        self.backward(step)
        self.optimizer.first_step()
        self.backward(step)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def growing(device):
    return torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=1)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_unscaled_passes_make_scale_invisible(backend, device, name):
    method = METHODS[name].method
    scaled = Run(device, backend, growing(device), method=method)
    plain = Run(device, backend, method=method)
    for step in range(3):
        scaled.unscaled_step(step)
        plain.plain_step(step)
        assert_same_bits(detached(scaled.params), detached(plain.params))
    assert scaled.scaler.get_scale() == 1024.0 * 2**6


@pytest.mark.parametrize("delay", [0, 1], ids=["at-once", "delayed"])
def test_adaptive_policy_with_unscaled_passes(device, delay):
    schedule = schedules.AESAM(12, delay=delay)
    scaled = Run(device, "auto", growing(device), schedule=schedule)
    plain = Run(device, "auto", schedule=schedule)
    ascended = []
    for step in range(12):
        ascended.append(scaled.unscaled_step(step))
        assert plain.plain_step(step) == ascended[-1]
        assert_same_bits(detached(scaled.params), detached(plain.params))
    assert 1 < sum(ascended) < 11


@pytest.mark.parametrize("name", BY_RATIO)
def test_one_scale_in_both_passes_is_enough(backend, device, name):
    method = METHODS[name].method
    scaled = Run(device, backend, growing(device), method=method)
    plain = Run(device, backend, method=method)
    for step in range(3):
        scaled.scaled_step(step)
        plain.plain_step(step)
        for ours, theirs in zip(detached(scaled.params), detached(plain.params), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", ["friendly", "vasso"])
def test_averages_in_steps_without_ascent_are_unscaled(backend, device, name, base):
    """Nobody unscales a step of one pass; its update and the average do."""
    options = {"method": METHODS[name].method, "schedule": lambda step: step > 1}
    scaled, plain = (Run(device, backend, scaler, **options) for scaler in (growing(device), None))
    if base is not torch.optim.SGD:
        for run in (scaled, plain):
            run.optimizer = FastSAM(run.params, base, lr=0.01, rho=0.1, backend=backend, **options)
    for step in range(2):
        scaled.backward(step)
        assert scaled.optimizer.first_step() is False
        scaled.scaler.step(scaled.optimizer)
        scaled.scaler.update()
        plain.plain_step(step)
    scaled.unscaled_step(2)
    plain.plain_step(2)
    assert_same_bits(detached(scaled.params), detached(plain.params))
    for one, other in zip(scaled.params, plain.params, strict=True):
        assert_same_bits(*(r.optimizer.state[p]["fastsam_average"] for r, p in ((scaled, one), (plain, other))))


def test_statistics_of_steps_without_ascent_are_unscaled(device):
    """With ``delay=1`` it is known before the first pass that there is no ascent, and nobody unscales."""
    schedule = schedules.AESAM(12, lambda1=0.5, lambda2=0.5)
    scaled, plain = (Run(device, "auto", scaler, schedule=schedule) for scaler in (growing(device), None))
    ascended = []
    for step in range(12):
        scaled.backward(step)
        if scaled.optimizer.ascends_next:
            scaled.scaler.unscale_(scaled.optimizer)
        ascended.append(scaled.optimizer.first_step())
        if ascended[-1]:
            scaled.scaler.update()
            scaled.backward(step)
        scaled.scaler.step(scaled.optimizer)
        scaled.scaler.update()
        assert plain.plain_step(step) == ascended[-1]
        assert_same_bits(detached(scaled.params), detached(plain.params))
    assert 1 < sum(ascended) < 11
