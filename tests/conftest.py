"""One hypothesis profile for all tests: the same examples every time, and no deadline on a busy machine."""

from hypothesis import settings

settings.register_profile("refpeft", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("refpeft")
