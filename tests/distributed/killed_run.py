"""For torchrun: the training of examples/fsdp2.py, in which rank 1 dies while the weights are perturbed.

Arguments: the folder of checkpoints and the step in which it dies, in the job's first life; -1: in none.
"""

import hashlib
import os
import runpy
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastsam import FastSAM

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp2.py"
STEPS, SAVE_EVERY = 12, 4


def main(folder, kill_at):
    folder.mkdir(exist_ok=True)
    dist.init_process_group("gloo")
    example = runpy.run_path(str(EXAMPLE))
    ascend, count = FastSAM._ascend, [0]

    def ascend_and_die(optimizer, *args):
        ascend(optimizer, *args)
        count[0] += 1
        if dist.get_rank() == 1 and count[0] == kill_at and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    FastSAM._ascend = ascend_and_die
    example["train"](folder, torch.device("cpu"), steps=STEPS, save_every=SAVE_EVERY)
    model, optimizer = example["make"](torch.device("cpu"))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    assert example["load"](folder, model, optimizer, schedule) == STEPS
    state = [t for entries in optimizer.state.values() for t in entries.values()]
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (*model.parameters(), *state)]
    digest = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in whole)).hexdigest()
    if dist.get_rank() == 0:
        (folder / "result").write_text(digest)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
