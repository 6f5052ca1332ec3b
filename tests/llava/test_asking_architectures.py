"""LLaVA's scripts with trained architectures: their template, pictures and prompts, and run parameters."""

from types import SimpleNamespace

import pytest
from PIL import Image

from accelerate_methods import MethodError, record
from accelerate_methods.stages.errors import UnknownNameError
from llava.eval import run_llava
from llava.eval.asking import Assistant
from llava.serve import cli
from tests.support.architectures import tiny_checkpoint
from tests.support.paths import CHECKPOINTS


@pytest.fixture(scope="module")
def mqt(tmp_path_factory):
    return str(tiny_checkpoint("mqt", tmp_path_factory.mktemp("mqt")))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "red.png"
    Image.new("RGB", (90, 60), "red").save(path)
    return str(path)


def assistant(path, **options):
    return Assistant(SimpleNamespace(model_path=path, device="cpu", max_new_tokens=3, temperature=0, **options))


@pytest.mark.parametrize(("options", "tokens"), [({}, 256), ({"model_args": "num_visual_tokens=5"}, 5)])
def test_run_parameters_reach_the_model(mqt, picture, options, tokens):
    asking = assistant(mqt, **options)
    assert asking.template == "vicuna_v1"
    with record() as requests:
        asking.ask(asking.prompt(asking.with_images("What is it?")), [Image.open(picture).convert("RGB")])
        asking.ask(asking.prompt("And now?"))
    assert [request.samples[0].visual_tokens_after for request in requests] == [tokens, 0]


def test_the_official_arguments_of_a_script_are_read(mqt, picture, capsys):
    args = SimpleNamespace(
        model_path=mqt, model_base=None, model_name="mqt-llava-7b", query="What is unusual?", conv_mode="llava_v1",
        num_visual_tokens=12, image_file=picture, sep=",", temperature=0, top_p=None, num_beams=1, max_new_tokens=4,
        device="cpu",
    )  # fmt: skip
    with record() as requests:
        run_llava.eval_model(args)
    assert requests[0].samples[0].visual_tokens_after == 12 and capsys.readouterr().out


def test_talking_in_the_terminal(mqt, picture, monkeypatch, capsys):
    asked = iter(["What is it?", "Which colour?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked))
    argv = ["--model-path", mqt, "--image-file", picture, "--device", "cpu", "--max-new-tokens", "3", "--temperature"]
    with record() as requests:
        cli.main(cli.parser().parse_args([*argv, "0", "--model-args", "num_visual_tokens=7", "--method", "random@0.5"]))
    assert [request.samples[0].visual_tokens_before for request in requests] == [7, 7]
    assert [request.samples[0].visual_tokens_after for request in requests] == [3, 3]
    assert capsys.readouterr().out.count("ASSISTANT:") == 2


def test_wrong_run_parameters_are_refused(mqt):
    with pytest.raises(UnknownNameError, match="num_visual_tokens"):
        assistant(mqt, model_args="tokens=3")
    with pytest.raises(MethodError, match="outside the allowed range"):
        assistant(mqt, model_args="num_visual_tokens=300")
    with pytest.raises(MethodError, match="has no run parameters"):
        assistant(str(CHECKPOINTS / "tiny-llava-1.5"), model_args="num_visual_tokens=3")
