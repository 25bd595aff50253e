"""Runs examples/fsdp2_checkpoint.py and kills a process of it at a chosen moment, as no signal from outside could.

torchrun --nproc-per-node 2 interrupted_run.py MOMENT MARKER [arguments of the example]    # once: MARKER is a file
python interrupted_run.py                    # runs what it reads, a JSON object a line, on processes of its own
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import fsdp2_checkpoint as example

from fused_clip_adam.backends import native

SAVE = 3  # the save that is interrupted
UPDATE = 31  # the update that is the last; one for each parameter group, so that this is half a step


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(count: int, owner, name: str, of=lambda *_, **__: True) -> None:
    """Dies at the end of that call of a function, counting those whose arguments `of` accepts."""
    _at(count, owner, name, of, before=False)


def before(count: int, owner, name: str, of=lambda *_, **__: True) -> None:
    _at(count, owner, name, of, before=True)


def _at(count: int, owner, name: str, of, before: bool) -> None:
    function, calls = getattr(owner, name), []

    def counted(*args, **options):
        calls.extend([1] * of(*args, **options))
        if before and len(calls) == count:
            die()
        out = function(*args, **options)
        if len(calls) == count:
            die()
        return out

    setattr(owner, name, counted)


def amid_write() -> None:
    """With some of a file's tensors on the disk, and not the others."""
    write_data, write_item = filesystem.FileSystemWriter.write_data, filesystem._write_item
    saves, items = [], []

    def counted_save(*args, **options):
        saves.append(1)
        return write_data(*args, **options)

    def counted_item(transforms, stream, *args, **options):
        out = write_item(transforms, stream, *args, **options)
        if len(saves) == SAVE:
            items.append(1)
            if len(items) == 5:
                stream.flush()
                die()
        return out

    filesystem.FileSystemWriter.write_data, filesystem._write_item = counted_save, counted_item


def unfinished(path, *_) -> bool:
    return Path(path).name.startswith(example.Checkpoints.UNFINISHED)


MOMENTS = {
    # name: (rank that dies, how it is armed)
    "between the updates of a step": (1, lambda: after(UPDATE, native, "update_")),
    "amid the writing of a file": (1, amid_write),
    "amid the writing of a file, process 0": (0, amid_write),
    "before .metadata": (0, lambda: before(SAVE, filesystem.FileSystem, "rename")),
    "before the name": (0, lambda: before(SAVE, os, "replace", unfinished)),
    "after the name": (0, lambda: after(SAVE, os, "replace", unfinished)),
    "before old ones go": (0, lambda: before(1, shutil, "rmtree", unfinished)),
}


def arm(moment: str, rank: int, size: int) -> None:
    victim, prepare = MOMENTS[moment]
    if rank == min(victim, size - 1):
        prepare()


# ---------------------------------------------------------------- runs on forks of a process that has imported torch


def run(arguments: list[str], size: int, moment: str | None = None, limit: float = 300.0) -> dict:
    """A run on new processes. As under torchrun, the death of one is the end of all; so is `limit`, in seconds.

    Returns:
        `exit`: of the first process that failed, minus the signal where one ended it; 0 where none did. `printed`: by
        each.
    """
    with tempfile.TemporaryDirectory(prefix="interrupted_run_") as folder:
        sys.stdout.flush()
        running = {}
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                _be(rank, arguments, size, moment, folder)
            running[pid] = rank
        first, until = 0, time.monotonic() + limit
        while running:
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    del running[pid]
                    if status:
                        first, until = first or os.waitstatus_to_exitcode(status), 0.0
            if time.monotonic() > until:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                until = float("inf")
            time.sleep(0.005)
        return {"exit": first, "printed": [Path(folder, str(rank)).read_text() for rank in range(size)]}


def _be(rank: int, arguments: list[str], size: int, moment: str | None, folder: str) -> None:
    code = 1
    try:
        with open(f"{folder}/{rank}", "w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        if size > 1:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
        if moment is not None:
            arm(moment, rank, size)
        code = example.main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)


def main() -> int:
    torch.set_num_threads(1)
    if len(sys.argv) == 1:
        serve()
        return 0
    moment, marker, *arguments = sys.argv[1:]
    if not Path(marker).exists():
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if rank == min(MOMENTS[moment][0], size - 1):
            Path(marker).touch()
        arm(moment, rank, size)
    return example.main(arguments)


if __name__ == "__main__":
    example.leave(main())
