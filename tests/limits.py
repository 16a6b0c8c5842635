"""A disk that takes no more, for tests."""

import resource
from contextlib import contextmanager


@contextmanager
def largest_file(size):
    """While open, the system lets no file of this process grow above `size` bytes, as a full disk would not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
