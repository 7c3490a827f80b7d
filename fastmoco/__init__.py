"""A data-loading-centric trainer for Momentum Contrast (MoCo v1 / v2)."""

__version__ = "0.1.0"
