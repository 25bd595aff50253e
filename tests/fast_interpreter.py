"""Triton's interpreter, several times faster."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def fast_interpreter() -> Iterator[None]:
    """Within it the interpreter patches triton.language once a module and not at every call of a function in a kernel.

    The launch has patched it for our functions, and Triton's own keep what their first call patched. A version of the
    interpreter that is built differently, or is not in use, is left alone.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    patch_language = getattr(interpreter, "_patch_lang", None)
    if patch_language is None or not hasattr(interpreter.InterpretedFunction, "rewrite"):
        yield
        return
    patched = set()

    def call(self, *arguments, **options):
        module = self.fn.__module__
        if module.startswith("triton.") and module not in patched:
            patch_language(self.fn)
            patched.add(module)
        return self.rewrite()(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
