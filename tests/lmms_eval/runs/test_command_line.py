"""The command line of a run: lmms-eval's own rules, and one line for what would be ignored or passed by."""

from __future__ import annotations

import argparse
import sys

import pytest
import yaml

pytest.importorskip("lmms_eval")

from lmms_eval_accelerate import cli
from lmms_eval_accelerate.models import generation
from lmms_eval_accelerate.models.generation import READS, check, check_given, check_requests
from lmms_eval_accelerate.runs import command_line, evaluation
from lmms_eval_accelerate.runs.command_line import own_options, read
from lmms_eval_accelerate.runs.folder import RunError

from accelerate_methods.stages.errors import MethodError

MODEL = "llava_onevision_fastvid"


def options(*more: str, model: str = MODEL):
    return own_options(["--model", model, "--tasks", "mme", *more])


@pytest.mark.slow
def test_options_are_those_of_lmms_eval(monkeypatch):
    """Read off its source: the same names, destinations, numbers of values and defaults as its own parser has."""
    import lmms_eval.__main__ as harness

    monkeypatch.setattr(sys, "argv", ["lmms-eval"])
    real, _ = harness.parse_eval_args()

    def facts(parser) -> dict:
        return {
            name: (action.dest, action.nargs, type(action).__name__)
            for action in parser._actions
            for name in action.option_strings
        }

    ours = {action for action in command_line.own_parser()._actions}
    own_names = {name for action in ours for name in action.option_strings} - {"--output_path", "--log_samples"}
    found = {name: fact for name, fact in facts(command_line._parser()).items() if name not in own_names}
    assert found == {name: fact for name, fact in facts(real).items() if name not in ("-h", "--help")}
    defaults, seen = vars(real.parse_args([])), vars(read([]))
    computed = {"seed"}
    assert {k: v for k, v in defaults.items() if k not in computed}.items() <= seen.items()


@pytest.mark.parametrize(
    "words", [["--use_cache", "D"], ["--use_cache=D"], ["-c", "D"], ["-cD"], ["-wcD"], ["--use_cache", ""]]
)
def test_the_response_cache_is_refused_however_it_is_written(words):
    with pytest.raises(RunError, match="--allow_cache"):
        options(*words)
    own, _ = options(*words, "--allow_cache")
    assert own.use_cache == (words[-1] if len(words) == 2 else "D")


def test_the_response_cache_of_a_config_file_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": MODEL, "tasks": "t", "use_cache": "D"}))
    with pytest.raises(RunError, match="--allow_cache"):
        own_options(["--config", str(file)])
    file.write_text(yaml.safe_dump({"model": MODEL, "tasks": "t", "limitt": 3}))
    with pytest.raises(RunError, match="Did you mean 'limit'"):
        own_options(["--config", str(file)])
    file.write_text(yaml.safe_dump({"model": MODEL, "tasks": "t", "gen_kwargs": {"num_beams": 2}}))
    with pytest.raises(RunError, match="gen_kwargs of the config file must be text"):
        own_options(["--config", str(file)])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--use_c", "D"], "--use_c is not written in full; write --use_cache"),
        (["--use_c=D"], "write --use_cache"),
        (["--output", "D"], "--output is not written in full; write --output_path"),
        (["--predict"], "write --predict_only"),
        (["--allow_c"], "write --allow_cache"),
        (["--res"], "write --resume"),
        (["--cache", "true"], "write --cache_requests"),
        (["--lim", "2"], "write --limit"),
        (["--limitt", "2"], "Did you mean '--limit'"),
        (["D"], "'D' belongs to no option"),
        (["--limit"], "expected one argument"),
        (["--limit", "many"], "invalid float"),
        (["--limit", "0"], "not a number of documents from 1"),
        (["--limit", "-2"], "not a number of documents from 1"),
        (["--limit", "2.5"], "not a number of documents from 1"),
        (["--num_fewshot", "2"], "--num_fewshot is not possible"),
        (["--apply_chat_template"], "--apply_chat_template is not possible"),
        (["--model_args", "x"], "'x' is not of the form name=value"),
        (["--gen_kwargs", "x"], "'x' is not of the form name=value"),
    ],
)
def test_what_would_be_ignored_or_passed_by_is_one_line(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["--model", MODEL, "--tasks", "t", *words])
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and says in message and len(message.splitlines()) == 1
    assert not list(tmp_path.iterdir())  # nothing was started


def test_options_go_through_as_they_are():
    own, passed = options("--limit", "3", "--output_path", "D", "--resume", "-n", "2", "--num_fewshot", "0")
    assert passed[4:] == ["--limit", "3", "-n", "2", "--num_fewshot", "0"]
    assert (own.output_path, own.resume, own.model, own.tasks, own.limit) == ("D", True, MODEL, "mme", 3.0)
    assert options("--limit", "0.25")[0].limit == 0.25 and options("--limit", "-1")[0].limit == -1
    # models of lmms-eval itself read what they read
    assert own_options(["--model", "llava", "--tasks", "mme", "--gen_kwargs", "guidance_scale=2"])[0].model == "llava"


