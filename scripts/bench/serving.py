"""Load test of a served model: requests per second, time to first token and per further token, dense and with methods.

    bash scripts/serve/load.sh                       # starts a server on the embedded model and runs this
    python scripts/bench/serving.py URL --in-flight 1 8 32 --methods dense uniform:retention_ratio=0.25

Every request shows another clip, so that no cache answers for the encoder. At each number of requests in flight dense
and methods take turns, several rounds of them, so that a machine that changes its pace changes it for all; requests/s
is the median over rounds, times are those of all requests. The server has to run with --trust-request-mm-kwargs.
Addresses of other machines are refused.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import io
import json
import statistics
import time
from typing import Any
from urllib.parse import urlparse

import numpy as np
import openai
from PIL import Image

HERE = {"127.0.0.1", "localhost", "::1"}


def frames_url(seed: int, frames: int, side: int) -> str:
    """A clip of coloured blocks as the frames of a data URL."""
    generator = np.random.default_rng(seed)
    parts = []
    for _ in range(frames):
        blocks = generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST).save(buffer, "JPEG")
        parts.append(base64.b64encode(buffer.getvalue()).decode())
    return "data:video/jpeg;base64," + ",".join(parts)


def method_of(text: str) -> dict[str, Any] | None:
    """ "dense", or "name:parameter=value,parameter=value"."""
    name, _, rest = text.partition(":")
    if name == "dense":
        return None
    parameters = dict(part.split("=", 1) for part in rest.split(",") if part)
    return {"method": name, **{key: json.loads(value) for key, value in parameters.items()}}


async def request(client: openai.AsyncOpenAI, model: str, url: str, method: Any, tokens: int) -> dict[str, float]:
    """Times of one streamed answer; an error ends the run."""
    extra: dict[str, Any] = {"ignore_eos": True, "stream_options": {"include_usage": True}}
    if method is not None:
        extra["mm_processor_kwargs"] = {"visual_compression": method}
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "what happens?"}]
    begun, arrived, prompt = time.perf_counter(), [], 0
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body=extra,
    )
    async for part in stream:
        if part.choices:
            arrived.append(time.perf_counter())
        if part.usage is not None:
            prompt = part.usage.prompt_tokens
    further = (arrived[-1] - arrived[0]) / max(1, tokens - 1)
    return {"first": arrived[0] - begun, "further": further, "prompt": prompt}


@dataclasses.dataclass
class Turn:
    """What one method did in one round."""

    seconds: float
    requests: list[dict[str, float]]


async def turn(
    client: openai.AsyncOpenAI, model: str, method: Any, in_flight: int, options: argparse.Namespace, seed: int
) -> Turn:
    """``in_flight`` requests at a time until all are done."""
    urls = [frames_url(seed + i, options.frames, options.side) for i in range(max(options.requests, in_flight))]
    free = asyncio.Semaphore(in_flight)

    async def taking_turns(url: str) -> dict[str, float]:
        async with free:
            return await request(client, model, url, method, options.tokens)

    begun = time.perf_counter()
    done = await asyncio.gather(*(taking_turns(url) for url in urls))
    return Turn(time.perf_counter() - begun, done)


def row_of(turns: list[Turn]) -> dict[str, float]:
    """The numbers of a row."""
    done = [one for turn in turns for one in turn.requests]
    first, further = ([one[key] * 1000 for one in done] for key in ("first", "further"))
    return {
        "prompt": done[0]["prompt"],
        "requests_per_s": statistics.median(len(turn.requests) / turn.seconds for turn in turns),
        "ttft_p50_ms": statistics.median(first),
        "ttft_p99_ms": float(np.percentile(first, 99)),
        "tpot_p50_ms": statistics.median(further),
        "tpot_p99_ms": float(np.percentile(further, 99)),
    }


async def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    client = openai.AsyncOpenAI(base_url=options.url, api_key="EMPTY", timeout=900, max_retries=0)
    model = (await client.models.list()).data[0].id
    rows, seed = [], 0
    print("| in flight | method | prompt | requests/s | TTFT p50 / p99 ms | TPOT p50 / p99 ms |")
    print("|---|---|---|---|---|---|")
    for text in options.methods:  # the first requests of a process pay for what is made once
        await turn(client, model, method_of(text), 1, argparse.Namespace(**{**vars(options), "requests": 2}), 10**9)
    for in_flight in options.in_flight:
        turns: dict[str, list[Turn]] = {text: [] for text in options.methods}
        for number in range(options.rounds):
            # the other way round every second time: what comes first may find a quieter machine
            for text in options.methods if number % 2 == 0 else options.methods[::-1]:
                seed += 10_000
                turns[text].append(await turn(client, model, method_of(text), in_flight, options, seed))
        for text, own in turns.items():
            row = row_of(own)
            rows.append({"in_flight": in_flight, "method": text, **row})
            print(
                f"| {in_flight} | {text} | {row['prompt']} | {row['requests_per_s']:.2f} "
                f"| {row['ttft_p50_ms']:.0f} / {row['ttft_p99_ms']:.0f} "
                f"| {row['tpot_p50_ms']:.1f} / {row['tpot_p99_ms']:.1f} |",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server, on this machine, with /v1")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--methods", nargs="+", default=["dense", "uniform:retention_ratio=0.25"])
    parser.add_argument("--requests", type=int, default=16, help="per turn (at least as many as are in flight)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each method")
    parser.add_argument("--tokens", type=int, default=8, help="of each answer")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=182, help="pixels")
    parser.add_argument("--json", help="file for the rows")
    options = parser.parse_args()
    if urlparse(options.url).hostname not in HERE:
        parser.error(f"{options.url}: only servers on this machine are loaded")
    if not 1 <= options.requests <= 10_000 or options.rounds < 1 or not all(1 <= n <= 256 for n in options.in_flight):
        parser.error("between 1 and 10000 requests, 1 to 256 in flight, at least one round")
    rows = asyncio.run(run(options))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
