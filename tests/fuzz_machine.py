"""Runs a fuzzed program and checks each step against the fp64 oracle. One file: every operation shares one state.

The machine remembers what the last step has left. Nothing but a step may change it, so that an operation that loses or
mixes up state is found before the oracle starts from it.
"""

import copy
import dataclasses
import math

import oracle
import pytest
import torch
from checks import Canaries, assert_same_bits, assert_within, bits, values
from fuzz_programs import AddGroup, Cast, Edit, Layout, Param, Reload, SetOption, Step, Swap, SwapState
from problem import give_grad

from fastsam import FastSAM
from fastsam.tables.memory import as_real

SCALE = 1024.0
MASTER = "fastsam_master"
MOMENTS = {"momentum_buffer": "m", "exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "v"}


class Planned(Exception):
    """What a failing closure raises."""


def run(backend, program):
    machine = Machine(backend, program)
    for operation in program.operations:
        machine.carry_out(operation)


class Machine:
    def __init__(self, backend, program):
        self.backend, self.base = backend, program.base
        self.canaries = Canaries()
        self.params, self.weights, self.masters, self.moments, self.updates = [], [], [], [], []
        groups = [self.make_group(group) for group in program.groups]
        self.optimizer = FastSAM(groups, self.base, backend=backend)
        self.handlers = {
            Step: self.step,
            AddGroup: self.add_group,
            SetOption: self.set_option,
            Edit: self.edit,
            Cast: self.cast,
            Swap: self.swap,
            SwapState: self.swap_state,
            Reload: self.reload,
        }

    def carry_out(self, operation):
        self.handlers[type(operation)](operation)
        self.canaries.assert_alive()
        self.assert_remembered()

    # ---- parameters and what is remembered of them ----

    def make_group(self, group):
        made = [self.make_param(spec, len(self.params) + i) for i, spec in enumerate(group.params)]
        self.params += made
        self.weights += [p.detach().clone() for p in made]
        self.masters += [None] * len(made)
        self.moments += [{} for _ in made]
        self.updates += [0] * len(made)
        return {"params": made, **group.options}

    def make_param(self, spec: Param, seed):
        tensor = values(spec.shape, spec.dtype, seed=1000 + seed)
        return self.place(tensor, spec.layout).requires_grad_()

    def place(self, tensor, layout):
        return self.canaries.around(tensor, offset=layout.offset, strides=layout.strides(tuple(tensor.shape)))

    def place_as(self, param, tensor):
        """With the strides of ``param``."""
        return self.canaries.around(tensor, offset=1, strides=param.stride())

    def groups(self):
        """For each parameter, the group it is in."""
        return [group for group in self.optimizer.param_groups for _ in group["params"]]

    def mode(self, i):
        """Whether the parameter rounds stochastically, and whether it has a master."""
        group, is_low = self.groups()[i], self.params[i].dtype in (torch.bfloat16, torch.float16)
        return is_low and group["rounding"] == "stochastic", is_low and group["master_weights"]

    def origin(self, i, master):
        """Where the parameter is perturbed and updated from: its master, where it is that master's rounding."""
        weights = self.weights[i]
        if not self.mode(i)[1]:
            return weights
        master = weights if master is None else master
        return torch.where(bits(master.to(weights.dtype)) == bits(weights), master.float(), weights.float())

    def assert_remembered(self):
        assert not self.optimizer.perturbed
        assert_same_bits([p.detach() for p in self.params], self.weights, "weights")
        for i, (param, moments) in enumerate(zip(self.params, self.moments, strict=True)):
            live = self.optimizer.state.get(param, {})
            assert float(live.get("step", self.updates[i])) == self.updates[i]
            if self.updates[i] == 0:
                continue  # zeros that are there or not
            # A perturbation may have told a master of what was done to the parameter.
            actual, expected = self.origin(i, live.get(MASTER)), self.origin(i, self.masters[i])
            assert_same_bits(actual, expected, f"what parameter {i} starts from")
            names = {name for name in live if name in MOMENTS}
            assert names == set(moments), f"state of parameter {i}"
            for name, value in moments.items():
                assert live[name].shape == param.shape, f"{name} of parameter {i}"
                assert_same_bits(live[name], value.to(live[name].dtype), f"{name} of parameter {i}")

    def remember(self, i):
        param = self.params[i]
        self.weights[i] = param.detach().clone()
        state = self.optimizer.state.get(param, {})
        self.moments[i] = {name: value.clone() for name, value in state.items() if name in MOMENTS}
        self.masters[i] = state[MASTER].clone() if MASTER in state else None

    # ---- everything but steps ----

    def add_group(self, operation):
        self.optimizer.add_param_group(self.make_group(operation.group))

    def set_option(self, operation):
        groups = self.optimizer.param_groups
        groups[operation.group % len(groups)][operation.name] = operation.value

    def edit(self, operation):
        i = operation.param % len(self.params)
        with torch.no_grad():
            for tensor in (self.params[i], self.weights[i]):
                tensor[(slice(None, None, 2),) * tensor.dim()] /= 2

    def cast(self, operation):
        i = operation.param % len(self.params)
        param = self.params[i]
        if param.is_complex() != operation.dtype.is_complex:
            return
        param.grad = None
        param.data = self.place_as(param, param.detach().to(operation.dtype))
        self.weights[i] = self.weights[i].to(operation.dtype)

    def swap(self, operation):
        param = self.params[operation.param % len(self.params)]
        param.grad = None
        param.data = self.place(param.detach(), operation.layout)

    def swap_state(self, operation):
        state = self.optimizer.state.get(self.params[operation.param % len(self.params)], {})
        for name in (*MOMENTS, MASTER):
            if name in state:
                state[name] = self.place(state[name], operation.layout)

    def reload(self, operation):
        saved = copy.deepcopy(self.optimizer.state_dict())
        groups = [dict(group) for group in self.optimizer.param_groups]
        if operation.through_torch:
            plain = self.base([{**group} for group in groups])
            plain.load_state_dict(saved)
            saved = plain.state_dict()
            # torch casts it to the parameter's dtype.
            for i, param in enumerate(self.params):
                self.moments[i] = {name: value.to(param.dtype) for name, value in self.moments[i].items()}
                self.masters[i] = None if self.masters[i] is None else self.masters[i].to(param.dtype)
        self.optimizer = FastSAM(groups, self.base, backend=self.backend)
        self.optimizer.load_state_dict(saved)

    # ---- a step ----

    def step(self, operation):
        way = operation.way
        # A step without an ascent has one pass, and the base applies whatever it finds.
        drawn = operation.first if self.ascends() else dataclasses.replace(operation.first, poison=None)
        first = Gradients(self, drawn)
        second = Gradients(self, operation.second, SCALE if way == "scaled" else 1.0)
        if way == "overflow":
            second.poison(math.inf)
        expected = self.expected_perturbation(first)
        addresses = [p.data_ptr() for p in self.params]
        if way in ("closure", "pass 1 fails", "pass 2 fails"):
            updated = self.closure_step(way, first, second, expected)
        else:
            updated = self.two_phases(way, first, second, expected)
        if updated:
            is_closure_step = way in ("closure", "pass 1 fails", "pass 2 fails")
            self.assert_updated(second if self.ascends() or not is_closure_step else first)
        if way != "moved":
            assert [p.data_ptr() for p in self.params] == addresses
        first.assert_kept(cleared=True)
        second.assert_kept()

    def ascends(self):
        """Whether a perturbed group has another rho than the number 0."""
        return any(group["perturb"] and group["rho"] != 0 for group in self.optimizer.param_groups)

    def closure_step(self, way, first, second, expected):
        passes = []

        def closure():
            passes.append(1)
            grads = (first, second)[len(passes) - 1]
            if len(passes) == 2:
                assert self.optimizer.perturbed
                self.assert_perturbed(first, expected)
            grads.give()
            if way == f"pass {len(passes)} fails":
                raise Planned
            return len(passes)

        count = 2 if first.any() and self.ascends() else 1
        fails = way == "pass 1 fails" or (way == "pass 2 fails" and count == 2)
        if not fails and count == 2 and not second.any():
            with pytest.raises(RuntimeError, match="no parameter has a gradient after the second pass"):
                self.optimizer.step(closure)
            return False
        try:
            assert self.optimizer.step(closure) == 1
        except Planned:
            assert fails
            return False
        assert not fails
        assert len(passes) == count
        return first.any()

    def two_phases(self, way, first, second, expected):
        optimizer = self.optimizer
        first.give()
        if not first.any():
            with pytest.raises(RuntimeError, match="no parameter has a gradient"):
                optimizer.first_step()
            return False
        assert optimizer.first_step() is optimizer.perturbed is self.ascends()
        if optimizer.perturbed:
            self.assert_perturbed(first, expected)
        elif way == "moved":
            way = "given up"
        # Empty tensors are nowhere: they cannot be moved.
        if way == "given up" or (way == "moved" and not any(p.numel() for p in self.params)):
            optimizer.restore()
            return False
        if way == "moved":
            self.move_and_give_up(second)
            return False
        second.give()
        if way in ("scaled", "overflow"):  # what GradScaler.step sets
            optimizer.grad_scale = torch.tensor(second.scale)
            optimizer.found_inf = torch.tensor(float(way == "overflow"))
        optimizer.second_step()
        if way in ("scaled", "overflow"):
            del optimizer.grad_scale, optimizer.found_inf
        return way != "overflow"

    def move_and_give_up(self, second):
        """Other memory between the passes: the second phase refuses, ``restore`` follows, the old one is let alone."""
        old = [p.detach() for p in self.params]
        for param in self.params:
            param.data = self.place_as(param, param.detach())
        kept = [t.clone() for t in old]
        second.give()
        with pytest.raises(RuntimeError, match="other memory between the two passes"):
            self.optimizer.second_step()
        assert self.optimizer.perturbed
        self.optimizer.restore()
        assert_same_bits(old, kept, "memory that a parameter has left")

    # ---- what is expected of it ----

    def expected_perturbation(self, first):
        """Each parameter's perturbed weights in float64; None where the bits stay."""
        groups = self.groups()
        moving = [i for i, g in enumerate(first.tensors) if g is not None and groups[i]["perturb"]]
        weights = [as_real(self.weights[i]) for i in moving]
        grads = [as_real(first.tensors[i]) for i in moving]
        finite = all(bool(g.isfinite().all()) for g in grads)
        expected = [None] * len(self.params)
        if not finite:
            return expected
        size = oracle.norm(weights, grads, [groups[i]["adaptive"] for i in moving])
        for i, w, g in zip(moving, weights, grads, strict=True):
            rho, adaptive, maximize = (groups[i][name] for name in ("rho", "adaptive", "maximize"))
            perturbed = oracle.perturbed(w, g, size, rho, adaptive, maximize)
            expected[i] = perturbed - w.double() + as_real(self.origin(i, self.masters[i])).double()
        return expected

    def assert_perturbed(self, first, expected):
        for i, (param, weights, want) in enumerate(zip(self.params, self.weights, expected, strict=True)):
            if want is None:
                assert_same_bits(param.detach(), weights, f"parameter {i}, which is not perturbed")
            else:
                stochastic, _ = self.mode(i)
                what = f"perturbation of parameter {i}"
                assert_within(as_real(param.detach()), want, as_real(weights), what, stochastic=stochastic)

    def assert_updated(self, second):
        groups = self.groups()
        for i, (param, grad) in enumerate(zip(self.params, second.tensors, strict=True)):
            if grad is not None:
                self.updates[i] += 1
                self.assert_updated_one(i, param, second.true(i), groups[i])
        # What had no gradient is checked against what is remembered of it.
        for i, grad in enumerate(second.tensors):
            if grad is not None:
                self.remember(i)
            elif not self.mode(i)[1] and MASTER not in self.optimizer.state.get(self.params[i], {}):
                self.masters[i] = None  # an update without masters drops them all

    def assert_updated_one(self, i, param, grad, group):
        stochastic, has_master = self.mode(i)
        live = self.optimizer.state.get(param, {})
        assert (MASTER in live) == has_master, f"master of parameter {i}"
        kept, start = param.detach(), as_real(self.origin(i, self.masters[i]))
        if has_master:
            assert_same_bits(kept, live[MASTER].to(kept.dtype), f"rounding of master {i}")
            kept, stochastic = live[MASTER], False
        # A state is cast with its parameter; what has seen no update is zeros, or is not there.
        old = {name: as_real(value).to(start.dtype) for name, value in self.moments[i].items()}
        weights, moments, terms = updated(self.base, group, start, grad, old, self.updates[i])
        what = f"update of parameter {i}"
        assert_within(as_real(kept), weights, start, what, terms["w"], stochastic=stochastic)
        names = set(moments) if self.base is torch.optim.SGD else {"step", *moments}
        assert {name for name in live if not name.startswith("fastsam_")} == names, f"state of parameter {i}"
        for name, want in moments.items():
            assert live[name].dtype == kept.dtype, f"{name} of parameter {i}"
            before, what = old.get(name, torch.zeros_like(start)), f"{name} of parameter {i}"
            assert_within(as_real(live[name]), want, before, what, terms[MOMENTS[name]], stochastic=stochastic)


def in_other_dtype(grad, dtype):
    """Numbers that float32 holds as well: in it gradients of narrower parameters are computed with."""
    if not grad.is_complex():
        return grad.float().to(dtype)
    return grad if dtype == torch.bfloat16 else grad.to(torch.complex64).to(dtype.to_complex())


class Gradients:
    """One pass's gradients, in memory with canaries, for the parameters as they are now.

    Attributes:
        tensors: one per parameter, None for an absent one.
        scale: what they are multiplied with.
    """

    def __init__(self, machine, drawn, scale=1.0):
        self.params, self.scale = machine.params, scale
        self.tensors = []
        for i, param in enumerate(self.params):
            grad = values(param.shape, param.dtype, seed=100 * (drawn.seed + 1) + i) * scale
            if drawn.dtype is not None and i % 2 == 1:
                grad = in_other_dtype(grad, drawn.dtype)
            if drawn.expanded and grad.numel() > 0:
                grad = machine.place(grad.flatten()[:1], Layout()).reshape(()).expand(param.shape)
            else:
                grad = machine.place(grad, drawn.layout)
            self.tensors.append(None if i in drawn.absent else grad)
        if drawn.poison is not None:
            self.poison(drawn.poison)
        self.keep()

    def poison(self, number):
        for grad in self.tensors:
            if grad is not None and grad.numel() > 0:
                grad[(0,) * grad.dim()] = number
                break
        self.keep()

    def keep(self):
        self.kept = [None if g is None else g.clone() for g in self.tensors]

    def assert_kept(self, cleared=False):
        """Nothing was written to them; ``cleared``: but zeros to views, which stay the gradients of both passes."""
        for grad, kept in zip(self.tensors, self.kept, strict=True):
            if cleared and grad is not None and grad._base is not None and not grad.any():
                continue
            assert_same_bits(grad, kept, "gradients")

    def any(self):
        return any(g is not None for g in self.tensors)

    def give(self):
        for param, grad in zip(self.params, self.tensors, strict=True):
            if grad is None:
                param.grad = None
            else:
                give_grad(param, grad)

    def true(self, i):
        """In float64 and without the scale."""
        return as_real(self.tensors[i]).double() / self.scale


def updated(base, group, w, g, old, step):
    """The oracle's new weights and moments, and the sizes of what each is a sum of."""
    start = w.double()
    decay = group["weight_decay"]
    options = {name: group[name] for name in ("lr", "weight_decay", "maximize")}
    if base is torch.optim.SGD:
        options |= {name: group[name] for name in ("momentum", "dampening", "nesterov")}
        buffer = old["momentum_buffer"] if step > 1 and group["momentum"] else None
        weights, new = oracle.sgd(w, g, buffer, **options)
        size = g.abs() + decay * start.abs()
        path = group["lr"] * (2 * size + (0 if buffer is None else buffer.double().abs()))
        return weights, {} if new is None else {"momentum_buffer": new}, {"w": path, "m": size}
    decoupled = group["decoupled_weight_decay"]
    options |= {name: group[name] for name in ("betas", "eps", "amsgrad")}
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]
    moments = [old[name] if step > 1 else torch.zeros_like(start) for name in names]
    moments += [None] * (3 - len(names))
    weights, new = oracle.adam(w, g, moments, step, decoupled=decoupled, **options)
    size = g.abs() + (0 if decoupled else decay * start.abs())
    # Where the first moment cancels, the step is as exact as what cancels in it.
    v_hat = new[2 if group["amsgrad"] else 1] / (1 - group["betas"][1] ** step)
    m_hat = (moments[0].double().abs() + size) / (1 - group["betas"][0] ** step)
    path = group["lr"] * m_hat / (v_hat.sqrt() + group["eps"])
    return weights, dict(zip(names, new, strict=False)), {"w": path, "m": size, "v": size.square()}
