"""What users of LLaVA's and LLaVA-NeXT's scripts do: the commands, their helpers, the official way to call a model."""

import base64
import csv
import io
import json
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from accelerate_methods import MethodError
from llava import utils
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.eval import model_vqa, model_vqa_loader, model_vqa_mmbench, model_vqa_science, run_llava
from llava.eval.asking import Assistant, get_chunk, load_image, read_json_lines, run
from llava.mm_utils import (
    process_highres_image,
    process_highres_image_crop_split,
    process_images,
    tokenizer_image_token,
)
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointError
from llava.model.utils import auto_upgrade
from llava.serve import cli
from llava.video_utils import load_video
from tests.support.paths import CHECKPOINTS, ROOT

EMBEDDED = str(ROOT / "assets/tiny-llava-onevision")
V15 = str(CHECKPOINTS / "tiny-llava-1.5")
CLIP = str(ROOT / "assets/shapes_video/clips/0000.mp4")
QUESTION = "what is the color of the circle?"
COMMANDS = {
    "llava.eval.run_llava": run_llava,
    "llava.eval.model_vqa": model_vqa,
    "llava.eval.model_vqa_loader": model_vqa_loader,
    "llava.eval.model_vqa_science": model_vqa_science,
    "llava.eval.model_vqa_mmbench": model_vqa_mmbench,
    "llava.serve.cli": cli,
}


