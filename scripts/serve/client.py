"""Ask a served model about a clip and a picture, dense and with methods; prints a table.

python scripts/serve/client.py http://127.0.0.1:8765/v1
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path

import openai
from PIL import Image, ImageDraw

CLIP = Path(__file__).parents[2] / "assets" / "shapes_video" / "clips" / "0000.mp4"
QUESTIONS = {"clip": "is there a yellow diamond?", "picture": "what is the color of the rectangle?"}
METHODS = [
    None,
    {"method": "uniform", "retention_ratio": 0.25},
    {"method": "visionzip", "retention_ratio": 0.25},
    {"method": "divprune", "retention_ratio": 0.1},
    {"method": "fastvid", "retention_ratio": 0.1},
    {"method": "vidcom2", "retention_ratio": 0.1},
    {"method": "nonsense"},
]


def picture() -> str:
    """A yellow rectangle as a data URL."""
    image = Image.new("RGB", (182, 182), "white")
    ImageDraw.Draw(image).rectangle((50, 60, 130, 120), fill=(255, 220, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def content(kind: str) -> list[dict[str, object]]:
    if kind == "picture":
        medium = {"type": "image_url", "image_url": {"url": picture()}}
    else:
        data = base64.b64encode(CLIP.read_bytes()).decode()
        medium = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}
    return [medium, {"type": "text", "text": QUESTIONS[kind]}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8765/v1")
    url = parser.parse_args().url
    client = openai.OpenAI(base_url=url, api_key="EMPTY", timeout=600, max_retries=0)
    model = client.models.list().data[0].id
    print(f"{'':8} {'method':46} {'prompt tokens':>13}  answer")
    for kind in QUESTIONS:
        for method in METHODS:
            extra = {} if method is None else {"mm_processor_kwargs": {"visual_compression": method}}
            shown = "dense" if method is None else " ".join(f"{value}" for value in method.values())
            try:
                answer = client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": content(kind)}],
                    max_tokens=8,
                    temperature=0,
                    extra_body=extra,
                )
            except openai.BadRequestError as error:
                print(f"{kind:8} {shown:46} {'':>13}  HTTP {error.status_code}: {error.body['message'][:90]}")
                continue
            print(f"{kind:8} {shown:46} {answer.usage.prompt_tokens:13}  {answer.choices[0].message.content}")


if __name__ == "__main__":
    main()
