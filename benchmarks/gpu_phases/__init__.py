"""The phases of `benchmarks/gpu_check.py`, one module each, and what shows them."""
