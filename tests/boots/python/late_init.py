"""Stands in for a guest init: mounts the share `vol0`, waits for a file there, and then serves vsock ports 4089 and
4093, each of which sends back its number and what it was sent, in capitals."""

import os, socket, subprocess, threading, time

# mote has left both of these to the init.
assert not os.path.ismount("/data"), "the volume is mounted already"
os.makedirs("/data")
subprocess.run(["mount", "-t", "virtiofs", "vol0", "/data"], check=True)
print("mounted", flush=True)
while not os.path.exists("/data/go"):
    time.sleep(0.05)


def serve(server, port):
    while True:
        conn, _ = server.accept()
        sent = b""
        while data := conn.recv(65536):
            sent += data
        conn.sendall(f"{port} ".encode() + sent.upper())
        conn.close()


for port in 4089, 4093:
    server = socket.socket(socket.AF_VSOCK)
    server.bind((socket.VMADDR_CID_ANY, port))
    server.listen(64)
    threading.Thread(target=serve, args=(server, port)).start()
print("listening", flush=True)
