"""A machine whose network fails, and which notes what is asked of it."""

import contextlib
import socket
from unittest import mock


@contextlib.contextmanager
def no_network():
    """Every look-up of a host fails at once; gives the list of hosts that were asked for."""
    asked = []

    def fail(host, *_arguments, **_named):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "no network in this test")

    with mock.patch.object(socket, "getaddrinfo", fail):
        yield asked
