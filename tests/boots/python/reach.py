"""Says what becomes of a connection to each address, by TCP and by UDP, and of a datagram from a socket that
is not connected, at last (the host has to be asked once).

    reach.py PORT [connected] ADDRESS..."""

import errno, socket, sys


def outcome(attempt):
    try:
        attempt()
        return "ok"
    except TimeoutError:
        return "silence"
    except OSError as e:
        return errno.errorcode[e.errno]


port = int(sys.argv[1])
only_connected = sys.argv[2] == "connected"
for address in sys.argv[2 + only_connected:]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    def tcp():
        with socket.socket(family) as s:
            s.settimeout(100)
            s.connect((address, port))
            assert s.recv(9) == b"hello"

    def udp():
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.settimeout(100)
            s.connect((address, port))
            s.send(b"x")
            assert s.recv(9) == b"x"

    def unconnected():
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.settimeout(1)
            for _ in range(60):
                try:
                    s.sendto(b"x", (address, port))
                    assert s.recvfrom(9)[0] == b"x"
                    return
                except TimeoutError:
                    pass
            raise TimeoutError

    ways = [tcp, udp] if only_connected else [tcp, udp, unconnected]
    print(address, *map(outcome, ways))
