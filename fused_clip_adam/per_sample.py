"""What `step_from_scores` and `step_from_gradients` take: scores of single samples, gradients of single micro-batches.

    module, log_prob, inputs [B, ...] -> vmap(grad), a chunk of samples at a time -> {parameter: [B, *shape]}, logp
    backward() of micro-batch b -> row b of {parameter: [count, *shape]}

Both are dicts by parameter, so that they fit an optimizer whatever its groups, order and frozen parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

MEASURED = 2
"""Samples whose memory is measured. Of one alone, tensors expanded along the batch would look free."""


def per_sample_scores(
    module: nn.Module,
    log_prob: Callable[..., Tensor],
    *inputs: Any,
    params: Iterable[Tensor] | None = None,
    randomness: str = "error",
    dtype: torch.dtype | None = None,
    memory: int = 2**28,
    chunk_size: int | None = None,
) -> tuple[dict[Tensor, Tensor], Tensor]:
    """(scores, logp) of B samples: scores[p][b] = d logp_b / d p, as `step_from_scores` takes them.

        def log_prob(policy, state, action):  # of one sample: no batch dimension
            return policy(state).log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)

        scores, logp = fca.per_sample_scores(policy, log_prob, states, actions)
        opt.step_from_scores(scores, logp, old_logp, advantages)

    Args:
        module: holds the parameters. Neither it nor any `.grad` is changed.
        log_prob: log_prob(module, *sample) -> the log-probability of one sample, 0-d; or [T], of the tokens of a
            sequence, whose sum is differentiated (0 for tokens that do not count). It runs under torch.func.vmap, which
            says what that forbids: control flow on values, `item()`, writes to buffers.
        *inputs: tensors [B, ...], or tuples, lists and dicts of such, on the module's device. A sample is the same
            without the first dimension. What all samples share belongs in log_prob.
        params: of the module; None: all that require grad. A parameter that log_prob does not use gets scores of 0,
            with which momentum and weight decay move it; leave it out and it stays as it is.
        randomness: of dropout and the like, as torch.func.vmap: "error", "different" or "same" for each sample.
            "different" draws anew with another chunking.
        dtype: of the scores, a floating dtype; None: each parameter's. Scores are rounded once, when they are written.
        memory: bytes that a chunk of samples may take beyond the result: its scores in the parameters' dtype and all
            that forward and backward allocate, measured on the first two samples. A chunk has one sample at least.
        chunk_size: samples at a time, and nothing is measured; None: as many as `memory` allows.

    Returns:
        scores: by parameter, [B, *its shape], on its device, contiguous; of a tied parameter the sum over its uses.
        logp: [B], or [B, T] (then a score is of a whole sequence, which `step_from_scores` takes with objectives that
            weigh all tokens of a sequence alike), detached, as log_prob returns it. [0] where B = 0.

    Raises:
        TypeError: module, log_prob, inputs, dtype or sizes of another type. ValueError: no parameters, one that is not
        the module's, BatchNorm that would mix samples, inputs that disagree about B, a log-probability of another
        shape, randomness or sizes out of range. RuntimeError: torch's, of what vmap or autograd cannot do.

    Source: this file. Chunks and measuring; the differentiation is torch.func's.
    """
    names = _names_of(module, params)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be None or a floating dtype, got {dtype!r}")
    if randomness not in ("error", "different", "same"):
        raise ValueError(f'randomness must be "error", "different" or "same", got {randomness!r}')
    for name, value in {"memory": memory, "chunk_size": chunk_size}.items():
        if value is not None or name == "memory":
            _check_count(name, value)
    leaves, spec = _leaves_of(inputs)
    B = leaves[0].shape[0]

    def stack_of(p: Tensor) -> Tensor:
        return torch.empty((B, *p.shape), dtype=dtype or p.dtype, device=p.device)

    if B == 0:
        return {p: stack_of(p) for p in names}, next(iter(names)).new_empty(0)
    run = _runner(module, log_prob, names, leaves, spec, randomness)
    with torch.no_grad():  # of the outer graph; torch.func records its own
        size = _fitting(run, names, B, memory) if chunk_size is None else chunk_size
        if size >= B:  # what vmap makes is the result
            gradients, logp = run(0, B)
            return {p: own.to(dtype or p.dtype).contiguous() for p, own in gradients.items()}, logp
        scores, logps = {p: stack_of(p) for p in names}, []
        for start in range(0, B, size):
            stop = min(start + size, B)
            # Every chunk draws the same numbers, where all samples are to.
            gradients, logp = run(start, stop, put_back=randomness == "same" and stop < B)
            for p, score in scores.items():
                score[start:stop].copy_(gradients[p])
            del gradients  # before the next chunk's: `memory` has room for one
            logps.append(logp)
    return scores, torch.cat(logps)


class MicroBatchGradients:
    """Stacks that backward() writes gradients of whole micro-batches into, for `step_from_gradients`.

        micro = fca.MicroBatchGradients(model.parameters(), count=4)
        for b, batch in enumerate(batches):
            micro.select(b)
            loss_of(batch).backward()  # accumulates into row b: p.grad is that row
        opt.step_from_gradients(micro.gradients, weights)  # weights [4]; 0 drops a micro-batch

    Made once and used for every step. As a context manager it releases the parameters at the end.

    Args:
        params: of a model or an optimizer's group; those that do not require grad are left out.
        count: of micro-batches, at least 1.
        dtype: of the stacks, a floating dtype that backward() casts each gradient to (`Tensor.grad_dtype`) before it
            adds it to the row; None: each parameter's `grad_dtype`, by default its dtype.

    Raises:
        TypeError, ValueError: no parameter that requires grad, one that is no leaf, count or dtype out of range.

    Source: this file.
    """

    def __init__(self, params: Iterable[Tensor], count: int, dtype: torch.dtype | None = None) -> None:
        _check_count("count", count)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be None or a floating dtype, got {dtype!r}")
        own = [p for p in _tensors("params", params) if p.requires_grad]
        if not own:
            raise ValueError("params has no parameter that requires grad")
        for p in own:
            if not p.is_leaf:
                raise ValueError(f"params must be leaves of the graph, got a {list(p.shape)} that was computed")
        self._stacks = {
            p: torch.zeros((count, *p.shape), dtype=dtype or p.grad_dtype or p.dtype, device=p.device) for p in own
        }
        self._count = count
        self._rows: dict[Tensor, Tensor] = {}  # what .grad is, of the last selected row
        self._unread: int | None = None  # the row that backward() may be writing
        self._before: dict[Tensor, tuple[Tensor | None, torch.dtype | None]] = {}  # .grad, .grad_dtype

    def select(self, b: int) -> None:
        """Zeroes row b and makes it the `.grad` of every parameter.

        Args:
            b: 0 to count - 1.

        Raises:
            IndexError: b out of range. RuntimeError: as `gradients`, of the row selected before.
        """
        if not 0 <= b < self._count:
            raise IndexError(f"b must be 0 to {self._count - 1}, got {b}")
        self._check_written()
        if not self._before:
            self._before = {p: (p.grad, p.grad_dtype) for p in self._stacks}
        self._rows = {p: stack[b].zero_() for p, stack in self._stacks.items()}
        self._unread = b
        for p, row in self._rows.items():
            _set_grad(p, row, row.dtype)

    @property
    def gradients(self) -> dict[Tensor, Tensor]:
        """By parameter, [count, *its shape]; not a copy. A row that was not selected is as it was, at first 0: give it
        weight 0. A parameter that no micro-batch used has gradients of 0, not None: momentum and weight decay move it.

        Raises:
            RuntimeError: a `.grad` is no longer the row last selected, so that its gradient went elsewhere.
        """
        self._check_written()
        self._unread = None
        return dict(self._stacks)

    def release(self) -> None:
        """Puts back every `.grad` and `grad_dtype` as they were before the first `select`. The stacks stay."""
        for p, (grad, dtype) in self._before.items():
            _set_grad(p, grad, dtype)
        self._before, self._rows, self._unread = {}, {}, None

    def __enter__(self) -> MicroBatchGradients:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _check_written(self) -> None:
        if self._unread is not None and any(p.grad is not row for p, row in self._rows.items()):
            raise RuntimeError(
                f".grad was replaced after select({self._unread}), so that its gradients are not in the stacks: until "
                f"they are read leave out zero_grad(), backward(create_graph=True) and whatever else sets .grad"
            )


def _runner(
    module: nn.Module,
    log_prob: Callable[..., Tensor],
    names: dict[Tensor, str],
    leaves: list[Tensor],
    spec: Any,
    randomness: str,
) -> Callable[..., tuple[dict[Tensor, Tensor], Tensor]]:
    """run(start, stop) -> (scores by parameter, log-probabilities) of these samples, all at once."""
    one_sample = _OneSample(module, log_prob)
    values = {name: p.detach() for p, name in names.items()}
    others = [device for device in {p.device for p in names} if device.type != "cpu"]

    def of_sample(values: dict[str, Tensor], *leaves: Tensor) -> tuple[Tensor, Tensor]:
        sample = pytree.tree_unflatten(list(leaves), spec)
        logp = torch.func.functional_call(one_sample, values, sample)
        return logp.sum(), logp

    of_samples = torch.func.vmap(
        torch.func.grad_and_value(of_sample, has_aux=True), in_dims=(None, *[0] * len(leaves)), randomness=randomness
    )

    def run(start: int, stop: int, put_back: bool = False) -> tuple[dict[Tensor, Tensor], Tensor]:
        """`put_back`: the random generators are then as before."""
        kind = others[0].type if others else "cuda"
        with torch.random.fork_rng(others, enabled=put_back, device_type=kind):
            gradients, (_, logp) = of_samples(values, *(leaf[start:stop] for leaf in leaves))
        return {p: gradients[name] for p, name in names.items()}, logp

    return run


def _fitting(run: Callable[..., Any], names: dict[Tensor, str], B: int, memory: int) -> int:
    """How many samples at a time need at most `memory` bytes; at least 1."""
    row = sum(p.numel() * p.element_size() for p in names)
    if MEASURED * row > memory:
        return 1
    if MEASURED >= B:
        return B
    with _PeakBytes() as measured:
        run(0, MEASURED, put_back=True)
    return max(1, memory * MEASURED // max(measured.peak, 1))


class _OneSample(nn.Module):
    """log_prob as a module, so that functional_call swaps parameters in the user's own, whose attributes it sees."""

    def __init__(self, module: nn.Module, log_prob: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module, self.log_prob = module, log_prob

    def forward(self, *sample: Any) -> Tensor:
        logp = self.log_prob(self.module, *sample)
        if not isinstance(logp, Tensor):
            raise TypeError(f"log_prob must return a tensor, got {type(logp).__name__}")
        if logp.dim() > 1:
            raise ValueError(
                f"log_prob must return the log-probability of one sample, 0-d, or [T] of its tokens, "
                f"got {list(logp.shape)}"
            )
        return logp


class _PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time. Sees every operation below vmap and autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in pytree.tree_leaves(out):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            if storage in self._known or id(storage) in given:  # a view, or written in place
                continue
            self._known[storage] = None
            self._count(storage.nbytes())
            weakref.finalize(storage, self._count, -storage.nbytes()).atexit = False
        return out

    def _count(self, more: int) -> None:
        self._live += more
        self.peak = max(self.peak, self._live)


def _names_of(module: nn.Module, params: Iterable[Tensor] | None) -> dict[Tensor, str]:
    """By parameter, its name; a tied one is there once."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    for name, own in module.named_modules():
        if isinstance(own, nn.modules.batchnorm._BatchNorm) and (own.training or own.running_mean is None):
            raise ValueError(
                f"module has {name or 'itself'}, a {type(own).__name__} that normalises over the batch, so that no "
                f"sample has a score of its own: module.eval(), with running statistics"
            )
    named = {p: f"module.{name}" for name, p in module.named_parameters()}  # in _OneSample
    if params is None:
        out = {p: name for p, name in named.items() if p.requires_grad}
        if not out:
            raise ValueError("module has no parameter that requires grad")
        return out
    chosen = _tensors("params", params)
    for i, p in enumerate(chosen):
        if p not in named:
            raise ValueError(f"params[{i}], {list(p.shape)}, is not a parameter of module")
    if not chosen:
        raise ValueError("params is empty")
    return {p: named[p] for p in chosen}


def _leaves_of(inputs: tuple[Any, ...]) -> tuple[list[Tensor], Any]:
    """(the tensors of all inputs, how to put them together again)."""
    paths, spec = pytree.tree_flatten_with_path(inputs)
    if not paths:
        raise ValueError("there must be at least one input, a tensor [B, ...]")
    for path, leaf in paths:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"inputs{pytree.keystr(path)} is a {type(leaf).__name__}; accepted: tensors [B, ...], in tuples, lists "
                f"and dicts"
            )
        if leaf.dim() == 0 or leaf.shape[0] != paths[0][1].shape[0]:
            first = paths[0]
            raise ValueError(
                f"inputs must have one first dimension, B: inputs{pytree.keystr(path)} is {list(leaf.shape)}, "
                f"inputs{pytree.keystr(first[0])} {list(first[1].shape)}"
            )
    return [leaf for _, leaf in paths], spec


def _tensors(name: str, params: Iterable[Tensor]) -> list[Tensor]:
    """Without repetitions."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(f"{name} must be an iterable of parameters, got {type(params).__name__}")
    out = list(params)
    for i, p in enumerate(out):
        if not isinstance(p, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor, got {type(p).__name__}")
    return list(dict.fromkeys(out))


def _set_grad(p: Tensor, grad: Tensor | None, dtype: torch.dtype | None) -> None:
    p.grad = None  # torch checks a new grad_dtype against the old gradient
    p.grad_dtype = dtype
    p.grad = grad


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
