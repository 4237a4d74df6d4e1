"""Has python's usual clients fetch from web.py; the certificate is /ca.pem.

    fetch.py ADDRESS..."""

import asyncio, ssl, sys, urllib.request, requests

ADDRESSES = sys.argv[1:]
HOSTS = [f"[{address}]" if ":" in address else address for address in ADDRESSES]


async def fetch(host, **tls):
    reader, writer = await asyncio.open_connection(host, 443 if tls else 80, **tls)
    writer.write(b"GET /asyncio HTTP/1.0\r\n\r\n")
    body = (await reader.read()).split(b"\r\n\r\n")[1].decode()
    writer.close()
    return body


async def fetch_all():
    context = ssl.create_default_context(cafile="/ca.pem")
    return await asyncio.gather(*(
        fetch(host, **tls) for host in ADDRESSES for tls in ({}, {"ssl": context})))


print(*asyncio.run(fetch_all()))
for host in HOSTS:
    print(urllib.request.urlopen(f"http://{host}/urllib", timeout=60).read().decode())
    with requests.Session() as session:
        for _ in range(3):
            print(session.get(f"https://{host}/requests", verify="/ca.pem", timeout=60).text)
