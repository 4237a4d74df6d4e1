"""Prints the errors of connects to each destination, blocking and not.

    attempts.py ADDRESS PORT [ADDRESS PORT ...]"""

import errno, select, socket, sys


def name(number):
    return errno.errorcode.get(number, str(number))


def attempt(address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as s:
        blocking = name(s.connect_ex((address, port)))
    with socket.socket(family) as s:
        s.setblocking(False)
        first = s.connect_ex((address, port))
        if first == errno.EINPROGRESS:
            poll = select.epoll()
            poll.register(s, select.EPOLLOUT)
            assert poll.poll(100), "silence"
            first = s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    print(address, port, blocking, name(first))


for address, port in zip(sys.argv[1::2], sys.argv[2::2]):
    attempt(address, int(port))
