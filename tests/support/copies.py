"""Copying sets that many tests share."""

import shutil

# What a test has drawn from a set may lie decoded beside it, and would hide damage done to a copy.
NO_PIXELS = shutil.ignore_patterns("*pixels-*")
