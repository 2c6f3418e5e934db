"""How fast a machine is at what points are made of: measured here in a second or two, or from a data sheet."""

import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from sweeps.costs import Work
from sweeps.paths import default_cache
from sweeps.store import digest, once

VERSION = 1
SIDE = 1024  # of the products that are measured
WEIGHTS = 1 << 17  # rounded to measure a search
SEARCHES = ("e8p_2bit", "e8p_3bit", "e8p_4bit", "trellis_1bit", "trellis_2bit", "trellis_3bit", "trellis_4bit")
OTHERS = "uniform_4bit"  # stands for every other quantizer
WRITTEN = 1 << 25  # bytes


@dataclass(frozen=True)
class Machine:
    """Rates with all threads, in operations, weights or bytes a second; `kernel_s` is what a small kernel takes.

    `search` holds weights a second by quantizer (8 of them are one E8P vector); `alone` is of one thread.
    """

    name: str
    threads: int
    model: float
    mixed: float
    single: float
    alone: float
    search: dict[str, float]
    memory: float
    disk: float
    kernel_s: float = 0.0  # 0: the column loops are compiled
    capacity: float = 0.0  # bytes of memory
    cards: int = 1

    @classmethod
    def measured(cls, dtype: str = "bfloat16", cache: Path | None = None, threads: int = 0) -> "Machine":
        """This machine with so many threads (0: as many as torch takes); measured once, then from the cache."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            return cls._known(dtype, cache or default_cache())
        finally:
            torch.set_num_threads(before)

    @classmethod
    def _known(cls, dtype: str, cache: Path) -> "Machine":
        import torch

        versions = [torch.__version__, platform.python_version(), VERSION]
        processor = torch.cpu.get_capabilities().get("cpu_name") or platform.processor()
        key = digest([processor, platform.machine(), torch.get_num_threads(), dtype, *versions])
        file = cache / "machines" / f"{key[:24]}.json"
        found, _ = once(file, lambda: asdict(_measured(dtype, file.parent)))
        return cls(**found)

    @classmethod
    def h100(cls, cards: int = 1) -> "Machine":
        """NVIDIA's data sheet of the H100 SXM, without sparsity and TF32: nothing here was measured.

        Not from the sheet: `alone` (factorisations do a thirtieth of what products do), a kernel's 5 microseconds,
        the disk, and searches, whose tensor code is bound by memory: so many bytes a weight as it makes and reads.
        """
        memory, e8p, trellis = 3.35e12, 1e3, 150e3
        search = {"e8p_2bit": memory / e8p, "e8p_3bit": memory / (2 * e8p), "e8p_4bit": memory / (3 * e8p)}
        search |= {f"trellis_{bits}bit": memory / trellis for bits in range(1, 5)} | {OTHERS: memory / 40}
        rates = {"model": 989e12, "mixed": 67e12, "single": 67e12, "alone": 2e12, "search": search}
        rest = {"memory": memory, "disk": 2e9, "kernel_s": 5e-6, "capacity": 80e9, "cards": cards}
        return cls(f"{cards} x H100 SXM (data sheet)", 1, **rates, **rest)

    def seconds(self, work: Work, slack: dict[str, float]) -> dict[str, float]:
        """Seconds of each kind of work: counted amount over rate, times how far from the limit it was found to be."""
        amounts = {"model": work.model, "mixed": work.mixed, "single": work.single, "solves": work.solves}
        rates = {"model": self.model, "mixed": self.mixed, "single": self.single, "solves": self.single}
        rates |= {"alone": self.alone, "moved": self.memory, "disk": self.disk}
        amounts |= {"alone": work.alone, "moved": work.moved, "disk": work.disk}
        found = {kind: amount / rates[kind] * slack.get(kind, 1.0) for kind, amount in amounts.items()}
        searched = sum(count / self.search.get(name, self.search[OTHERS]) for name, count in work.search.items())
        found["search"] = searched * slack.get("search", 1.0) + work.kernels * self.kernel_s
        return found | {"steps": work.steps * slack.get("steps", 0.0)}


def _best(work: Callable[[], object], runs: int = 5, clock: Callable[[], float] | None = None) -> float:
    """Seconds of the fastest run, after one that warms up.

    They are the processors' time over torch's threads: what other programs take of the machine does not count.
    """
    import torch

    share = 1 if clock else torch.get_num_threads()
    clock = clock or time.process_time
    work()
    times = []
    for _ in range(runs):
        start = clock()
        work()
        times.append(clock() - start)
    return max(min(times), 1e-6) / share


def _measured(dtype: str, folder: Path) -> Machine:
    import psutil
    import torch

    from caldera.linalg import one_thread
    from caldera.moments import products_of
    from caldera.quantizers import get_quantizer

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SIDE, SIDE, generator=generator)
    low, total, operations = x.to(getattr(torch, dtype)), torch.zeros(SIDE, SIDE), 2.0 * SIDE**3

    def mixed() -> None:
        with products_of(low):
            total.addmm_(low.float().T, low.float())

    def factor() -> None:
        with one_thread():
            torch.linalg.cholesky_ex(definite)

    definite = x @ x.T + SIDE * torch.eye(SIDE)
    large, search = torch.randn(1 << 24, generator=generator), {}
    for name in (*SEARCHES, OTHERS):
        quantizer, weights = get_quantizer(name), torch.randn(512, WEIGHTS // 512, generator=generator)
        weights = weights[:, :32] if quantizer.codebook.sequential else weights
        scales = quantizer.fit(weights)
        search[name] = weights.numel() / _best(lambda: quantizer.encode(weights, scales), 2)  # noqa: B023
    return Machine(
        name=f"{torch.cpu.get_capabilities().get('cpu_name') or platform.processor()}, {platform.system()}",
        threads=torch.get_num_threads(),
        model=operations / _best(lambda: low @ low),
        mixed=operations / _best(mixed),
        single=operations / _best(lambda: x @ x),
        alone=SIDE**3 / 3 / _best(factor, clock=time.thread_time),
        search=search,
        memory=2 * 4 * large.numel() / _best(lambda: large.add_(1.0)),
        disk=_disk(folder),
        capacity=psutil.virtual_memory().total,
    )


def _disk(folder: Path) -> float:
    """Bytes a second that are written and flushed."""
    from caldera.files import flush

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        data = bytes(WRITTEN)

        def write() -> None:
            file.seek(0)
            file.write(data)
            file.flush()
            flush(Path(file.name))

        return WRITTEN / _best(write, 3, time.perf_counter)