@pytest.fixture(scope="module")
def embedded():
    return load_pretrained_model(EMBEDDED, device="cpu", torch_dtype="float32")


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch, embedded):
    """The scripts load a model each; the embedded one is loaded already."""
    from llava.model import builder

    load = builder.load_pretrained_model

    def from_memory(path, *args, **kwargs):
        return embedded if path == EMBEDDED and kwargs.get("method") is None else load(path, *args, **kwargs)

    monkeypatch.setattr(builder, "load_pretrained_model", from_memory)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two pictures that the embedded model knows: a red and a blue circle."""
    folder = tmp_path_factory.mktemp("pictures")
    for color in ("red", "blue"):
        image = Image.new("RGB", (182, 150), "white")
        ImageDraw.Draw(image).ellipse((40, 40, 110, 110), fill=color)
        image.save(folder / f"{color}.png")
    return folder


def options(script, *words):
    fixed = ("--device", "cpu", "--temperature", "0", "--max_new_tokens", "6")
    return script.parser().parse_args([*fixed, "--model-path", EMBEDDED, *map(str, words)])


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", COMMANDS)
def test_help_at_once(module):
    heavy = ("torch", "transformers", "PIL", "numpy")
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_module({module!r}, run_name='__main__')\n"
        f"except SystemExit as end: sys.exit(end.code or ', '.join(m for m in {heavy!r} if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"python -m {module}" in done.stdout and "--model-path" in done.stdout


def test_run_llava_from_the_command_line(pictures):
    command = ["-m", "llava.eval.run_llava", "--model-path", EMBEDDED, "--device", "cpu", "--temperature", "0"]
    done = subprocess.run(
        [sys.executable, *command, "--image-file", str(pictures / "red.png"), "--query", QUESTION],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout == "red\n", done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--image-file", "green.png"), "cannot read image green.png: No such file"),
     (("--image-file", CLIP), "cannot read image"),
     (("--image-file", "assets/quickstart/kept_tokens.png", "--method", "fasvt"), "Did you mean 'fastv'"),
     (("--image-file", "assets/quickstart/kept_tokens.png", "--model-path", "nothing/here/either"), "cannot reach"),
     (("--image-file", "assets/quickstart/kept_tokens.png", "--model-path", "nothing", "--device", "gpu"), "'gpu'")],
)  # fmt: skip
def test_an_error_is_one_line(words, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        run(run_llava.eval_model, options(run_llava, "--query", QUESTION, *words))
    assert str(end.value).startswith("error: ") and said in str(end.value) and "\n" not in str(end.value)


def test_an_error_of_several_lines_is_told_in_one():
    def fails(_):
        raise ValueError("first\n  second")

    with pytest.raises(SystemExit, match=r"^error: first second$"):
        run(fails, None)


def test_eval_model_as_in_the_readme_of_llava(pictures, capsys):
    settings = {
        "model_path": EMBEDDED, "model_base": None, "model_name": "tiny-llava-onevision", "query": QUESTION,
        "conv_mode": None, "image_file": str(pictures / "blue.png"), "sep": ",", "temperature": 0, "top_p": None,
        "num_beams": 1, "max_new_tokens": 6,
    }  # fmt: skip
    assert run_llava.eval_model(type("Args", (), settings)()) == "blue"
    assert capsys.readouterr().out == "blue\n"


def test_several_images_and_places(pictures):
    files = f"{pictures / 'red.png'},{pictures / 'blue.png'}"
    seen = []
    args = options(run_llava, "--image-file", files, "--query", QUESTION)
    for query in (QUESTION, f"{IMAGE_PLACEHOLDER} and {IMAGE_PLACEHOLDER}: {QUESTION}"):
        args.query = query
        assistant = Assistant(args)
        seen.append(assistant.prompt(assistant.with_images(query, 2)))
        assert run_llava.eval_model(args)
    assert all(prompt.count(DEFAULT_IMAGE_TOKEN) == 2 for prompt in seen)
    assert f"{DEFAULT_IMAGE_TOKEN} and {DEFAULT_IMAGE_TOKEN}: what" in seen[1]
    args.query = f"{IMAGE_PLACEHOLDER} alone"
    with pytest.raises(ValueError, match="1 <image> placeholders but 2 images"):
        run_llava.eval_model(args)


@pytest.mark.parametrize("script", [model_vqa, model_vqa_loader])
def test_model_vqa(script, pictures, tmp_path):
    questions = [
        {"question_id": i, "image": f"{color}.png", "text": QUESTION} for i, color in enumerate(("red", "blue"))
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    out = tmp_path / "new" / "answers.jsonl"
    words = ("--question-file", tmp_path / "questions.jsonl", "--image-folder", pictures, "--answers-file", out)
    script.eval_model(options(script, *words))
    answers = read_json_lines(out)
    assert [(a["question_id"], a["prompt"], a["text"]) for a in answers] == [
        (0, QUESTION, "red"),
        (1, QUESTION, "blue"),
    ]
    assert all(a["model_id"] == "tiny-llava-onevision" and a["metadata"] == {} and a["answer_id"] for a in answers)
    script.eval_model(options(script, *words, "--num-chunks", 2, "--chunk-idx", 1))
    assert [a["question_id"] for a in read_json_lines(out)] == [1]


def test_model_vqa_science(pictures, tmp_path):
    questions = [
        {"id": "7", "image": "blue.png", "conversations": [{"from": "human", "value": f"{QUESTION}\n<image>"}]},
        {"id": "8", "conversations": [{"from": "human", "value": "what?"}]},
    ]
    (tmp_path / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    out = tmp_path / "answers.jsonl"
    words = ("--question-file", tmp_path / "questions.json", "--image-folder", pictures, "--answers-file", out)
    model_vqa_science.eval_model(options(model_vqa_science, *words))
    first, second = read_json_lines(out)
    assert first["prompt"] == f"<image>\n{QUESTION}" and first["text"] == "blue" and second["prompt"] == "what?"
    model_vqa_science.eval_model(options(model_vqa_science, *words, "--single-pred-prompt"))
    assert read_json_lines(out)[1]["prompt"].startswith("what?\nAnswer with the option's letter")


def test_model_vqa_mmbench(pictures, tmp_path):
    image = base64.b64encode((pictures / "red.png").read_bytes()).decode()
    shared = {"question": QUESTION, "A": "red", "B": "blue", "D": "", "image": image}
    rows = [
        {"index": "241", "hint": "nan", "C": "green", **shared},
        {"index": "242", "hint": "look", "C": "", **shared},
    ]
    with open(tmp_path / "mmbench.tsv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    out = tmp_path / "answers.jsonl"
    words = ("--question-file", tmp_path / "mmbench.tsv", "--answers-file", out)
    model_vqa_mmbench.eval_model(options(model_vqa_mmbench, *words, "--single-pred-prompt", "--lang", "cn"))
    first, second = read_json_lines(out)
    assert first["prompt"] == f"{QUESTION}\nA. red\nB. blue\nC. green" and first["round_id"] == 0
    assert second["prompt"].startswith(f"look\n{QUESTION}\n")
    model_vqa_mmbench.eval_model(options(model_vqa_mmbench, *words, "--all-rounds"))
    turns = read_json_lines(out)
    assert [(t["question_id"], t["round_id"]) for t in turns] == [
        ("241", 0),
        ("241", 1),
        ("241", 2),
        ("242", 0),
        ("242", 1),
    ]
    assert turns[1]["options"] == ["blue", "green", "red"] and turns[1]["option_char"] == ["B", "C", "A"]


def test_cli_talks(pictures, monkeypatch, capsys):
    said = iter([QUESTION, "is there a red shape?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: print(prompt, end="") or next(said))
    cli.main(options(cli, "--image-file", pictures / "red.png", "--debug"))
    out = capsys.readouterr().out
    assert "user: assistant: red" in out and "<|im_start|>user: " not in out
    second = [line for line in out.splitlines() if line.startswith("{")][1]
    assert second.count(DEFAULT_IMAGE_TOKEN) == 1 and "red<|im_end|>" in second

    def ends(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", ends)
    cli.main(options(cli, "--image-file", pictures / "red.png"))


def test_a_method_with_a_script(pictures):
    args = options(run_llava, "--image-file", pictures / "red.png", "--query", QUESTION, "--method", "visionzip@0.5")
    assert Assistant(args).model.acceleration.pipeline.name == "visionzip"
    args.method = "visionzip fastv"
    with pytest.raises(MethodError, match="one method"):
        Assistant(args)


def test_the_template_of_the_checkpoint(pictures):
    args = options(run_llava, "--image-file", "x", "--query", "y")
    assert Assistant(args).template == "qwen_1_5"
    args.conv_mode = "chatml_direct"
    assert Assistant(args).template == "chatml_direct"
    args.conv_mode = "Qwen_1_5"
    with pytest.raises(MethodError, match="Did you mean 'qwen_1_5'"):
        Assistant(args)
    args.conv_mode, args.model_path = None, V15
    assistant = Assistant(args)
    assert assistant.template == "llava_v1"
    assert isinstance(run_llava.eval_model(types.SimpleNamespace(
        model_path=V15, image_file=str(pictures / "red.png"), query="Hi", max_new_tokens=3, device="cpu", temperature=0
    )), str)  # fmt: skip


# -- helpers of the scripts --------------------------------------------------------------------------------------------


def test_images_from_files_and_addresses(pictures, tmp_path):
    upright = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (20, 40)

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/red.png" else 404)
            self.end_headers()
            self.wfile.write((pictures / "red.png").read_bytes())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert load_image(f"{address}/red.png").size == (182, 150)
        with pytest.raises(OSError, match=r"cannot read image http.*blue"):
            load_image(f"{address}/blue.png")
    finally:
        server.shutdown()
        server.server_close()


def test_chunks_and_lines(tmp_path):
    assert [list(get_chunk(range(5), 2, i)) for i in range(2)] == [[0, 1, 2], [3, 4]]
    with pytest.raises(ValueError, match="it is 0 to 1"):
        get_chunk(range(5), 2, 2)
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n\n{"a": \n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 3"):
        read_json_lines(tmp_path / "bad.jsonl")


def test_loading_as_llava_does():
    for device in ("cpu", torch.device("cpu")):
        model = load_pretrained_model(EMBEDDED, None, "llava_qwen", False, False, device=device, torch_dtype="float32")[
            1
        ]
        assert model.device.type == "cpu"
    assert load_pretrained_model(V15, use_flash_attn=False, device="cpu")[1].config._attn_implementation == "sdpa"
    with pytest.raises(TypeError):
        load_pretrained_model(V15, None, None, False, False, "cpu", "float16", None, None, None, None, None, "cpu")


# -- the official way to call a model ----------------------------------------------------------------------------------


def official_video(loaded, frames, **sizes):
    """As LLaVA-NeXT's OneVision tutorial asks about a video."""
    tokenizer, model, processor, _ = loaded
    pixels = processor.preprocess(frames, return_tensors="pt")["pixel_values"].to(model.dtype)
    conversation = conv_templates["qwen_1_5"].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\nis there a yellow diamond?")
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    call = {"images": [pixels], "modalities": ["video"], **sizes}
    answer = model.generate(ids, **call, do_sample=False, temperature=0, max_new_tokens=4)
    spliced = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, **call)
    return tokenizer.batch_decode(answer, skip_special_tokens=True)[0], model(ids, **call).logits, spliced[4]


