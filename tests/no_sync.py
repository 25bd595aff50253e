"""A context in which what would make a GPU's host wait is an error, on any device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Reads of a value, and operations whose output's size depends on the data.
READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "bincount",
    "equal",
    "is_nonzero",
)


class NoSync(TorchDispatchMode):
    """Raises AssertionError at an operation that reads the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in READS, f"{name} makes the host wait for the device"
        if name in ("index", "index_put", "index_put_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{name} by a mask makes the host wait for the device"
        return func(*args, **(kwargs or {}))
