"""The flags of a run, once they are read: data that nothing changes."""

from collections.abc import Mapping


class Flags(Mapping):
    """Flags {name: value}, read-only; a value is an attribute too. `flags | {...}` are new ones with other values."""

    __slots__ = ("_values",)

    def __init__(self, values):
        object.__setattr__(self, "_values", dict(values))

    def __getattr__(self, name):
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, _value):
        raise AttributeError(f"flags are read-only, so is {name}; `flags | {{...}}` are others")

    def __getitem__(self, name):
        return self._values[name]

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)

    def __or__(self, others):
        return Flags(self._values | dict(others))

    def __reduce__(self):  # how they come to other processes
        return Flags, (self._values,)

    def __repr__(self):
        return f"Flags({self._values!r})"
