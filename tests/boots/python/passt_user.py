"""What a user of the box tries: a name, bytes to a server and back, datagrams. A resolver that gets
no answer asks again after 5 s."""

import hashlib, socket, time

start = time.monotonic()
print("name", socket.gethostbyname("box.test"), time.monotonic() - start < 5)


def transfer(host, up, down):
    conn = socket.create_connection((host, 8000), 20)
    conn.sendall(b"%-16d" % down)
    received = 0
    while received < down:
        received += len(conn.recv(1 << 20))
    conn.sendall(b"y" * up)
    conn.shutdown(socket.SHUT_WR)
    return received == down and conn.recv(32) == hashlib.sha256(b"y" * up).digest()


print("tcp", transfer("192.0.2.2", 1 << 20, 4 << 20))
sock = socket.socket(type=socket.SOCK_DGRAM)
sock.settimeout(20)
for size in 1, 1400, 30000:
    sock.sendto(b"a" * size, ("192.0.2.2", 8001))
    print("udp", sock.recv(65535) == b"A" * size)
