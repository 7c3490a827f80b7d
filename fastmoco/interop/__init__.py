"""Weights that come from other programs, and weights and features that go to them."""
