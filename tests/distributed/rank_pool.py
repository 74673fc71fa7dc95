"""Processes that run tests' functions as the ranks of one gloo group; started once.

They are forked from a server that has imported everything: the imports take longer than the tests.
"""

import importlib
import os
import socket
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = ["ways"]
GROUP_TIMEOUT = timedelta(seconds=60)
TASK_TIMEOUT = 200.0


class RankPool:
    """``world`` processes, each of which waits for functions to call."""

    def __init__(self, world):
        self.world = world
        self._ranks = []

    def run(self, function, *args, **options):
        """Calls ``function(*args, **options)`` on every rank and returns what they return.

        The function is one of a module that can be imported by its name, in this folder. If a rank fails, so does this
        call, with the traceback of the first, and the next call starts new processes: the others may wait for it.
        """
        if not self._ranks:
            self._start()
        for _, pipe in self._ranks:
            pipe.send((function.__module__, function.__name__, args, options))
        results = [self._receive(rank) for rank in range(self.world)]
        failures = [text for is_error, text in results if is_error]
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [value for _, value in results]

    def stop(self):
        for process, _ in self._ranks:
            process.kill()
            process.join()
        self._ranks = []

    def _start(self):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, port, theirs), daemon=True)
            process.start()
            self._ranks.append((process, mine))

    def _receive(self, rank):
        process, pipe = self._ranks[rank]
        try:
            if pipe.poll(TASK_TIMEOUT):
                return pipe.recv()
        except EOFError:
            pass
        return True, f"rank {rank} {'has not answered' if process.is_alive() else 'has died'}"


def _serve(rank, world, port, pipe):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=GROUP_TIMEOUT)
    while True:
        module, name, args, options = pipe.recv()
        torch.manual_seed(0)
        try:
            pipe.send((False, getattr(importlib.import_module(module), name)(*args, **options)))
        except BaseException:
            pipe.send((True, f"rank {rank}: {traceback.format_exc()}"))
