"""What is measured on which device, the most important first, so that running over loses the least."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.networks import CNN, TINY_NETWORKS, TRANSFORMER, VIT, WRN, Network
from benchmarks.shapes import TINY

CHUNK_SIZES = (4096, 8192, 16384, 32768, 65536)

# By test: a case that it measures.
Plan = Iterator[tuple[str, Any]]


class Backend(NamedTuple):
    """For ``test_operations``."""

    name: str

    @property
    def id(self) -> str:
        return self.name


class Part(NamedTuple):
    """For ``test_optimizer_part``: one model's parameters over one base.

    Attributes:
        compiled: with those that need a compiler, too, which takes its time.
        chunk_size: if given, only FastSAM's kernels are measured, with tables cut into chunks of so many elements.
        pace: what the seconds of a case are multiplied by.
        fewer: leaves out all but FastSAM's kernels and the fused base.
        shifted: the gradients are not aligned as the parameters are.
    """

    model: str
    base: str = "SGD"
    dtype: str = "float32"
    compiled: bool = False
    chunk_size: int | None = None
    pace: float = 1.0
    fewer: bool = False
    shifted: bool = False

    @property
    def id(self) -> str:
        dtype = "" if self.dtype == "float32" else self.dtype
        more = [self.base, dtype, "compiled" if self.compiled else "", str(self.chunk_size or "")]
        more += ["shifted" if self.shifted else ""]
        return "-".join([plain(self.model), *filter(None, more)])


class MethodCosts(NamedTuple):
    """For ``test_method_costs``."""

    model: str
    base: str = "SGD"

    @property
    def id(self) -> str:
        return f"{plain(self.model)}-{self.base}"


class RankCosts(NamedTuple):
    """For ``test_rank_costs``; ``model``: the shapes of each rank's shards."""

    model: str
    base: str = "AdamW"

    @property
    def id(self) -> str:
        return f"{plain(self.model)}-{self.base}"


class HostTime(NamedTuple):
    """For ``test_host_time``: ``tensors`` as ResNet-50 has them, of 256 elements each, or LoRA's adapters.

    Attributes:
        frozen: how many more the optimizer is given that have no gradient.
    """

    tensors: int
    frozen: int = 0

    @property
    def id(self) -> str:
        return f"{self.tensors}-beside-{self.frozen}-frozen" if self.frozen else str(self.tensors)

    @property
    def model(self) -> str:
        return {64: "adapters", 161: "ResNet-50", 2000: "2,000 x 256"}.get(self.tensors, TINY)


HOST_TIMES = (HostTime(161), HostTime(2000), HostTime(64), HostTime(64, frozen=2000))


class Training(NamedTuple):
    """For ``test_training_step``; ``methods``: with every method beside SAM."""

    network: Network
    methods: bool = False

    @property
    def id(self) -> str:
        return plain(self.network.name)


def plan(device_type: str, *, dry: bool = False, heavyball: bool = False) -> Plan:
    """All of it, in order; ``heavyball``: whether that peer is installed, whose compiler takes its time."""
    if dry:
        return _dry()
    return _gpu() if device_type == "cuda" else _cpu(heavyball)


def _gpu() -> Plan:
    for backend in ("native", "triton", "foreach"):
        yield "test_operations", Backend(backend)
    for model in ("ResNet-50", "ViT-B/16", "2,000 x 256", "Llama 1B", "ResNet-18"):
        yield "test_optimizer_part", Part(model)
    for model, dtype in (("ViT-B/16", "float32"), ("ResNet-50", "float32"), ("Llama 1B", "bfloat16")):
        for size in CHUNK_SIZES:
            yield "test_optimizer_part", Part(model, dtype=dtype, chunk_size=size, pace=0.3)
    for case in HOST_TIMES:
        yield "test_host_time", case
    yield "test_optimizer_part", Part("ResNet-50", compiled=True)
    yield "test_optimizer_part", Part("ViT-B/16", pace=0.5, fewer=True, shifted=True)
    for model in ("ViT-B/16", "Llama 1B"):
        for base, dtype in (("AdamW", "float32"), ("SGD", "bfloat16"), ("AdamW", "bfloat16")):
            yield "test_optimizer_part", Part(model, base, dtype, pace=0.5, fewer=model == "Llama 1B")
    for network in (WRN, CNN, VIT):
        yield "test_training_step", Training(network)
    yield "test_optimizer_part", Part("Llama 1B", compiled=True)
    yield "test_method_costs", MethodCosts("ResNet-18")
    for model, base in (("WRN-28-10", "SGD"), ("GPT-2 small", "SGD"), ("ResNet-50", "AdamW")):
        yield "test_optimizer_part", Part(model, base, pace=0.5)
    yield "test_optimizer_part", Part("ViT-B/16", "AdamW", compiled=True)


def _cpu(heavyball: bool) -> Plan:
    for model, base in (
        ("4 x 4096^2", "SGD"),
        ("ResNet-50", "SGD"),
        ("2,000 x 256", "SGD"),
        ("4 x 4096^2", "AdamW"),
        ("ResNet-18", "SGD"),
        ("WRN-28-10", "SGD"),
        ("ViT-B/16", "SGD"),
        ("ViT-B/16", "AdamW"),
        ("GPT-2 small", "SGD"),
    ):
        yield "test_optimizer_part", Part(model, base)
    yield "test_method_costs", MethodCosts("ResNet-18")
    yield "test_rank_costs", RankCosts("ResNet-50")
    for case in HOST_TIMES:
        yield "test_host_time", case
    for network in (CNN, TRANSFORMER):
        yield "test_training_step", Training(network, methods=True)
    if heavyball:
        yield "test_optimizer_part", Part("ResNet-18", compiled=True)


def _dry() -> Plan:
    """Every kind of case, over in no time; compiled code is traced but not compiled."""
    for backend in ("native", "foreach"):
        yield "test_operations", Backend(backend)
    yield "test_optimizer_part", Part(TINY)
    yield "test_optimizer_part", Part(TINY, chunk_size=CHUNK_SIZES[0])
    yield "test_optimizer_part", Part(TINY, "AdamW", "bfloat16", compiled=True)
    yield "test_optimizer_part", Part(TINY, fewer=True, shifted=True)
    yield "test_host_time", HostTime(2)
    yield "test_method_costs", MethodCosts(TINY)
    yield "test_rank_costs", RankCosts(TINY)
    for network in TINY_NETWORKS:
        yield "test_training_step", Training(network)


def plain(name: str) -> str:
    """A name that pytest's -k understands, without spaces and commas."""
    return name.replace(" ", "").replace(",", "").replace("^2", "")
