"""What is said of a kind of file."""

from collections.abc import Callable
from typing import NamedTuple

from mutations import mutate


class Kind(NamedTuple):
    """A kind of file that the program reads."""

    name: str
    make: Callable  # (folder) -> path of a sound file below it
    read: Callable  # (path) -> what the program reads of it; nothing (None, {}, []) where it goes on without
    readers: tuple[str, ...]  # the functions of the program, "module.function", that open files of this kind
    has_digest: bool = False  # so that no change of its bytes may go unseen
    mutate: Callable = mutate.of_bytes  # (bytes, random numbers) -> bytes
    rewrite: Callable | None = None  # (path, random numbers): writes it anew, its digest right, its content not
    count: int = 200  # mutations in the short tests
    beside: Callable = lambda path: [path]  # the files of which one is mutated
