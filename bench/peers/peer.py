"""What the peers share: the protocol that bench/src/peer.rs describes, and timing like that of the benchmarks.

A peer gives `serve` a function that makes a case: from its sizes, the ways to do it, each a call that takes the index of a set
of inputs. Calls that take less than 20 ms are replayed as CUDA graphs of 2 ms or more, so that the host costs nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SAMPLE_MS = 2.0
RECORDED_BELOW_MS = 20.0
MOST_CALLS = 512

#: Where pixel_model.py is: named by the environment, in the source tree, or in a bundle.
FIXTURES = [Path(os.environ["L2P_FIXTURES"])] if "L2P_FIXTURES" in os.environ else []
FIXTURES += [Path(__file__).parent / "../../tests/fixtures", Path(__file__).parent / "../fixtures"]


def use_fixtures() -> None:
    """Makes `import pixel_model` work."""
    found = next((folder for folder in FIXTURES if (folder / "pixel_model.py").is_file()), None)
    if found is None:
        raise FileNotFoundError("pixel_model.py is not in " + " or ".join(map(str, FIXTURES)) + "; see L2P_FIXTURES")
    sys.path.insert(0, str(found.resolve()))


@dataclass
class Context:
    """What every case needs."""

    device: torch.device
    dtype: torch.dtype
    #: torch.compile's mode, None without compilation.
    compile: str | None
    generator: torch.Generator

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Unit normal values."""
        values = torch.empty(shape, device=self.device, dtype=dtype or self.dtype)
        return values.normal_(generator=self.generator)

    def compiled(self, function: Callable) -> Callable:
        """The function, compiled for the shapes that it meets."""
        return torch.compile(function, mode=self.compile, dynamic=False)

    def attention(self, backend: str):
        """Attention by `cudnn` or `flash` where the shapes allow it; by whatever there is on the CPU."""
        first = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
        if not self.cuda:
            return nullcontext()
        rest = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        return sdpa_kernel([first[backend], *(other for other in rest if other != first[backend])], set_priority=True)


def random_weights(module: torch.nn.Module, context: Context) -> torch.nn.Module:
    """Random weights that keep activations near 1, for inference."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            inputs = math.prod(parameter.shape[1:])
            if parameter.dim() == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.normal_(0.0, inputs**-0.5, generator=context.generator)
    return module.eval().requires_grad_(False)


@dataclass
class Way:
    """One way to do a case."""

    #: Takes the index of a set of inputs; the result is kept for a rotation.
    call: Callable[[int], object]
    sets: int = 1
    #: Entered around everything that is run.
    around: Callable = nullcontext
    #: Bytes that are resident beside it in the comparison, without being held here.
    beside: int = 0
    #: Whether short calls are replayed as a graph.
    recorded: bool = True


class Timer:
    """Times one way like bench/src/timing.rs."""

    def __init__(self, way: Way, cuda: bool):
        self.way, self.cuda, self.calls, self.next, self.graph = way, cuda, 1, 0, None
        for _ in range(2):
            self.rotate(0, way.sets)
        once = self.timed(lambda: self.rotate(0, way.sets)) / way.sets
        if once >= RECORDED_BELOW_MS or not way.recorded:
            return
        calls = min(max(int(SAMPLE_MS / max(once, 1e-6)) + 1, 1), MOST_CALLS)
        self.calls = -(-calls // way.sets) * way.sets
        if cuda:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.rotate(0, self.calls)
            self.graph = graph
            self.sample()

    def rotate(self, first: int, count: int) -> None:
        kept: deque = deque(maxlen=self.way.sets)
        for index in range(first, first + count):
            kept.append(self.way.call(index % self.way.sets))

    def timed(self, work: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - start)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def sample(self) -> float:
        """Milliseconds per call."""
        if self.graph is not None:
            return self.timed(self.graph.replay) / self.calls
        first, self.next = self.next, (self.next + self.calls) % self.way.sets
        return self.timed(lambda: self.rotate(first, self.calls)) / self.calls


def memory(way: Way, cuda: bool) -> dict:
    """Bytes that tensors take at most during one call."""
    if not cuda:
        return {}
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    way.call(0)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return {"peak_bytes": peak + way.beside, "activation_bytes": peak - resident, "beside_bytes": way.beside}


Cases = Callable[[dict, Context], dict[str, Way]]


class Server:
    """Answers one command after the other."""

    def __init__(self, make: Cases, context: Context):
        self.make, self.context = make, context
        self.ways: dict[str, Way] = {}
        self.timers: dict[str, Timer] = {}

    def answer(self, command: dict) -> dict:
        if "case" in command:
            self.release()
            self.ways = self.make(command["case"], self.context)
            return {"variants": list(self.ways)}
        if "release" in command:
            self.release()
            return {}
        name = command.get("run") or command["memory"]
        way = self.ways[name]
        with way.around():
            if "memory" in command:
                # What a recording holds is no part of one call's memory.
                self.timers.pop(name, None)
                return memory(way, self.context.cuda)
            if name not in self.timers:
                self.timers[name] = Timer(way, self.context.cuda)
            timer = self.timers[name]
            return {"samples_ms": [timer.sample() for _ in range(command["samples"])]}

    def release(self) -> None:
        self.ways, self.timers = {}, {}
        gc.collect()
        if self.context.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def serve(make: Cases) -> None:
    """Runs a peer until its input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", default=None, help="torch.compile's mode")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # What libraries print must not get into the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    torch.backends.cudnn.benchmark = True
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(arguments.seed)
    context = Context(device, torch.bfloat16 if cuda else torch.float32, arguments.compile, generator)
    server = Server(make, context)
    print(json.dumps({"torch": torch.__version__}), file=answers)
    for line in sys.stdin:
        try:
            with torch.inference_mode():
                answer = server.answer(json.loads(line))
        except Exception as error:  # noqa: BLE001 - whatever it is, the benchmark has to be told
            traceback.print_exc()
            reason = (str(error).strip() or "no message").splitlines()[0]
            # What failed must not keep memory from what comes next.
            del error
            server.timers = {}
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
            answer = {"error": reason}
        print(json.dumps(answer), file=answers)
