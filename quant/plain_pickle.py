"""Pickles of plain data (dicts, lists, tuples, numbers, strings) read without Python's own unpickler.

That one imports and calls what a pickle asks for, takes gigabytes for a memo index, and builds tuples nested so deeply
that to hash or drop them ends the interpreter. Here an opcode either makes plain data or is refused, and what is made is
bounded: `loads` takes time and memory in proportion to the bytes, and whatever walks over its result does, too.
"""

import struct

DEEPEST = 50  # containers in one another; labelled rows have four
LARGEST_NUMBER_BYTES = 16  # of an integer
EXPANDED = 4  # values that may be met in walking over the data, times the bytes of the pickle: containers may be shared
LEAST_EXPANDED = 10_000
CONTAINERS = (dict, list, tuple)
NAMES = {
    **{b"R": "a call", b"\x81": "a new object", b"\x92": "a new object", b"b": "an object's state"},
    **{b"P": "a stored object", b"Q": "a stored object", b"i": "an object", b"o": "an object"},
}


def loads(data):
    """The plain data in a pickle of protocol 2 or later, as bytes; ValueError says why it is not read."""
    try:
        found = _Reader(data).read()
    except (IndexError, KeyError, struct.error):
        raise ValueError("it is cut off or damaged") from None
    except TypeError:
        raise ValueError("it has a dictionary whose keys are no plain values") from None
    _check_walk(found, max(LEAST_EXPANDED, EXPANDED * len(data)))
    return found


class _Reader:
    """The state of reading one pickle: a stack of values, those below each mark, and the memo."""

    def __init__(self, data):
        self.data, self.place = data, 0
        self.stack, self.below, self.memo = [], [], {}

    def read(self):
        data = self.data
        if data[:1] != b"\x80" or not 2 <= data[1] <= 5:
            raise ValueError("it is no pickle of protocol 2 to 5; save it again with protocol=4")
        while True:
            opcode = data[self.place]
            self.place += 1
            if opcode == STOP:
                break
            act = ACTS[opcode]
            if act is None:
                name = NAMES.get(bytes([opcode]), f"the opcode {opcode:#04x}")
                raise ValueError(f"it has {name}, and only plain Python data is read")
            act(self)
        (found,) = self.stack if len(self.stack) == 1 and not self.below else (_cut_off(),)
        return found

    def take(self, count):
        end = self.place + count
        if end > len(self.data):
            raise IndexError
        piece, self.place = self.data[self.place : end], end
        return piece

    def number(self, count):
        return int.from_bytes(self.take(count), "little")

    def text(self, count):
        try:
            self.stack.append(str(self.take(self.number(count)), "utf-8", "surrogatepass"))
        except UnicodeDecodeError:
            raise ValueError("it has a text that is not UTF-8") from None

    def integer(self, count):
        size = self.number(count)
        if size > LARGEST_NUMBER_BYTES:
            raise ValueError("it has a number that is too large")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def signed(self):
        self.stack.append(int.from_bytes(self.take(4), "little", signed=True))

    def float(self):
        self.stack.append(struct.unpack(">d", self.take(8))[0])

    def mark(self):
        self.below.append(self.stack)
        self.stack = []

    def above_mark(self):
        """The values above the last mark, which go."""
        values, self.stack = self.stack, self.below.pop()
        return values

    def append(self):
        value = self.stack.pop()
        _of_type(self.stack[-1], list).append(value)

    def appends(self):
        values = self.above_mark()
        _of_type(self.stack[-1], list).extend(values)

    def set_item(self):
        value, key = self.stack.pop(), self.stack.pop()
        _of_type(self.stack[-1], dict)[_key(key)] = value

    def set_items(self):
        values = self.above_mark()
        target = _of_type(self.stack[-1], dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def tuple_of(self, count):
        values = tuple(self.stack[len(self.stack) - count :])
        if len(values) != count:
            raise IndexError
        del self.stack[len(self.stack) - count :]
        self.stack.append(values)

    def push(self, value):
        self.stack.append(value)

    def refuse_global(self):
        name = bytes(self.take(min(200, len(self.data) - self.place))).split(b"\n")[:2]
        raise _asks_for(b".".join(name).decode("utf-8", "replace"))

    def refuse_global_on_stack(self):
        raise _asks_for(".".join(map(str, self.stack[-2:])))

    def memoize(self, index):
        self.memo[index] = self.stack[-1]


def _asks_for(name):
    return ValueError(f"it asks for {name[:100]}, and only plain Python data is read")


def _cut_off():
    raise IndexError


def _of_type(value, kind):
    if type(value) is not kind:
        raise IndexError
    return value


def _key(value):
    """The key of a dictionary: no container, for to hash nested tuples takes as much of the interpreter's own stack."""
    if isinstance(value, CONTAINERS):
        raise TypeError
    return value


ACTS = [None] * 256  # by opcode, those of pickletools that plain data needs
STOP = ord(".")
for _opcode, _act in {
    b"\x80": lambda reader: reader.take(1),  # the protocol
    b"\x95": lambda reader: reader.take(8),  # the length of a frame, which this reader does not need
    b"}": lambda reader: reader.push({}),
    b"]": lambda reader: reader.push([]),
    b")": lambda reader: reader.push(()),
    b"N": lambda reader: reader.push(None),
    b"\x88": lambda reader: reader.push(True),
    b"\x89": lambda reader: reader.push(False),
    b"(": _Reader.mark,
    b"c": _Reader.refuse_global,
    b"\x93": _Reader.refuse_global_on_stack,
    b"a": _Reader.append,
    b"e": _Reader.appends,
    b"s": _Reader.set_item,
    b"u": _Reader.set_items,
    b"t": lambda reader: reader.push(tuple(reader.above_mark())),
    b"\x85": lambda reader: reader.tuple_of(1),
    b"\x86": lambda reader: reader.tuple_of(2),
    b"\x87": lambda reader: reader.tuple_of(3),
    b"0": lambda reader: reader.stack.pop(),
    b"K": lambda reader: reader.push(reader.number(1)),
    b"M": lambda reader: reader.push(reader.number(2)),
    b"J": _Reader.signed,
    b"\x8a": lambda reader: reader.integer(1),
    b"\x8b": lambda reader: reader.integer(4),
    b"G": _Reader.float,
    b"\x8c": lambda reader: reader.text(1),
    b"X": lambda reader: reader.text(4),
    b"\x8d": lambda reader: reader.text(8),
    b"\x94": lambda reader: reader.memoize(len(reader.memo)),
    b"q": lambda reader: reader.memoize(reader.number(1)),
    b"r": lambda reader: reader.memoize(reader.number(4)),
    b"h": lambda reader: reader.push(reader.memo[reader.number(1)]),
    b"j": lambda reader: reader.push(reader.memo[reader.number(4)]),
}.items():
    ACTS[_opcode[0]] = _act


def _check_walk(found, most):
    """ValueError if the data is nested deeper than DEEPEST, or a walk over it would meet more than `most` values."""
    met, level = 0, [found]
    for _ in range(DEEPEST):
        below = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value.values())
            elif isinstance(value, list | tuple):
                below.extend(value)
            if met + len(below) > most:
                raise ValueError("its containers are in one another too often")
        met += len(below)
        level = below
        if not level:
            return
    raise ValueError(f"its containers are nested deeper than {DEEPEST}")
