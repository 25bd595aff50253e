"""Thin adapters to trainers. A module imports its trainer when it is itself imported, never before.

`clipping`, `metrics`, `surrogate` and `handover` import none: what several of them need.
"""
