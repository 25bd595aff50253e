"""Processes of one gloo process group, which run a test's functions: started once for many tests."""

from __future__ import annotations

import functools
import os
import tempfile
import time
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class World:
    """`run(function, *args)` calls `function(*args)` on every rank and returns what each returned, in rank order.

    The function must be importable (a test module's own), its arguments and results picklable and on the CPU.
    """

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        rendezvous = tempfile.mktemp(prefix="fused_clip_adam_ranks_")
        self.size = size
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, rendezvous, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, *args, **options) -> list:
        for pipe in self.pipes:
            pipe.send((function, args, options))
        answers: dict[int, tuple] = {}
        limit = time.monotonic() + 120
        while len(answers) < self.size and time.monotonic() < limit:
            for rank, pipe in enumerate(self.pipes):
                if rank not in answers and pipe.poll(0.005):
                    answers[rank] = pipe.recv()
                    if not answers[rank][0]:  # the others may wait for it for ever
                        limit = min(limit, time.monotonic() + 3)
        failures = [f"rank {rank}: {text}" for rank, (ok, text) in sorted(answers.items()) if not ok]
        if silent := [rank for rank in range(self.size) if rank not in answers]:
            self.close()
            worlds.cache_clear()
            failures.append(f"ranks {silent} of {self.size} did not answer: a collective that not all ranks call?")
        if failures:
            raise AssertionError("\n".join(failures))
        return [answers[rank][1] for rank in range(self.size)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()


@functools.cache
def worlds(size: int) -> World:
    return World(size)


def _serve(rank: int, size: int, rendezvous: str, pipe) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    while True:
        try:
            function, args, options = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            pipe.send((True, function(*args, **options)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
