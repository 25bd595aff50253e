"""The float64 buffers between host, rules and kernels, column by column: the structs of csrc/update_math.h."""

from __future__ import annotations

GROUP_SCALARS = (
    "beta1",
    "beta2",
    "max_norm",  # < 0: the group is not clipped in the prologue
    "lagged_norm",
    "sign",  # -1: maximize
    "brake_mode",
    "brake_strength",
    "brake_hold_v",
    "lr",
    "eps",
    "weight_decay",
    "coupled",
    "eps_early",
    "decay_after",
    "max_update",
    "lr_address",  # the last two are int64, and belong to the GPU backends
    "lr_is_f64",
)
"""What a parameter group asks for: struct GroupScalars."""

GROUP_SIGNALS = ("forget", "restart", "beta1_factor")
"""What rules decide for a group on the device before the prologue: struct GroupSignals. Absent: 0, 0, 1."""

CONTROL = (
    "skip",
    "grad_factor",
    "unscale",
    "a",
    "b",
    "beta2",
    "one_minus_beta2",
    "w1_a",
    "w1_b",
    "forget",
    "restart",
)
"""What follows for a group: struct Control."""

SCALARS = (
    "skip",
    "unscale",
    "grad_factor",
    "a",
    "b",
    "beta2",
    "one_minus_beta2",
    "inv_w1",
    "inv_sqrt_w2",
    "eps",
    "lr",
    "decay",
    "l2",
    "max_update",
    "forget",
    "keep",
    "theta",
    "spike_floor",
    "tau",
    "tau_factor",
    "prox",
)
"""Of a tensor, between prologue and update: struct TensorScalars. Rules change them, see group_step.py."""

COLUMN = {name: column for column, name in enumerate(SCALARS)}
WIDTH = 24
"""Columns of a row, the unused last ones included."""

NO_FORGET, FORGET_BEFORE, FORGET_AFTER = range(3)
"""Values of `forget`: enum Forget."""

SQUARES_MAX, DOT, AGREE, RMS, METRIC, TAU_SQUARES, FADAM_SQUARES = range(7)
"""What a reduction sums: enum Sum."""
