"""Mutations of a file's bytes, of JSON, and of data that is kept as tensors, arrays or pickles."""

import copy
import json
import math
import struct

import numpy as np
import torch

HOSTILE_BYTES = (
    *(b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 7, struct.pack("<d", math.nan), struct.pack("<q", 2**62)),
    *(b"|S0", b"<f9", b"r\x00\x00\x00\x10", b"'" * 9, b"{" * 9, b"\n\n", "é".encode("latin-1")),
)
HOSTILE = (
    *(None, True, 0, -1, 1, 2**31, 2**62, -(2**63), 10**30, 10**400, 1.5, math.nan, math.inf, -math.inf, 1e300),
    *("", "x", "\0", "../../x", "é" * 300, "9" * 5000, "model.x.weight_quantizer", "\udc80", "(a+)+$"),
    *([], [[]], {}, {"a": []}, [None], [0] * 1000, ["x", 1, -2.5]),
)


def of_bytes(content, rng):
    """The bytes with a bit flipped, a part cut off, lost, repeated, made noise or made extreme; never the same."""
    content = bytearray(content)
    place = rng.randrange(len(content)) if content else 0
    length = min(len(content) - place, rng.choice((1, 2, 8, 64, 1000)))
    match rng.randrange(8):
        case 0 | 1:
            content[place] ^= 1 << rng.randrange(8)
        case 2:
            for _ in range(rng.randrange(2, 9)):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case 3:
            del content[place:]
        case 4:
            del content[place : place + length]
        case 5:
            content[place:place] = content[place : place + length] or b"x"
        case 6:
            content[place : place + length] = rng.randbytes(length)
        case 7:
            hostile = rng.choice(HOSTILE_BYTES)
            content[place : place + len(hostile)] = hostile
    return bytes(content)


def of_json(content, rng):
    """JSON text, or one of its lines, with a key removed, repeated, out of order, or with a hostile value."""
    lines = content.decode().splitlines() if b"}\n{" in content else [content.decode()]
    place = rng.randrange(len(lines))
    if len(lines) > 1 and rng.random() < 0.2:
        lines[place : place + rng.randrange(2)] = [lines[rng.randrange(len(lines))]]
        return "\n".join(lines).encode()
    told = json.loads(lines[place])
    if rng.random() < 0.1:
        lines[place] = _nested(rng)
    elif rng.random() < 0.2 and isinstance(told, dict):
        key = rng.choice(list(told))
        pairs = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in [*told.items(), (key, rng.choice(PLAIN))]]
        lines[place] = f"{{{', '.join(pairs)}}}"
    else:
        lines[place] = json.dumps(of_data(told, rng), default=str)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


PLAIN = tuple(value for value in HOSTILE if not isinstance(value, str) or value.isprintable())


def _nested(rng):
    return rng.choice(("[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "1" * 10_000, "nul", "", "\ufeff{}", "[1e999]"))


def of_data(data, rng):
    """A copy of nested dicts, lists, tuples, tensors and plain values, in which one of them is changed or lost."""
    data = _copied(data)
    container, key = _somewhere(data, rng)
    if container is None:
        return rng.choice(HOSTILE)
    value = container[key]
    match rng.randrange(6):
        case 0 if isinstance(container, dict):
            del container[key]
        case 1 if isinstance(container, dict):
            items = list(container.items())
            rng.shuffle(items)
            container.clear()
            container.update(items)
        case 2 if isinstance(container, dict):
            container[rng.choice(("x", 7, None))] = container.pop(key)
        case 3:
            container[key] = _wrong_like(value, rng)
        case _:
            container[key] = copy.deepcopy(rng.choice(HOSTILE))
    return data


def _copied(data):
    """A deep copy whose tuples are lists, for `_somewhere` to change."""
    if isinstance(data, dict):
        return {key: _copied(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_copied(value) for value in data]
    return data


def _somewhere(data, rng):
    """(container, key) of a value at any depth; (None, None) where there is none."""
    container, key = None, None
    while isinstance(data, dict | list) and data and (container is None or rng.random() < 0.8):
        container = data
        key = rng.choice(list(data)) if isinstance(data, dict) else rng.randrange(len(data))
        data = container[key]
    return container, key


def _wrong_like(value, rng):
    """A value that is nearly right."""
    if torch.is_tensor(value):
        return _wrong_tensor(value, rng)
    if isinstance(value, np.ndarray):
        return _wrong_tensor(torch.from_numpy(value.copy()), rng).numpy()
    if isinstance(value, str):
        return value[: rng.randrange(len(value) + 1)]
    if isinstance(value, bool | None):
        return not value
    if isinstance(value, int | float):
        return rng.choice((-value, value * 10**6, value + 1, float(value), str(value)))
    return value[:-1] if isinstance(value, list) else [value]


def _wrong_tensor(tensor, rng):
    changed = tensor.clone()
    match rng.randrange(7):
        case 0:
            return tensor[..., None]
        case 1:
            return tensor.reshape(-1)[: tensor.numel() // 2]
        case 2:
            return tensor.to(rng.choice((torch.float64, torch.float16, torch.int8, torch.bool)))
        case 3:
            return tensor.new_zeros((0,))
        case 4:
            return tensor.expand(3, *tensor.shape).contiguous()
        case 5 if changed.numel():
            extreme = (math.nan, math.inf, 60000.0, -60000.0) if changed.is_floating_point() else (0, 1)
            changed.reshape(-1)[rng.randrange(changed.numel())] = rng.choice(extreme)
            return changed
    return torch.zeros(3, 70000 // 3)
