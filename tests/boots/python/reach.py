"""Says what becomes of a connection to each address, by TCP and by UDP, and of the first datagram from a socket that
is not connected.

    reach.py PORT [connected | patient] ADDRESS...

connected: by connected sockets alone. patient: datagrams are sent until one is answered or fails."""

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
option = sys.argv[2] if sys.argv[2] in ("connected", "patient") else None
for address in sys.argv[3 if option else 2:]:
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
            s.settimeout(1 if option == "patient" else 100)
            for _ in range(60 if option == "patient" else 1):
                try:
                    s.sendto(b"x", (address, port))
                    assert s.recvfrom(9)[0] == b"x"
                    return
                except TimeoutError:
                    pass
            raise TimeoutError

    ways = [tcp, udp] if option == "connected" else [tcp, udp, unconnected]
    print(address, *map(outcome, ways))
