"""What both phases share: time budgets, the optimizer with its guards, compilation with a way back, the log."""

import json
import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


class Budget:
    """A span of wall-clock time, from the moment it is made."""

    def __init__(self, seconds: float):
        self.start = time.monotonic()
        self.seconds = max(seconds, 1e-3)

    def progress(self) -> float:
        """Share of the time that has passed, 0 to 1."""
        return min(1.0, (time.monotonic() - self.start) / self.seconds)


class RunLog:
    """Prints every record and appends it as one JSON line, so that an interrupted run leaves a readable log."""

    def __init__(self, path: Path, start: float):
        self.path, self.start = path, start
        path.write_text("")

    def write(self, phase: str, **values) -> None:
        record = {"seconds": round(time.monotonic() - self.start, 2), "phase": phase}
        record |= {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in values.items()}
        line = json.dumps(record)
        print(line, flush=True)
        with open(self.path, "a", encoding="utf-8") as out:
            out.write(line + "\n")


class Trainer:
    """AdamW with warm-up, cosine over the time budget, clipping, averaged weights, and a way back from NaN.

    Nothing in `step` waits for the device.
    """

    def __init__(self, parameters: list[Tensor], lr: float, ema: float, warmup: int = 300):
        self.parameters, self.lr, self.ema, self.warmup = parameters, lr, ema, warmup
        matrices = [p for p in parameters if p.ndim >= 2 and min(p.shape[:2]) > 1]
        known = {id(p) for p in matrices}
        vectors = [p for p in parameters if id(p) not in known]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=parameters[0].is_cuda)
        self.average = [p.detach().clone() for p in parameters]
        self.safe = [p.detach().clone() for p in (*parameters, *self.average)]
        self.steps = 0
        self.gradient_norm = torch.zeros(())

    def step(self, loss: Tensor, progress: float) -> None:
        """One update; `progress` through the budget sets the learning rate, which ends at 0."""
        loss.backward()
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        rate = self.lr * min(1.0, (self.steps + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        with torch.no_grad():
            # A short memory at first, so that the random start is soon forgotten.
            decay = min(self.ema, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @torch.no_grad()
    def guard(self, loss: float) -> bool:
        """Remembers the state if it is sound, else returns to the last sound one with half the learning rate."""
        state = [*self.parameters, *self.average]
        if math.isfinite(loss) and math.isfinite(self.gradient_norm.item()):
            torch._foreach_copy_(self.safe, state)
            return True
        torch._foreach_copy_(state, self.safe)
        self.optimizer.state.clear()
        self.lr *= 0.5
        return False

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchanges the trained weights and their average; a second call undoes it."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            trained = parameter.clone()
            parameter.copy_(average)
            average.copy_(trained)


class Meter:
    """Mean loss and speed since the last reading; only reading waits for the device."""

    def __init__(self, device: torch.device):
        self.total, self.steps = torch.zeros((), device=device), 0
        self.since = time.monotonic()

    def add(self, loss: Tensor) -> None:
        self.total += loss.detach()
        self.steps += 1

    def read(self) -> tuple[float, float]:
        """(mean loss, steps per second), and starts anew."""
        loss = self.total.item() / self.steps
        now = time.monotonic()
        speed = self.steps / (now - self.since)
        self.total.zero_()
        self.steps, self.since = 0, now
        return loss, speed


def compiled_or_eager(function: Callable, trial: Callable[[Callable], None], wanted: bool, log: RunLog) -> Callable:
    """`function` compiled, if `trial` (one forward and backward with it) succeeds, else as it is."""
    if not wanted:
        return function
    start = time.monotonic()
    try:
        fast = torch.compile(function, dynamic=False)
        trial(fast)
    except Exception:
        traceback.print_exc()
        torch._dynamo.reset()
        log.write("compile", function=function.__name__, result="FAILED, going on without compilation")
        return function
    log.write("compile", function=function.__name__, result="ok", took=time.monotonic() - start)
    return fast
