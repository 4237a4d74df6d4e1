"""Sends 24 MiB and receives as many at once; then each end says what it has received, as a digest.

    pump.py connect ADDRESS PORT
    pump.py serve ADDRESS PORT [FILE]     takes one connection; FILE appears when it listens"""

import hashlib, pathlib, random, socket, sys, threading

MIB = 24


def pump(conn, is_client):
    block = random.Random(is_client).randbytes(1 << 20)
    sent, received = hashlib.sha256(), hashlib.sha256()

    def send():
        for number in range(MIB):
            data = number.to_bytes(8, "big") + block[8:]
            sent.update(data)
            conn.sendall(data)

    sender = threading.Thread(target=send)
    sender.start()
    left = MIB << 20
    while left:
        data = conn.recv(min(left, 1 << 18))
        assert data, left
        received.update(data)
        left -= len(data)
    sender.join()
    conn.sendall(received.hexdigest().encode())
    assert conn.recv(64, socket.MSG_WAITALL).decode() == sent.hexdigest()
    if is_client:
        assert conn.recv(1) == b""
    conn.close()


role, address, port, *file = sys.argv[1:]
if role == "connect":
    pump(socket.create_connection((address, int(port))), True)
else:
    server = socket.create_server((address, int(port)))
    for path in file:
        pathlib.Path(path).touch()
    print("ready")
    pump(server.accept()[0], False)
