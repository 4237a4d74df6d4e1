"""Resolves names below mote.test, on UDP and TCP, and prints each question.

    resolver.py ADDRESS...     where it listens

  host     198.51.100.1 and 2001:db8::1
  inside   127.0.0.1
  long     as host, but only over TCP: what fits into a datagram is cut"""

import socket, struct, sys, threading

A, AAAA = 1, 28
NAMES = {
    "host.mote.test": {A: ["198.51.100.1"], AAAA: ["2001:db8::1"]},
    "inside.mote.test": {A: ["127.0.0.1"]},
    "long.mote.test": {A: [f"198.51.100.{i}" for i in range(1, 200)]},
}


def answer(query, transport):
    labels, at = [], 12
    while length := query[at]:
        labels.append(query[at + 1:at + 1 + length].decode())
        at += 1 + length
    kind = struct.unpack("!H", query[at + 1:at + 3])[0]
    name = ".".join(labels).lower()
    sys.stdout.write(f"{transport} {name} {kind}\n")
    records = NAMES.get(name, {}).get(kind, [])
    code = 0 if name in NAMES else 3
    cut = transport == "udp" and len(records) > 20
    body = b"" if cut else b"".join(
        struct.pack("!HHHIH", 0xc00c, kind, 1, 60, 4 if kind == A else 16)
        + socket.inet_pton(socket.AF_INET if kind == A else socket.AF_INET6, record)
        for record in records)
    flags = 0x8180 | code | (0x200 if cut else 0)
    count = 0 if cut else len(records)
    return query[:2] + struct.pack("!HHHHH", flags, 1, count, 0, 0) + query[12:at + 5] + body


def datagrams(server):
    while True:
        query, client = server.recvfrom(4096)
        server.sendto(answer(query, "udp"), client)


def stream(conn):
    while length := conn.recv(2, socket.MSG_WAITALL):
        reply = answer(conn.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL), "tcp")
        conn.sendall(len(reply).to_bytes(2, "big") + reply)
    conn.close()


def streams(server):
    while True:
        threading.Thread(target=stream, args=(server.accept()[0],), daemon=True).start()


for address in sys.argv[1:]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    udp = socket.socket(family, socket.SOCK_DGRAM)
    udp.bind((address, 53))
    threading.Thread(target=datagrams, args=(udp,)).start()
    tcp = socket.create_server((address, 53), family=family)
    threading.Thread(target=streams, args=(tcp,)).start()
print("ready")
