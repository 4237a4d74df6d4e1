"""Talks over 200 connections at once to servers.py.

    two_hundred.py half-close ADDRESS...     ends its direction first, and waits for the end of the other
    two_hundred.py close ADDRESS...          ends both at once"""

import asyncio, sys

ENDING, *HOSTS = sys.argv[1:]


async def talk(number, reader, writer):
    data = f"number {number} ".encode() * 100
    for _ in range(3):
        writer.write(data)
        assert await reader.readexactly(len(data)) == data.upper()
    if ENDING == "half-close":
        writer.write_eof()
        assert await reader.read() == b"tail"
    writer.close()


async def main():
    connections = await asyncio.gather(
        *(asyncio.open_connection(HOSTS[i % len(HOSTS)], 7001) for i in range(200)))
    await asyncio.gather(*(talk(number, *pair) for number, pair in enumerate(connections)))
    print("all", len(connections))


asyncio.run(main())
