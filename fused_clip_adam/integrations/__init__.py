"""Thin adapters to trainers. Each module imports its trainer when it is itself imported, never before."""
