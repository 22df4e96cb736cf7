"""The least a client can do: bodies made beforehand, kept-alive connections, answers read and thrown away.

python benchmarks/peers/bare.py URL CALLS IN_FLIGHT FOLDER

What it takes is what the server, the loopback and Python's event loop take. No client does better here.
"""

from __future__ import annotations

import asyncio
import json
from urllib.parse import urlsplit

from workload import MAX_TOKENS, MODEL, arguments, measured, prompt, report


def request(host: str, path: str, number: int) -> bytes:
    """Head and body of a call."""
    asked = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt(number)}],
        "max_tokens": MAX_TOKENS,
    }
    body = json.dumps(asked).encode()
    head = f"POST {path}/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def run(url: str, requests: list[bytes], in_flight: int) -> list[bytes]:
    """Bodies of the answers."""
    to = urlsplit(url)
    waiting, answers = iter(requests), []

    async def connection() -> None:
        reader, writer = await asyncio.open_connection(to.hostname, to.port)
        for asked in waiting:
            writer.write(asked)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.partition(b"Content-Length: ")[2].split(b"\r\n")[0])
            answers.append(await reader.readexactly(length))
        writer.close()

    await asyncio.gather(*(connection() for _ in range(in_flight)))
    return answers


def main() -> None:
    """All calls on as many connections as calls may be in flight."""
    url, calls, in_flight, _ = arguments()
    to = urlsplit(url)
    requests = [request(to.netloc, to.path, number) for number in range(calls)]
    with measured() as figures:
        answers = asyncio.run(run(url, requests, in_flight))
    report(figures, [json.loads(answer)["choices"][0]["message"]["content"] for answer in answers])


if __name__ == "__main__":
    main()