def test_video_with_sizes_of_numpy_frames(embedded):
    frames = load_video(CLIP, num_frames=16).frames
    text, logits, embeds = official_video(embedded, frames)
    assert text == "yes"
    numbers = [frame.size for frame in frames]  # numpy's size: how many values, an int
    assert all(isinstance(number, int) for number in numbers)
    for sizes in (numbers, [(182, 182)] * 16, [(182, 182)], np.array(numbers), torch.tensor(numbers), [None], [], 5):
        again = official_video(embedded, frames, image_sizes=sizes)
        assert again[0] == text and torch.equal(again[1], logits) and torch.equal(again[2], embeds)


def test_sizes_of_images_beside_a_video(tiny):
    """The sizes of the images are still read where they are needed, whatever stands for the videos."""
    model = tiny("tiny-llava-onevision")
    prompt = torch.tensor([[5, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, 7]])
    image = torch.randn(3, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    video = image[:2] * 0.5
    call = {"input_ids": prompt, "images": [video, image], "modalities": ["video", "image"]}
    wanted = model(**call, image_sizes=[(1, 1), (700, 300)]).logits
    for size in (12345, None, (3.5, "x")):
        assert torch.equal(model(**call, image_sizes=[size, (700, 300)]).logits, wanted)
    with pytest.raises(ValueError, match=r"needs image_sizes=\[\(width, height\)"):
        model(**call, image_sizes=[12345, 12345])


# -- llava.utils, llava.model.utils, mm_utils --------------------------------------------------------------------------


def test_printing(capsys, monkeypatch):
    utils.rank0_print("a", 1)
    utils.rank_print("b")
    monkeypatch.setattr(utils, "_rank", lambda: 1)
    utils.rank0_print("c")
    utils.rank_print("d")
    assert capsys.readouterr().out == "a 1\nb\nRank 1: d\n"


def test_logger(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "LOGDIR", str(tmp_path / "logs"))
    before = sys.stdout, sys.stderr
    logger = utils.build_logger("test_official", "worker.log")
    assert utils.build_logger("test_official", "worker.log") is logger and len(logger.handlers) == 2
    logger.info("started")
    assert (sys.stdout, sys.stderr) == before
    assert "INFO | test_official | started" in (tmp_path / "logs/worker.log").read_text(encoding="utf-8")
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)


