"""Trainings on two gloo ranks, each function in both processes; see test_two_ranks.py."""

import os
import socket
import tempfile
import traceback
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from setting import BATCH, RHO, define_torchvision_operators, make_data, make_model, mse
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from fastsam import FastSAM
from fastsam.training import sam_step

WORLD = 2
CLIP = 0.05
SCALE = 1024.0
SGD = {"lr": 0.1, "momentum": 0.9}


def batches_of(rank):
    """This rank's micro-batches: one half of each batch."""
    x, y = make_data()
    half = BATCH // WORLD
    starts = [i + rank * half for i in range(0, len(x), BATCH)]
    return [(x[i : i + half], y[i : i + half]) for i in starts]


def loader_of(rank):
    return DataLoader(TensorDataset(*(torch.cat(part) for part in zip(*batches_of(rank), strict=True))), BATCH // WORLD)


def optimizer_for(model):
    return FastSAM(model.parameters(), rho=RHO, **SGD)


def training_loop(rank, folder, accumulate=1):
    model = DistributedDataParallel(make_model())
    optimizer = optimizer_for(model)
    batches = batches_of(rank)
    for i in range(0, len(batches), accumulate):
        sam_step(model, lambda m, b: mse(m(b[0]), b[1]), batches[i : i + accumulate], optimizer)
    return model.module


def lightning_ddp(rank, folder, accumulate=1, **options):
    from test_lightning import Module, trainer_of

    options |= {"strategy": "ddp", "devices": WORLD, "accumulate_grad_batches": accumulate}
    trainer = trainer_of(epochs=1, use_distributed_sampler=False, **options)
    module = Module()
    trainer.fit(module, loader_of(rank))
    return module.net


def lightning_ddp_scaler(rank, folder, accumulate=1):
    from test_lightning import scaler_plugin

    return lightning_ddp(rank, folder, accumulate, plugins=scaler_plugin(SCALE), gradient_clip_val=CLIP)


def accelerate_ddp(rank, folder, accumulate=1):
    from accelerate import Accelerator

    from fastsam.integrations.accelerate import SAMBackward

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = make_model()
    prepared, optimizer = accelerator.prepare(model, optimizer_for(model))
    assert isinstance(prepared, DistributedDataParallel)
    backward = SAMBackward(accelerator, prepared, optimizer)
    for x, y in batches_of(rank):
        with accelerator.accumulate(prepared):
            backward(lambda x, y: mse(prepared(x), y), x, y)
            optimizer.step()
            optimizer.zero_grad()
    return model


def transformers_ddp(rank, folder, accumulate=1):
    """Returns the weights, and this rank's micro-batches of each step."""
    from test_transformers import gpt2, trainer_of

    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulate, "num_train_epochs": 1}
    trainer = trainer_of(folder, gpt2(), language=True, **options)
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    return trainer.model, trainer.steps


def ignite_ddp(rank, folder, accumulate=1):
    from fastsam.integrations.ignite import create_sam_trainer

    model = DistributedDataParallel(make_model())
    trainer = create_sam_trainer(model, optimizer_for(model), mse, gradient_accumulation_steps=accumulate)
    trainer.run(loader_of(rank), max_epochs=1)
    return model.module


def timm_ddp(rank, folder, accumulate=1):
    from timm.utils import NativeScaler

    from fastsam.integrations.timm import SAMBackward

    model = DistributedDataParallel(make_model())
    optimizer = optimizer_for(model)
    backward = SAMBackward(optimizer, NativeScaler(device="cpu"), no_sync=model.no_sync)
    for i, (x, y) in enumerate(batches_of(rank)):
        need_update = (i + 1) % accumulate == 0
        loss_fn = lambda x, y: mse(model(x), y) / accumulate  # noqa: E731
        if need_update:
            backward(loss_fn, x, y)
            optimizer.zero_grad()
        else:
            with model.no_sync():
                backward(loss_fn, x, y, need_update=False)
    return model.module


def shard(model, mesh=None):
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model):
    """The whole weights of a sharded model."""
    return [p.full_tensor().detach() for p in model.parameters()]


def training_loop_fsdp2(rank, folder, accumulate=1):
    model = shard(make_model())
    optimizer = optimizer_for(model)
    batches = batches_of(rank)
    for i in range(0, len(batches), accumulate):
        sam_step(model, lambda m, b: mse(m(b[0]), b[1]), batches[i : i + accumulate], optimizer)
    return whole(model)


def accelerate_fsdp2(rank, folder, accumulate=1):
    """Accelerate's FSDP2 asks for an accelerator in ``prepare``: here its parts, in the same order."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType

    from fastsam.integrations.accelerate import SAMBackward

    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    accelerator.state.distributed_type = DistributedType.FSDP
    model = make_model()
    model, optimizer = accelerator._prepare_fsdp2(model, optimizer_for(model))
    optimizer = AcceleratedOptimizer(optimizer, device_placement=False)
    backward = SAMBackward(accelerator, model, optimizer)
    for x, y in batches_of(rank):
        with accelerator.accumulate(model):
            backward(lambda x, y: mse(model(x), y), x, y)
            optimizer.step()
            optimizer.zero_grad()
    AcceleratorState._reset_state(reset_partial_state=False)
    return whole(model)


def lightning_fsdp2(rank, folder, accumulate=1, **options):
    from lightning.pytorch.strategies import ModelParallelStrategy
    from test_lightning import Module, trainer_of

    class Sharded(Module):
        def configure_model(self):
            shard(self.net, self.device_mesh["data_parallel"])

    strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
    options |= {"strategy": strategy, "devices": WORLD, "accumulate_grad_batches": accumulate}
    trainer = trainer_of(epochs=1, use_distributed_sampler=False, **options)
    module = Sharded()
    trainer.fit(module, loader_of(rank))
    return whole(module.net)


CASES = {
    ("sam_step", "DDP"): training_loop,
    ("sam_step", "FSDP2"): training_loop_fsdp2,
    ("Accelerate", "DDP"): accelerate_ddp,
    ("Accelerate", "FSDP2"): accelerate_fsdp2,
    ("Transformers", "DDP"): transformers_ddp,
    ("ignite", "DDP"): ignite_ddp,
    ("timm", "DDP"): timm_ddp,
    ("Lightning", "DDP"): lightning_ddp,
    ("Lightning", "DDP, scaler, clipping"): lightning_ddp_scaler,
    ("Lightning", "FSDP2"): lightning_fsdp2,
    ("Lightning", "FSDP2, clipping"): partial(lightning_fsdp2, gradient_clip_val=CLIP),
}


def run_all(folder):
    """Every case with and without accumulation: ``{(case, accumulate): [each rank's result or traceback]}``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_run, (port, str(folder)), nprocs=WORLD)
    ranks = [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(WORLD)]
    return {key: [answers[key] for answers in ranks] for key in ranks[0]}


def _run(rank, port, folder):
    define_torchvision_operators()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    answers = {}
    for case, function in CASES.items():
        for accumulate in (1, 2):
            try:
                answer = function(rank, tempfile.mkdtemp(dir=folder), accumulate)
            except Exception:
                answer = traceback.format_exc()
            answers[case, accumulate] = answer
    torch.save(answers, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
