"""How many programs of a kernel a GPU runs at a time, and in how many waves it therefore works through a model."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.shapes import shapes_of

MODEL = "ViT-B/16"
CHUNK_SIZE = 8192
"""Of float32, as gpu_chunk_size in fastsam/backends/device_table.py says; of 16-bit numbers twice as many elements."""


class GPU(NamedTuple):
    """What bounds the programs that are resident at a time: of one multiprocessor, at most.

    From the compute capabilities in the CUDA C++ Programming Guide; AMD's from the CDNA 3 instruction set architecture
    (4 vector units, each with 512 registers for each of 64 lanes and 8 waves).
    """

    name: str
    multiprocessors: int
    threads: int
    blocks: int
    registers: int = 65536
    warp: int = 32


GPUS = {
    "sm_80": GPU("A100", 108, 2048, 32),
    "sm_90": GPU("H100", 132, 2048, 32),
    "sm_100": GPU("B200", 148, 2048, 32),
    "sm_120": GPU("RTX PRO 6000", 188, 1536, 24),
    "gfx942": GPU("MI300X", 304, 2048, 16, registers=4 * 512 * 64, warp=64),
}


def resident(target: str, registers: int, threads: int) -> int | None:
    """Programs of so many threads with so many registers on one multiprocessor; None: not known for ``target``."""
    gpu = GPUS.get(target.rstrip("a"))
    if gpu is None:
        return None
    of_a_warp = -(-registers // 8) * 8 * gpu.warp
    return min(gpu.registers // of_a_warp // (threads // gpu.warp), gpu.threads // threads, gpu.blocks)


def waves(target: str, programs_at_a_time: int | None, most_programs: int | None = None) -> float | None:
    """How often the GPU is filled by one program for each chunk of ``MODEL``; None: not known for ``target``."""
    gpu = GPUS.get(target.rstrip("a"))
    if gpu is None or not programs_at_a_time:
        return None
    programs = sum(-(-math.prod(shape) // CHUNK_SIZE) for shape in shapes_of(MODEL))
    return round(min(programs, most_programs or programs) / (gpu.multiprocessors * programs_at_a_time), 1)