def test_semaphore_and_init():
    import asyncio

    assert utils.pretty_print_semaphore(None) == "None"
    assert utils.pretty_print_semaphore(asyncio.Semaphore(3)) == "Semaphore(value=3, locked=False)"
    before = torch.nn.Linear.reset_parameters
    utils.disable_torch_init()
    assert torch.nn.Linear.reset_parameters is before


def test_moderation(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(RuntimeError, match="OPENAI_API_KEY"):
        utils.violates_moderation("text")
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    sent = []

    def answers(request, timeout):
        sent.append(request)
        return io.BytesIO(b'{"results": [{"flagged": true}]}')

    monkeypatch.setattr(utils.urllib.request, "urlopen", answers)
    assert utils.violates_moderation("some\ntext") is True
    assert json.loads(sent[0].data) == {"input": "sometext"} and sent[0].get_header("Authorization") == "Bearer key"


def test_videos():
    settings = types.SimpleNamespace(video_fps=1, frames_upbound=4, force_sample=True)
    frames, seconds, times, count = utils.process_video_with_decord(CLIP, settings)
    assert frames.shape[0] == count == 4 and frames.dtype == np.uint8 and len(times.split(",")) == 4
    assert seconds > 0 and times.startswith("0.00s,")
    settings.force_sample = False
    frames = utils.process_video_with_decord(CLIP, settings)[0]
    assert utils.process_video_with_pyav(CLIP, settings).shape == frames.shape
    with pytest.raises(FileNotFoundError):
        utils.process_video_with_pyav("nothing.mp4", settings)


def test_v0_checkpoints(tmp_path, monkeypatch):
    folder = tmp_path / "llava-7b-v0"
    folder.mkdir()
    file = folder / "config.json"
    old = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8}
    file.write_text(json.dumps(old), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r'needs "model_type": "llava".*terminal'):
        auto_upgrade(folder)
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda prompt: "n")
    with pytest.raises(CheckpointError, match="left as it is"):
        auto_upgrade(folder)
    assert json.loads(file.read_text(encoding="utf-8")) == old
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    auto_upgrade(folder)
    new = {**old, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}
    assert json.loads(file.read_text(encoding="utf-8")) == new
    monkeypatch.setattr("builtins.input", None)  # nothing is asked about any other checkpoint
    auto_upgrade(folder)
    auto_upgrade(EMBEDDED)


def test_tiles_of_the_old_modes(embedded):
    processor = embedded[2]
    side = processor.crop_size["height"]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (150, 300, 3), dtype=np.uint8))
    tiles = process_highres_image(image, processor, f"{side},{2 * side},{3 * side}")
    assert tiles.shape == (1 + 4, 3, side, side)  # the smallest side that is not below 300
    assert process_highres_image(image, processor, str(side)).shape[0] == 2  # all are below: the largest
    whole = process_images([image.resize((side, side))], processor, types.SimpleNamespace(image_aspect_ratio="square"))
    assert torch.equal(tiles[0], whole[0])
    settings = types.SimpleNamespace(image_crop_resolution=200, image_split_resolution=100, image_processor=processor)
    tiles = process_highres_image_crop_split(image, settings)
    assert tiles.shape == (4, 3, side, side)
    middle = image.resize((400, 200), Image.Resampling.LANCZOS).crop((100, 0, 300, 200))
    wanted = processor.preprocess(middle.crop((100, 0, 200, 100)), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(tiles[1], wanted)
