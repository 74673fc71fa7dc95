"""Checkpoints by torch.distributed.checkpoint, on the ranks: into other numbers of ranks, other classes, mid-cycle."""

import copy
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import ways
from registry import BASES
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

DONE, STEPS = 3, 6


def shared_folder():
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    return folder[0]


def make(way, base, method, dtype, **options):
    module, rank, ranks = {**ways.WAYS, **ways.WAYS_OF_FOUR}[way](ways.Block().to(dtype))
    return module, ways.optimizer_for(module, base, method, **options), rank, ranks


def save(module, optimizer, options, folder):
    weights, state = get_state_dict(module, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(module, optimizer, options, folder):
    """Into an optimizer that has had no step, or has."""
    weights, state = get_state_dict(module, optimizer, options=options)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(
        module, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=options
    )


def everything(module, optimizer):
    """Weights and state, whole, in the order of the parameters."""
    tensors = []
    for param in optimizer.param_groups[0]["params"]:
        entries = optimizer.state.get(param, {})
        tensors += [param, *(entries[name] for name in sorted(entries) if isinstance(entries[name], torch.Tensor))]
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in whole])


def resume(way, base, method, dtype_name="float64", flatten=False, **options):
    """Whether a resumed run ends with the bits of the undisturbed one, weights and state."""
    dtype = getattr(torch, dtype_name)
    state_options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    module, optimizer, rank, ranks = make(way, base, method, dtype, **options)
    ways.train(module, optimizer, ranks, rank, range(DONE), dtype)
    optimizer.zero_grad()
    folder = shared_folder()
    save(module, optimizer, state_options, folder)
    ways.train(module, optimizer, ranks, rank, range(DONE, STEPS), dtype)
    again, other, *_ = make(way, base, method, dtype, **options)
    load(again, other, state_options, folder)
    ways.train(again, other, ranks, rank, range(DONE, STEPS), dtype)
    return torch.equal(everything(module, optimizer), everything(again, other))


def to_one_process(base):
    """The error after a full state dict of FSDP2 is loaded by torch's own class in one process, and by FastSAM."""
    module, optimizer, rank, ranks = make("fsdp2", base, "sam", torch.float64)
    ways.train(module, optimizer, ranks, rank, range(DONE))
    full = StateDictOptions(full_state_dict=True)
    state = get_state_dict(module, optimizer, options=full)
    before = copy.deepcopy(state[1])
    ways.train(module, optimizer, ranks, rank, range(DONE, STEPS))
    assert_equal_trees(before, state[1])
    single = ways.Block().double()
    resumed = ways.optimizer_for(single, base, "sam")
    set_state_dict(single, resumed, model_state_dict=state[0], optim_state_dict=state[1], options=full)
    ways.train(single, resumed, ranks, None, range(DONE, STEPS))
    plain_model = ways.Block().double()
    cls, base_options = BASES[base]
    plain = cls(plain_model.parameters(), **base_options)
    for group in state[1]["param_groups"]:  # torch's function knows no options that an optimizer does not have
        for name in set(group) - set(plain.param_groups[0]):
            del group[name]
    set_state_dict(plain_model, plain, model_state_dict=state[0], optim_state_dict=state[1], options=full)
    x, y = ways.batch(0, ranks)
    ways.closure_of(plain_model, plain, x, y)()
    plain.step()
    return ways.error_of(module, ways.whole(single))


def from_plain(base, full):
    """The error after the state of torch's own class, over FSDP2, is loaded by FastSAM, against one process."""
    cls, base_options = BASES[base]
    options = StateDictOptions(full_state_dict=full)
    module, rank, ranks = ways.fsdp2(ways.Block().double())
    plain = cls(module.parameters(), **base_options)
    single = ways.Block().double()
    alone = cls(single.parameters(), foreach=False, **base_options)
    for step in range(DONE):
        for model, optimizer, mine in ((module, plain, rank), (single, alone, None)):
            ways.closure_of(model, optimizer, *ways.batch(step, ranks, mine))()
            optimizer.step()
    plain.zero_grad()
    folder = shared_folder()
    again, resumed, *_ = make("fsdp2", base, "sam", torch.float64)
    if full:
        weights, state = get_state_dict(module, plain, options=options)
        set_state_dict(again, resumed, model_state_dict=weights, optim_state_dict=state, options=options)
    else:
        save(module, plain, options, folder)
        load_foreign(again, resumed, cls(again.parameters(), **base_options), folder)
    continued = ways.optimizer_for(single, base, "sam", backend="reference")
    continued.load_state_dict(alone.state_dict())
    ways.train(again, resumed, ranks, rank, range(DONE, STEPS))
    ways.train(single, continued, ranks, None, range(DONE, STEPS))
    return ways.error_of(again, ways.whole(single))


def load_foreign(module, optimizer, theirs, folder):
    """A checkpoint of ``theirs``, a torch optimizer: read into its own layout, then set in ``optimizer``."""
    options = StateDictOptions()
    weights, state = get_state_dict(module, theirs, options=options)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(
        module, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=options
    )


def assert_equal_trees(one, other):
    """What was saved has not moved with the training."""
    for key, value in one.items():
        if isinstance(value, dict):
            assert_equal_trees(value, other[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key


def save_for_others(base, method, folder):
    """Trains on all ranks and saves; returns how an undisturbed run ends."""
    module, optimizer, rank, ranks = make("fsdp2", base, method, torch.float64)
    half = rank % 2 if ranks > 1 else None  # of the same batches for every number of ranks
    ways.train(module, optimizer, 2, half, range(DONE))
    save(module, optimizer, StateDictOptions(), folder)
    ways.train(module, optimizer, 2, half, range(DONE, STEPS))
    return ways.whole(module).tolist()


def resume_from_others(base, method, folder):
    module, optimizer, rank, ranks = make("fsdp2", base, method, torch.float64)
    load(module, optimizer, StateDictOptions(), folder)
    ways.train(module, optimizer, 2, rank % 2 if ranks > 1 else None, range(DONE, STEPS))
    return ways.whole(module).tolist()
