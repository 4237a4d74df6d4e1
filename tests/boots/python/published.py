"""Serves on every kind of address. Says whom it sees to whoever connects, then sends back what comes,
in capitals, and `tail` after its end.
  8001 0.0.0.0    8002 :: (and IPv4)    8003 127.0.0.1    8004 ::1    8005 ::ffff:127.0.0.1"""

import asyncio, socket


async def serve(reader, writer):
    writer.write(f"{writer.get_extra_info('peername')[0]}\n".encode())
    while data := await reader.read(65536):
        writer.write(data.upper())
        await writer.drain()
    writer.write(b"tail")
    await writer.drain()
    writer.close()


async def main():
    for port, family, address, dual in (
        (8001, socket.AF_INET, "0.0.0.0", False), (8002, socket.AF_INET6, "::", True),
        (8003, socket.AF_INET, "127.0.0.1", False), (8004, socket.AF_INET6, "::1", False),
        (8005, socket.AF_INET6, "::ffff:127.0.0.1", True),
    ):
        s = socket.socket(family)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
        s.bind((address, port))
        await asyncio.start_server(serve, sock=s, backlog=1024, limit=1 << 20)
    print("ready", flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
