"""Tries what a guest should not get, and then floods the host with requests."""

import errno, socket


def attempt(cid, port):
    s = socket.socket(socket.AF_VSOCK)
    s.settimeout(20)
    try:
        s.connect((cid, port))
        return "connected"
    except OSError as e:
        return errno.errorcode.get(e.errno, str(e))
    finally:
        s.close()


# The agent's own ports are taken, the box's sockets are for clients, nothing else is offered.
for port in (0x6d6f7465, 0x6d6f7466, 0x6d6f7467, 4089, 4090, 4091, 22, 1, 0xfffffffe):
    print("host", hex(port), attempt(2, port))
for cid in (0, 1, 3, 4, 77):
    print("cid", cid, attempt(cid, 4089) != "connected")
flood = []
for i in range(3000):
    s = socket.socket(socket.AF_VSOCK)
    s.setblocking(False)
    try:
        s.connect((2, 5000 + i))
    except OSError:
        pass
    flood.append(s)
print("flooded", flush=True)
while True:
    try:
        s = socket.socket(socket.AF_VSOCK)
        s.setblocking(False)
        s.connect((2, 9))
    except OSError:
        pass
    s.close()
