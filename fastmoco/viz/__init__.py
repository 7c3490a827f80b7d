"""One page about a run: what it was told, how it went, and what its encoder makes of images."""
