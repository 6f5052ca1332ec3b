"""A server as users start it, in processes of its own, asked by the OpenAI interface; and vLLM without the plugin."""

import base64
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from tests.support.paths import ROOT
from tests.support.served_engines import SETTINGS, clip, picture

SHARED = Path("/dev/shm")  # where the processes of a server exchange what they say; small in some containers
ROOMY = SHARED.is_dir() and shutil.disk_usage(SHARED).free > 2**29
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not ROOMY, reason=f"{SHARED} has less than 512 MiB left for the processes of vLLM"),
]
UNIFORM = {"method": "uniform", "retention_ratio": 0.25}
WAIT = 600  # seconds; a machine that does nothing else takes about 30


class Server:
    """An OpenAI-compatible server on a free port of this machine."""

    def __init__(self, checkpoint: Path, log: Path, **environment: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{port}", log
        arguments = ["--model", checkpoint, "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", port]
        arguments += ["--dtype", "float32", "--max-model-len", 1024, "--max-num-seqs", 4, "--enforce-eager"]
        arguments += ["--trust-request-mm-kwargs", "--limit-mm-per-prompt", json.dumps({"image": 1, "video": 1})]
        several = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CACHE_ROOT": str(Path(sys.prefix, "vllm-cache"))}
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, arguments)],
                env={**os.environ, **SETTINGS, **several, "PYTHONPATH": str(ROOT), **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> None:
        for _ in range(WAIT):
            assert self._process.poll() is None, self._log.read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            time.sleep(1)
        pytest.fail(f"no server after {WAIT} s: {self._log.read_text()}")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=WAIT) as answer:
            return json.load(answer)

    def ask(self, medium: dict, method: object = None) -> tuple[int, dict]:
        """Status and body of a greedy chat completion."""
        content = [medium, {"type": "text", "text": "What is it?"}]
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        if method is not None:
            body["mm_processor_kwargs"] = {"visual_compression": method}
        asked = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(asked, timeout=WAIT) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """With the plugin, which is told nothing, and without."""
    from tests.support.served_models import internvl

    folder = tmp_path_factory.mktemp("server")
    checkpoint = internvl(folder)
    started: list[Server] = []
    try:
        for name, more in {"plugin": {}, "stock": {"VLLM_PLUGINS": ""}}.items():
            started.append(Server(checkpoint, folder / f"{name}.log", **more))
            started[-1].wait()  # two that start at a time may choose one port for their workers
        yield started
    finally:
        for server in started:
            server.stop()


def encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def media() -> dict[str, dict]:
    frames = ",".join(encoded(Image.fromarray(frame)) for frame in clip())
    return {
        "image": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(picture())}"}},
        "video": {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}},
    }


def answered(reply: tuple[int, dict]) -> tuple[int, list[int]]:
    """Tokens of the prompt, and the answer's ids."""
    status, body = reply
    assert status == 200, body
    return body["usage"]["prompt_tokens"], body["choices"][0]["token_ids"]


def test_the_server_names_its_model(servers):
    assert [model["id"] for model in servers[0].get("/v1/models")["data"]] == ["tiny"]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_requests_under_a_method_are_shorter_and_those_without_are_vllms_own(servers, kind):
    plugin, stock = servers
    medium = media()[kind]
    dense, ids = answered(plugin.ask(medium))
    short, _ = answered(plugin.ask(medium, UNIFORM))
    half, _ = answered(plugin.ask(medium, {**UNIFORM, "retention_ratio": 0.5}))
    assert short < half < dense
    assert len(ids) == 6
    assert answered(plugin.ask(medium, "none")) == (dense, ids)
    assert answered(stock.ask(medium)) == (dense, ids)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"method": "uniforn"}, "Did you mean 'uniform'"),
        ({**UNIFORM, "retention_ratio": 2}, "retention_ratio"),
        ("fastv", "between decoder layers"),
    ],
)
def test_a_wrong_method_is_http_400_and_the_server_goes_on(servers, method, said):
    medium = media()["image"]
    status, body = servers[0].ask(medium, method)
    assert status == 400
    assert said in body["error"]["message"]
    assert servers[0].get("/v1/models")["data"]
    assert answered(servers[0].ask(medium, UNIFORM))[1]
