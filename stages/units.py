"""Durations and sizes as people say them."""

TIMES = (("days", 86400, 4), ("h", 3600, 2), ("min", 60, 2))  # name, seconds, least number
SIZES = (("GB", 1e9), ("MB", 1e6))


def as_time(seconds):
    """A duration in a unit of which there are some: 3 min, 70 h, 55 days."""
    name, length, _ = next((unit for unit in TIMES if seconds >= unit[2] * unit[1]), ("s", 1, 0))
    return f"{seconds / length:.0f} {name}"


def as_size(size_bytes):
    name, unit = next((each for each in SIZES if size_bytes >= each[1]), ("kB", 1e3))
    return f"{size_bytes / unit:.1f} {name}"
