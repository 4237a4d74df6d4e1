"""Listens on the vsock ports of the contract's services, as who runs it, and says whom it gets."""

import select, socket

servers = {}
for port in 4089, 4090, 4091:
    server = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    server.bind((socket.VMADDR_CID_ANY, port))
    server.listen()
    servers[server] = port
print("listening", flush=True)
while True:
    for server in select.select(list(servers), [], [])[0]:
        conn, _ = server.accept()
        print("got", servers[server], conn.recv(99), flush=True)
