"""Serves vsock port 4089: sends everything back in capitals, and `tail` after end of file."""

import socket, threading


def serve(conn):
    while data := conn.recv(65536):
        conn.sendall(data.upper())
    conn.sendall(b"tail")
    conn.close()


server = socket.socket(socket.AF_VSOCK)
server.bind((socket.VMADDR_CID_ANY, 4089))
server.listen(64)
print("listening", flush=True)
while True:
    conn, _ = server.accept()
    threading.Thread(target=serve, args=(conn,), daemon=True).start()