def test_a_run_needs_tasks():
    with pytest.raises(RunError, match="--tasks"):
        own_options(["--model", MODEL])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("guidance_scale=2", "guidance_scale=2 is not possible: a document has no negative prompt"),
        ("num_return_sequences=3", "num_return_sequences=3 is not possible: a document has one answer"),
        ("num_return_sequences=0", "not possible"),
        ("output_scores=true", "not possible: answers are text"),
        ("return_dict_in_generate=true", "not possible: answers are text"),
        ("prompt_lookup_num_tokens=3", "without drafts"),
        ("assistant_model=org/small", "without drafts"),
        ("cache_implementation=static", "choose the KV cache"),
        ("use_cache=false", "model argument use_cache=false"),
        ("max_length=300", "max_new_tokens counts the answer"),
        ("max_new_tokens=0", "max_new_tokens must be a whole number from 1, not 0"),
        ("max_new_tokens=2.5", "max_new_tokens must be a whole number"),
        ("num_beams=0", "num_beams must be a whole number from 1"),
        ("temperature=-1", "temperature must be a number from 0"),
        ("temperature=hot", "temperature must be a number from 0"),
        ("top_p=1.5,temperature=1", "top_p must be a number from 0 to 1"),
        ("do_sample=no", "do_sample must be true or false"),
        ("do_sample=false,temperature=0.7", "means nothing with do_sample=false"),
        ("do_sample=true,temperature=0", "needs a temperature above 0"),
        ("top_p=0.9", "means nothing without sampling"),
        ("until=", "until is one text"),
        ('until=["a"]', "several can only stand in a task's file"),
        ("until=4", "until must be text"),
        ("streamer=x", "Allowed: "),
        ("max_new_token=3", "Did you mean 'max_new_tokens'"),
    ],
)
@pytest.mark.parametrize("family", {READS[family]: family for family in READS}.values())  # of each set of rules one
def test_generation_arguments_that_no_model_can_follow(given, says, family):
    with pytest.raises(MethodError) as error:
        check_given(given, family, {"until": "apply"})
    assert says in str(error.value) and "\n" not in str(error.value)


def test_generation_arguments_are_judged_as_the_family_reads_them():
    check_given("temperature=0,top_k=0,top_p=0", "llava_onevision", {})  # the example of lmms-eval's help
    check_given("temperature=0.7,top_p=0.9", "llava", {})
    check_given("temperature=0.7,do_sample=true,repetition_penalty=1.1", "llava_onevision", {})
    check_given("num_return_sequences=1,output_scores=false,guidance_scale=1", "llava", {})  # they change nothing
    with pytest.raises(MethodError, match="needs do_sample=true; llava_onevision is greedy"):
        check_given("temperature=0.7", "llava_onevision", {})
    with pytest.raises(MethodError, match="needs a temperature"):
        check_given("do_sample=true", "llava", {})
    with pytest.raises(MethodError, match="'repetition_penalty'"):
        check_given("repetition_penalty=1.1", "hf", {})
    check_given("until=a", "hf", {"until": "apply"})
    with pytest.raises(MethodError, match="ignored as long as the model argument until"):
        check_given("until=a", "hf", {})


def test_generation_arguments_of_a_task():
    check(
        {"until": [], "do_sample": False, "temperature": 0, "top_p": None, "num_beams": 1, "visual_cot": True}, "task"
    )
    for bad in ({"until": ["a", 4]}, {"max_new_tokens": 0}, {"num_return_sequences": 2}, {"guidance_scale": 1.5}):
        with pytest.raises(MethodError, match=r"task t.*not"):
            check(bad, "task t")


def test_a_model_judges_its_requests_before_it_answers_any():
    """Whoever started it: lmms-eval's own command knows nothing of these rules."""
    from lmms_eval.api.instance import Instance

    def request(**values) -> Instance:
        arguments = ("question", values, None, 0, "t", "test")
        metadata = {"task": "t", "doc_id": 0, "repeats": 1}
        return Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata)

    check_requests([request(max_new_tokens=4, until=[])])
    with pytest.raises(MethodError, match=r"generation arguments of task t: guidance_scale=3 is not possible"):
        check_requests([request(max_new_tokens=4), request(guidance_scale=3)])


def test_every_generation_argument_of_the_stock_tasks_passes():
    """What lmms-eval 0.7.3 ships must not be refused."""
    import importlib.util
    from pathlib import Path

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda *_: None)
    (folder,) = importlib.util.find_spec("lmms_eval").submodule_search_locations
    seen = 0
    for path in Path(folder, "tasks").rglob("*yaml"):
        text = path.read_text(encoding="utf-8")
        if "generation_kwargs:" in text:
            try:
                content = yaml.load(text, Loader)
            except yaml.YAMLError:
                continue
            check(content.get("generation_kwargs") or {}, str(path))
            seen += 1
    assert seen > 300


def test_arguments_of_generate_are_read_by_a_family_or_refused():
    """No name stands in both lists, and rules are for names that are read."""
    for reads in READS.values():
        assert not reads & set(generation._REFUSED)
    assert set(generation._RULES) <= set.union(*map(set, READS.values()))


@pytest.mark.slow
def test_the_table_of_lmms_eval_shows_none_either(monkeypatch) -> None:
    """It prints what the function gives back that runs one evaluation."""
    import lmms_eval.__main__ as harness

    made, printed = {"results": {"t": {"bypass,none": 999}}}, []
    monkeypatch.setattr(harness, "cli_evaluate_single", lambda args: (made, {"t": []}))
    said = argparse.Namespace(include_path=None)
    monkeypatch.setattr(evaluation, "stock_command", lambda argv: printed.append(harness.cli_evaluate_single(said)[0]))
    assert evaluation._harness(argparse.Namespace(), [])["results"] == printed[0] == {"results": {"t": {}}}
