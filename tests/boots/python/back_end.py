"""As much of a vhost-user back-end as mote's start needs (vhost-user.rst).

The test that makes a virtiofsd of it sets, above this:
  KIND      the message at which a signal hits it; None for none
  SIGNAL    that signal's name
  STUBBORN  whether it serves in a child, as virtiofsd does, that heeds no signal and no end of its connection"""

import os, signal, socket, struct


def serve():
    conn, _ = socket.socket(fileno=3).accept()
    while True:
        kind, _, size = struct.unpack("<III", conn.recv(12, socket.MSG_WAITALL))
        if size:
            conn.recv(size, socket.MSG_WAITALL)
        if kind == KIND:
            os.kill(os.getpid(), getattr(signal, SIGNAL))
        answer = {1: 1 << 30 | 1 << 32, 15: 1}.get(kind)
        if answer is not None:
            conn.sendall(struct.pack("<IIIQ", kind, 5, 8, answer))


if STUBBORN:
    if os.fork():
        os.wait()
        os._exit(0)
    for number in (1, 2, 3, 15):
        signal.signal(number, signal.SIG_IGN)
    try:
        serve()
    finally:
        signal.pause()
serve()
