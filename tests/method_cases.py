"""Parameter groups, and numbers of steps, with which methods are tested."""

import triton_interpreter

RATES = [0.05, 0.1, 0.02, 0.1, 0.05]
MOMENTUM = {"momentum": 0.9, "weight_decay": 0.01}


def groups_with(*rhos):
    rhos = rhos * 5 if len(rhos) == 1 else rhos
    return [{"rho": rho, "lr": lr, **MOMENTUM} for rho, lr in zip(rhos, RATES, strict=True)]


ALIKE = groups_with(0.1)
MIXED = groups_with(0.1, 0.2, 0.05, 0.0, 0.1)
PLAIN = groups_with(0.0)


def a_round(case, backend, device):
    """So many steps that every kind of step of the method is among them, and a first one for the second time."""
    return triton_interpreter.fewer(8, 6 if len(case.passes) > 1 else 3, backend, device)
