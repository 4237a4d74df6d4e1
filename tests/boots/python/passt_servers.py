"""Serves what passt reaches: TCP connections send a size and get so many bytes and a hash of what
they sent, datagrams come back in capitals, and every name is 192.0.2.7."""

import hashlib, socket, threading


def tcp(conn):
    wanted, sent = int(conn.recv(16)), hashlib.sha256()
    conn.sendall(b"x" * wanted)
    while data := conn.recv(65536):
        sent.update(data)
    conn.sendall(sent.digest())
    conn.close()


def udp(sock):
    while True:
        data, peer = sock.recvfrom(65535)
        sock.sendto(data.upper(), peer)


def dns(sock):
    while True:
        query, peer = sock.recvfrom(512)
        question = query[12:query.index(0, 12) + 5]
        is_a = question[-3] == 1
        answer = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4" + bytes([192, 0, 2, 7]) if is_a else b""
        sock.sendto(query[:2] + b"\x81\x80\0\1\0" + bytes([is_a]) + b"\0\0\0\0" + question + answer, peer)


for port, serve in (8001, udp), (53, dns):
    sock = socket.socket(type=socket.SOCK_DGRAM)
    sock.bind(("", port))
    threading.Thread(target=serve, args=(sock,), daemon=True).start()
server = socket.create_server(("", 8000))
print("serving", flush=True)
while True:
    threading.Thread(target=tcp, args=(server.accept()[0],), daemon=True).start()
