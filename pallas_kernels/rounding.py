"""Rounding sizes to powers of two."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def power_of_two_within(n: int) -> int:
    """The largest power of two that is not above n, which is at least 1."""
    return 1 << (n.bit_length() - 1)
