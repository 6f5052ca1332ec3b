"""The model ``served``: what a server is asked, what an answer costs, and that a request that fails is no answer."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading

import pytest

pytest.importorskip("lmms_eval")

from lmms_eval_accelerate.models.served import Served, parse

from accelerate_methods.stages.errors import MethodError, UnknownNameError
from tests.support.lmms_tasks import document, evaluate, write_image, write_tasks, write_video


class Server(http.server.ThreadingHTTPServer):
    """Speaks as much of the OpenAI interface as is needed.

    Attributes:
        asked: bodies of the chat completions.
        knows_methods: whether an unknown method is refused, as by the plugin.
        breaks: text of the question to which there is no answer.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked, self.knows_methods, self.breaks = [], True, None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self._send(
            {"/v1/models": {"data": [{"id": "tiny", "object": "model"}]}, "/version": {"version": "9"}}[self.path]
        )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = json.dumps(body["messages"])
        if body["mm_processor_kwargs"]["visual_compression"] == "no such method" and self.server.knows_methods:
            self._send({"error": {"message": "unknown method 'no such method'"}}, 400)
        elif self.server.breaks is not None and self.server.breaks in said:
            self._send({"error": {"message": "CUDA out of memory"}}, 500)
        elif not body.get("stream"):
            self._send({"choices": [], "object": "chat.completion"})
        else:
            self.server.asked.append(body)
            parts = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in ("le", "ft")]
            parts.append({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}})
            lines = [f"data: {json.dumps(part)}\n\n" for part in parts]
            self._send("".join([*lines, "data: [DONE]\n\n"]), kind="text/event-stream")

    def _send(self, content, status=200, kind="application/json"):
        text = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(text)


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    clip, picture = write_video(folder / "clip.mp4"), write_image(folder / "picture.png", (40, 30))
    return write_tasks(folder, media=[document(0, video=clip), document(1, (picture,))])


def test_a_video_stays_a_video_and_the_method_is_the_runs(server, tasks):
    model = Served(base_url=server.url, method="uniform", retention_ratio=0.25, frames=8)
    found = evaluate(model, ["media"], tasks)
    assert found["results"]["media"]["exact_match,none"] == 1.0
    video, picture = (body["messages"][0]["content"][0] for body in sorted(server.asked, key=lambda b: len(str(b))))
    assert video["video_url"]["url"].startswith("file:///")
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")
    for body in server.asked:
        assert body["mm_processor_kwargs"] == {"visual_compression": {"method": "uniform", "retention_ratio": 0.25}}
        assert body["media_io_kwargs"] == {"video": {"num_frames": 8}}
        assert (body["max_tokens"], body["temperature"]) == (6, 0)
    costs = [sample["token_counts"][0] for sample in found["samples"]["media"]]
    assert [cost["prompt_tokens"] for cost in costs] == [7, 7]
    assert all(0 < cost["first_token_ms"] <= cost["generate_ms"] for cost in costs)
    assert sorted(cost["warmup"] for cost in costs) == [False, True]


def test_a_dense_run_is_dense_whatever_the_server_is_configured_with(server, tasks):
    evaluate(Served(base_url=server.url), ["media"], tasks)
    assert {body["mm_processor_kwargs"]["visual_compression"] for body in server.asked} == {"none"}


def test_a_request_that_fails_ends_the_run(server, tasks):
    server.breaks = "Which side"
    with pytest.raises(MethodError, match=r"media, split test, doc 1: the server did not answer.*out of memory"):
        evaluate(Served(base_url=server.url), ["media"], tasks)


def test_a_server_that_would_ignore_the_method_is_refused(server):
    server.knows_methods = False
    with pytest.raises(MethodError, match="does not compress"):
        Served(base_url=server.url, method="uniform", retention_ratio=0.25)


def test_no_server():
    with pytest.raises(MethodError, match="no answer from"):
        Served(base_url="http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "base_url"),
        ({"base_url": "x", "frame": 8}, "frames"),
        ({"base_url": "x", "frames": 0}, "frames must be a number from 1"),
        ({"base_url": "x", "method": "fastv"}, "between decoder layers"),
        ({"base_url": "x", "method": "uniform", "ratio": 1}, "unknown parameter"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_asked(given, said):
    with pytest.raises((MethodError, UnknownNameError), match=said):
        parse(given)
