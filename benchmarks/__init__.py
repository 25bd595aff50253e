"""Benchmarks of the fused step and the fused objective against their peers: see README.md in this folder."""
