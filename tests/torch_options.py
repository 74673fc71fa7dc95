"""The options that torch tests each of its optimizers with, and those that each refuses.

Both are those of torch/testing/_internal/common_optimizers.py, as test_torch_checklist.py finds out, and some more.
"""

import torch

OPTIONS = {
    "Adafactor": [
        {},
        {"lr": 0.01, "weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"beta2_decay": -1.0},
        {"d": 1.5},
    ],
    "Adagrad": [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"lr": 0.1},
        {"initial_accumulator_value": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.1},
        {"lr": torch.tensor(0.001)},
    ],
    "Adam": [
        {},
        {"lr": 0.01},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "amsgrad": True},
        {"lr": torch.tensor(0.001)},
        {"lr": torch.tensor([0.001])},
        {"lr": torch.tensor(0.001), "betas": (torch.tensor(0.9), torch.tensor(0.99))},
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
        {"capturable": True},
    ],
    "Adamax": [
        {},
        {"lr": 0.1},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"weight_decay": 0.1, "maximize": True},
    ],
    "AdamW": [
        {},
        {"lr": 0.01},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "amsgrad": True},
        {"weight_decay": 0.1, "maximize": True, "amsgrad": True},
        {"lr": torch.tensor([0.001])},
    ],
    "ASGD": [
        {},
        {"lambd": 0.1},
        {"lr": 0.02},
        {"t0": 100},
        {"maximize": True},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
    ],
    "Muon": [
        {},
        {"lr": 0.01},
        {"lr": torch.tensor(0.001)},
        {"weight_decay": 0.2},
        {"momentum": 0.8},
        {"ns_steps": 6},
        {"ns_coefficients": (3.4, -4.7, 2.0)},
    ],
    "NAdam": [
        {},
        {"lr": 0.001},
        {"momentum_decay": 6e-3},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "momentum_decay": 6e-3},
        {"weight_decay": 0.1, "momentum_decay": 6e-3, "decoupled_weight_decay": True},
        {"weight_decay": 0.1, "maximize": True},
    ],
    "RAdam": [
        {},
        {"lr": 0.002},
        {"eps": 1e-6},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"weight_decay": 0.1, "maximize": True},
    ],
    "RMSprop": [
        {},
        {"lr": 0.001},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "centered": True},
        {"weight_decay": 0.1, "centered": True, "momentum": 0.1},
        {"weight_decay": 0.1, "maximize": True, "centered": True, "momentum": 0.1},
    ],
    "Rprop": [{}, {"lr": 2e-4}, {"etas": (0.5, 1.5)}, {"step_sizes": (2e-6, 100)}, {"maximize": True}],
    "SGD": [
        {},
        {"lr": 0.01},
        {"lr": torch.tensor(0.001)},
        {"lr": torch.tensor([0.001])},
        {"weight_decay": 0.5},
        {"momentum": 0.9},
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
}

OPTIONS = {name: several for name, several in OPTIONS.items() if hasattr(torch.optim, name)}

TWO_RATES = {"lr": torch.tensor([0.001, 0.001])}
NOT_BOTH = {"betas": (0.9, torch.tensor(0.99))}
WRONG = {
    "Adafactor": [
        ({"eps": (-1e-30, 1e-3)}, "epsilon1 should be >= 0"),
        ({"d": 0.0}, "Clipping threshold d should be >= 1"),
        ({"beta2_decay": 0.8}, "beta2_decay should be <= 0"),
    ],
    "Adagrad": [({"lr_decay": -0.5}, "Invalid lr_decay value: -0.5")],
    "Adam": [
        ({"betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        ({"lr": torch.tensor(0.001), "foreach": True}, "lr as a Tensor is not supported for capturable=False"),
        (NOT_BOTH, "betas must be either both floats or both Tensors"),
        ({"betas": NOT_BOTH["betas"][::-1]}, "betas must be either both floats or both Tensors"),
        (
            {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": True},
            r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
        ),
        ({"fused": True, "foreach": True}, "`fused` and `foreach` cannot be `True` together"),
    ],
    "Adamax": [({"betas": (0.0, 1.0)}, "Invalid beta parameter at index 1: 1.0")],
    "AdamW": [
        ({"betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        ({"eps": -1}, "Invalid epsilon"),
        (NOT_BOTH, "betas must be either both floats or both Tensors"),
    ],
    "ASGD": [({"weight_decay": -0.5}, "Invalid weight_decay value: -0.5")],
    "Muon": [({"adjust_lr_fn": "arbitrary"}, "Adjust learning rate function arbitrary is not supported")],
    "NAdam": [
        ({"betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0"),
        ({"momentum_decay": -0.2}, "Invalid momentum_decay value: -0.2"),
    ],
    "RAdam": [
        ({"betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
    ],
    "RMSprop": [({"momentum": -1.0}, "Invalid momentum value: -1.0")],
    "Rprop": [({"etas": (1.0, 0.5)}, "Invalid eta values: 1.0, 0.5")],
    "SGD": [
        ({"momentum": -0.5}, "Invalid momentum value: -0.5"),
        ({"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
    ],
}
