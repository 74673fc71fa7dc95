"""Kills a training run again and again, and compares what it ends as with an undisturbed one, bit for bit.

    python tools/crash.py --kills 20

The run is examples/resumable_training.py. Kills are SIGKILL: at a random time, and at the moments that a random time
hardly hits, each at a random step; in turns.
"""

import argparse
import functools
import io
import itertools
import multiprocessing
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from fastsam import FastSAM

EXAMPLE = Path(__file__).parents[1] / "examples" / "resumable_training.py"


def die(*_, **__):
    """Ends this process, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_file(checkpoint, file):
    """``torch.save``, interrupted."""
    whole = io.BytesIO()
    torch.serialization.save(checkpoint, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    die()


def then_die(call):
    """The function ``call``, and the end."""

    @functools.wraps(call)
    def both(*arguments, **options):
        call(*arguments, **options)
        die()

    return both


# The moments that a kill can be planned for: what stands in for which function.
MOMENTS = {
    "between the passes": (FastSAM, "_clear_grads", die),
    "while saving": (torch, "save", half_a_file),
    "perturbed": (FastSAM, "_ascend", then_die(FastSAM._ascend)),
    "before the update": (FastSAM, "_descend", die),
    "after the update": (FastSAM, "_descend", then_die(FastSAM._descend)),
    "before the rename": (os, "replace", die),
    "after the rename": (os, "replace", then_die(os.replace)),
}


def run(path, options, begun, moment=None, after=0):
    """The training, in a process of its own; it dies at the call number ``after`` of the ``moment``.

    Sets the event ``begun`` at its first perturbation.
    """
    torch.set_num_threads(1)
    ascend = FastSAM._ascend
    FastSAM._ascend = lambda optimizer, *args: (begun.set(), ascend(optimizer, *args))[1]
    if moment is not None:
        owner, name, fatal = MOMENTS[moment]
        usual, calls = getattr(owner, name), itertools.count()
        setattr(owner, name, lambda *a, **k: (fatal if next(calls) == after else usual)(*a, **k))
    runpy.run_path(str(EXAMPLE))["train"](path, **options)


class Runs:
    """Starts the training in fresh processes that find their modules loaded already."""

    def __init__(self, options):
        self.options = options
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["__main__", "sklearn.datasets", "fastsam.demo.data", "fastsam._C"])

    def start(self, path, moment=None, after=0):
        """Returns the process, which trains already or is at its end."""
        begun = self.context.Event()
        process = self.context.Process(target=run, args=(path, self.options, begun, moment, after))
        process.start()
        while not begun.wait(0.1) and process.is_alive():
            pass
        return process

    def finish(self, path):
        """Runs to the end, and returns the last checkpoint and the seconds it took."""
        process, start = self.start(path), time.perf_counter()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"the run ended with exit status {process.exitcode}")
        return torch.load(path), time.perf_counter() - start


def step_of(path):
    """The step of the checkpoint at ``path``; 0 if there is none."""
    return torch.load(path)["step"] if path.exists() else 0


def kill_once(runs, path, moment, seconds, chance):
    """Starts the training and kills it; returns False if it came to its end first."""
    if moment == "at a random time":
        process = runs.start(path)
        process.join(chance.uniform(0.0, seconds))
        process.kill()
    else:
        saves = MOMENTS[moment][0] is not FastSAM
        process = runs.start(path, moment, chance.randrange(2 if saves else 2 * runs.options["save_every"]))
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{moment}: the run ended with exit status {process.exitcode}")
    return process.exitcode != 0


def differences(one, other, where="checkpoint"):
    """Names what is not the same bits in two nested structures."""
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        one, other = (t.contiguous().flatten().view(torch.uint8) for t in (one, other))
        return [] if same and torch.equal(one, other) else [where]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [where]
        return [name for key in one for name in differences(one[key], other[key], f"{where}[{key!r}]")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [where]
        return [name for i in range(len(one)) for name in differences(one[i], other[i], f"{where}[{i}]")]
    return [] if one == other else [where]


def main():
    """Returns 0 if the killed run ends as the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--seed", type=int, default=None, help="decides when to kill (default: another one each time)")
    arguments = parser.parse_args()
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    chance = random.Random(seed)
    runs = Runs({name: getattr(arguments, name) for name in ("steps", "save_every", "backend")})
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, seconds = runs.finish(Path(folder, "undisturbed.pt"))
        print(f"undisturbed: {arguments.steps} steps in {seconds:.1f} s; --seed {seed}", flush=True)
        path, kills = Path(folder, "killed.pt"), 0
        moments = itertools.cycle(each for moment in MOMENTS for each in ("at a random time", moment))
        while kills < arguments.kills:
            moment = next(moments)
            if not kill_once(runs, path, moment, 2 * seconds / arguments.kills, chance):
                path.unlink()  # it came to its end: from the beginning
                continue
            kills += 1
            print(f"kill {kills} of {arguments.kills}, {moment}: the checkpoint is at step {step_of(path)}", flush=True)
        different = differences(runs.finish(path)[0], undisturbed)
    if different:
        print("not the same bits:", *different, sep="\n  ")
        return 1
    print(f"after {kills} kills: the same bits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
