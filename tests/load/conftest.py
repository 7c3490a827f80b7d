"""Settings and helpers of the loader's tests."""

from hypothesis import settings

# The same examples on every run, however slow the machine.
settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")
