"""Templates, tokenizers and stopping criteria of `llava`: text.json, and what the official code breaks on."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from llava import constants
from llava.conversation import Conversation, SeparatorStyle, conv_templates, default_conversation
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, tokenizer_image_token
from llava.tokenization import SentencePieceLlamaTokenizer, load_tokenizer
from tests.conformance.adapters.base_text_image import TEXT_CHECKS
from tests.support.paths import TESTS as HERE

TEXT = json.loads((HERE / "golden/base/text.json").read_text(encoding="utf-8"))
CHECKPOINTS = HERE / "golden/checkpoints"
CONTEXT = SimpleNamespace(checkpoint=lambda name: CHECKPOINTS / name)
LLAMA, QWEN = CHECKPOINTS / "tiny-llava-1.5", CHECKPOINTS / "tiny-llava-onevision"
LLAMA_CASES = TEXT["tokenizer_image_token"]["by_checkpoint_tokenizer"]["tiny-llava-1.5"]
QWEN_CASES = TEXT["tokenizer_image_token"]["by_checkpoint_tokenizer"]["tiny-llava-onevision"]


@pytest.fixture(scope="module")
def llama():
    return load_tokenizer(LLAMA)


@pytest.fixture(scope="module")
def qwen():
    return load_tokenizer(QWEN)


# -- golden ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", sorted(TEXT_CHECKS))
def test_golden_section(section):
    results = TEXT_CHECKS[section](TEXT[section], CONTEXT)
    assert results
    assert [f"{name}: {detail}" for name, ok, detail in results if not ok] == []


def test_every_section_is_checked():
    described = {"format", "source"}
    assert set(TEXT) - described - {"load_dispatch"} == set(TEXT_CHECKS)


def test_constants():
    assert (constants.IGNORE_INDEX, constants.IMAGE_TOKEN_INDEX) == (-100, -200)
    assert constants.DEFAULT_IMAGE_TOKEN == "<image>"
    assert constants.DEFAULT_IMAGE_PATCH_TOKEN == "<im_patch>"
    assert (constants.DEFAULT_IM_START_TOKEN, constants.DEFAULT_IM_END_TOKEN) == ("<im_start>", "<im_end>")
    assert (constants.LOGDIR, constants.CONTROLLER_HEART_BEAT_EXPIRATION) == (".", 30)
    assert constants.WORKER_HEART_BEAT_INTERVAL == 15


def test_importing_the_package_is_light():
    code = (
        "import sys, llava; print([m for m in ('torch','transformers','decord','av','lmms_eval') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parent, check=True)
    assert out.stdout.strip() == "[]"


# -- conversations -----------------------------------------------------------------------------------------------------


def test_default_conversation_is_vicuna_v1():
    assert default_conversation == conv_templates["vicuna_v1"]
    assert {style.name for style in SeparatorStyle} >= {template.sep_style.name for template in conv_templates.values()}
    assert all(isinstance(template.roles, tuple) for template in conv_templates.values())


def test_copies_are_independent():
    first = conv_templates["qwen_1_5"].copy()
    first.append_message(first.roles[0], "one")
    first.append_message(first.roles[1], None)
    second = first.copy()
    second.messages[1][1] = "answer"  # lmms-eval writes into the message
    assert first.messages[1][1] is None
    assert conv_templates["qwen_1_5"].messages == []
    assert first.get_prompt().endswith("<|im_start|>assistant\n") and second.get_prompt().endswith("answer<|im_end|>\n")
    examples = conv_templates["default"].copy()
    examples.messages[0][1] = "changed"
    assert conv_templates["default"].messages[0][1].startswith("What are the key differences")


def test_copy_keeps_stop_fields():
    assert conv_templates["llava_llama_3"].copy().stop_token_ids == conv_templates["llava_llama_3"].stop_token_ids != []


def test_llama_3_loads_its_tokenizer_late_and_says_what_is_missing(monkeypatch):
    import transformers

    def offline(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    conversation = copy.deepcopy(conv_templates["llava_llama_3"])
    assert conversation.tokenizer is None
    conversation.append_message(conversation.roles[0], "hello")
    with pytest.raises(ValueError, match=r"meta-llama/Meta-Llama-3-8B-Instruct.*no connection"):
        conversation.get_prompt()


def test_errors_are_clear():
    with pytest.raises(TypeError, match="sep2"):
        conversation = conv_templates["plain"].copy()
        conversation.append_message("", "image")
        conversation.append_message("", "caption")
        conversation.get_prompt()
    with pytest.raises(ValueError, match="QWEN"):
        Conversation("s", ("a", "b"), sep_style=SeparatorStyle.QWEN).get_prompt()
    with pytest.raises(ValueError, match="USER"):
        conversation = conv_templates["llama_2"].copy()
        conversation.append_message(conversation.roles[0], None)
        conversation.get_prompt()


def test_image_messages():
    image = Image.new("RGB", (900, 300), (10, 20, 30))
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], ("What? <image>", image, "Pad"))
    conversation.append_message(conversation.roles[1], "A box.")
    assert "USER: <image>\nWhat? ASSISTANT: A box.</s>" in conversation.get_prompt()
    (pil,) = conversation.get_images(return_pil=True)
    assert pil.size[0] == pil.size[1] and pil.getpixel((0, 0)) == (122, 116, 104)
    assert conversation.get_images(return_path=True) == [image]
    (text,) = conversation.get_images()
    assert isinstance(text, str) and len(text) > 100
    ((question, answer),) = conversation.to_gradio_chatbot()
    assert question.startswith('<img src="data:image/jpeg;base64,') and question.endswith("What?")
    assert answer == "A box."
    assert json.loads(json.dumps(conversation.dict()))["messages"][0] == ["USER", "What? <image>"]
    assert max(conversation.process_image(image, "Default", return_pil=True).size) < 900
    with pytest.raises(ValueError, match="Stretch"):
        conversation.process_image(image, "Stretch")


def test_image_messages_by_style():
    image = Image.new("RGB", (8, 8))
    qwen = conv_templates["qwen_2"].copy()
    qwen.append_message(qwen.roles[0], ("Compare.", [image, image], "Default"))
    assert "user\n<image><image>Compare.<|im_end|>" in qwen.get_prompt()
    tagged = conv_templates["llava_v1_mmtag"].copy()
    tagged.append_message(tagged.roles[0], ("<image>\nWhat?", image, "Default"))
    assert tagged.get_prompt().endswith("USER: <Image><image></Image> ASSISTANT: Received.</s>USER: What? ")


# -- LLaMA tokenizer ---------------------------------------------------------------------------------------------------


def test_llama_is_a_transformers_tokenizer(llama):
    from transformers import PreTrainedTokenizerBase

    assert isinstance(llama, SentencePieceLlamaTokenizer) and isinstance(llama, PreTrainedTokenizerBase)
    assert (len(llama), llama.vocab_size, len(llama.get_vocab())) == (1000, 1000, 1000)
    assert (llama.unk_token_id, llama.bos_token_id, llama.eos_token_id, llama.pad_token_id) == (0, 1, 2, 0)
    assert (llama.bos_token, llama.eos_token, llama.pad_token) == ("<s>", "</s>", "<unk>")
    assert (llama.padding_side, llama.model_max_length) == ("right", 2048)
    assert llama.name_or_path == str(LLAMA)
    assert llama.decode(llama.eos_token_id) == "</s>"


@pytest.mark.parametrize("text", ["a dog", "  two", " a", "é世界 🙂", "a\n\nb ", "\t", "Hello  world\n\n3.14", ""])
def test_llama_decode_restores_text(llama, text):
    ids = llama(text).input_ids
    assert ids[0] == llama.bos_token_id
    assert llama.decode(ids, skip_special_tokens=True) == text
    assert llama.batch_decode(torch.tensor([ids]), skip_special_tokens=True) == [text]


def test_llama_specials_inside_text(llama):
    assert llama("</s>").input_ids == [1, 2]  # the lone word boundary before a special token goes
    ids = llama("A dog.</s>USER").input_ids
    assert llama.decode(ids) == "<s> A dog.</s>USER"
    assert llama.decode(ids, skip_special_tokens=True) == "A dog.USER"
    assert llama.encode("hi", add_special_tokens=False) == llama.encode("hi")[1:]
    with pytest.raises(IndexError, match="-200"):
        llama.decode([5, -200])


def test_llama_batches_pad_and_truncate(llama):
    batch = llama(["a b", "hello world, yes"], return_tensors="pt", padding=True)
    short, long = llama("a b").input_ids, llama("hello world, yes").input_ids
    assert batch.input_ids.tolist() == [short + [0] * (len(long) - len(short)), long]
    assert batch.attention_mask.sum(1).tolist() == [len(short), len(long)]
    assert llama("hello world, yes", truncation=True, max_length=4).input_ids == long[:4]
    left = copy.deepcopy(llama)
    left.padding_side = "left"
    assert left(["a b", "hello world, yes"], padding=True).input_ids[0][-len(short) :] == short
    assert llama("a", "b").input_ids == llama("a").input_ids + llama("b").input_ids


def test_llama_tokens_can_be_added(llama, tmp_path):
    tokenizer = copy.deepcopy(llama)
    assert tokenizer.add_tokens(["<im_patch>"], special_tokens=True) == 1
    assert tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True) == 2
    assert tokenizer.add_tokens(["<im_end>", "</s>"], special_tokens=True) == 0
    assert (len(tokenizer), len(llama)) == (1003, 1000)
    assert tokenizer.convert_tokens_to_ids(["<im_patch>", "<im_end>", "never seen"]) == [1000, 1002, 0]
    ids = tokenizer("a<im_patch> b <im_end>").input_ids
    assert 1000 in ids and ids[-1] == 1002
    assert tokenizer.decode(ids) == "<s> a<im_patch> b <im_end>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a b "
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert len(again) == 1003 and again("a<im_patch> b <im_end>").input_ids == ids


def test_llama_copies_keep_the_rule(llama, tmp_path):
    llama.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/tokenizer.model").read_bytes() == (LLAMA / "tokenizer.model").read_bytes()
    saved = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "LlamaTokenizer" and saved["legacy"] is False and saved["add_bos_token"] is True
    copies = [pickle.loads(pickle.dumps(llama)), copy.deepcopy(llama), load_tokenizer(tmp_path / "saved")]
    copies.append(SentencePieceLlamaTokenizer.from_pretrained(tmp_path / "saved"))
    for tokenizer in copies:
        for case in LLAMA_CASES:
            assert tokenizer_image_token(case["prompt"], tokenizer) == case["ids"]
        assert tokenizer.pad_token_id == 0


def test_llama_bos_and_eos_are_options():
    tokenizer = SentencePieceLlamaTokenizer(LLAMA / "tokenizer.model", add_bos_token=False, add_eos_token=True)
    ids = tokenizer("hi").input_ids
    assert 1 not in ids and ids[-1] == 2
    assert tokenizer.get_special_tokens_mask(ids[:-1]) == [0] * (len(ids) - 1) + [1]
    # Without a BOS nothing is cut off the pieces.
    assert tokenizer_image_token("hi<image>hi", tokenizer) == [*ids, -200, *ids]


def test_llama_legacy_rule_prefixes_every_piece():
    legacy = SentencePieceLlamaTokenizer(LLAMA / "tokenizer.model", legacy=True)
    new = SentencePieceLlamaTokenizer(LLAMA / "tokenizer.model")
    assert legacy("hello").input_ids == new("hello").input_ids
    assert legacy("x</s>hello").input_ids[-len(new("hello").input_ids) + 1 :] == new("hello").input_ids[1:]
    assert new("x</s>hello").input_ids != legacy("x</s>hello").input_ids


def test_no_chat_template_is_said_clearly(llama):
    with pytest.raises(ValueError, match="chat_template"):
        llama.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


# -- choosing a tokenizer ----------------------------------------------------------------------------------------------


def test_qwen(qwen):
    assert (len(qwen), qwen.bos_token_id, qwen.eos_token, qwen.pad_token) == (1000, None, "<|im_end|>", "<|endoftext|>")
    assert qwen.decode(qwen("A  dog\n<|im_end|>").input_ids, skip_special_tokens=True) == "A  dog\n"
    assert qwen.name_or_path == str(QWEN)


@pytest.mark.parametrize("files", [("vocab.json", "merges.txt"), ("tokenizer.json",)])
def test_qwen_from_either_kind_of_file(tmp_path, files):
    for name in (*files, "tokenizer_config.json", "config.json"):
        shutil.copyfile(QWEN / name, tmp_path / name)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 1000
    for case in QWEN_CASES:
        assert tokenizer_image_token(case["prompt"], tokenizer) == case["ids"]


def test_config_fills_in_what_the_tokenizer_config_leaves_out(tmp_path):
    shutil.copyfile(LLAMA / "tokenizer.model", tmp_path / "tokenizer.model")
    config = SimpleNamespace(tokenizer_padding_side="left", tokenizer_model_max_length=77)
    tokenizer = load_tokenizer(tmp_path, config)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 77)
    assert tokenizer.legacy  # the flag came with the new rule, so its absence means the old one
    assert load_tokenizer(LLAMA, config).padding_side == "right"


def test_added_tokens_of_a_checkpoint_are_kept():
    tokenizer = load_tokenizer(CHECKPOINTS / "tiny-voco-llama")
    assert len(tokenizer) == 1001 and tokenizer.convert_tokens_to_ids("<voco>") == 1000
    assert tokenizer("a <voco><voco> b").input_ids.count(1000) == 2
    assert tokenizer.padding_side == "left"


def test_no_tokenizer_lists_the_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model.*tokenizer\.json.*vocab\.json"):
        load_tokenizer(tmp_path)


# -- placeholders, names, stopping -------------------------------------------------------------------------------------


def test_tokenizer_image_token_forms(llama):
    ids = tokenizer_image_token("<image>\nHi", llama, return_tensors="pt")
    assert ids.dtype == torch.long and ids.ndim == 1 and ids[:2].tolist() == [1, -200]
    assert tokenizer_image_token("<image>", llama, image_token_index=-7) == [1, -7]
    assert tokenizer_image_token("", llama, return_tensors="pt").tolist() == [1]
    with pytest.raises(ValueError, match="'tf'"):
        tokenizer_image_token("x", llama, return_tensors="tf")


def test_empty_prompt_of_a_tokenizer_without_bos(qwen):
    ids = tokenizer_image_token("", qwen, return_tensors="pt")
    assert ids.dtype == torch.long and ids.shape == (0,)


def test_model_names():
    assert get_model_name_from_path("checkpoint-3") == "checkpoint-3"
    assert get_model_name_from_path("/run/checkpoint-3//".rstrip("/")) == "run_checkpoint-3"


@pytest.mark.parametrize("repeats_prompt", [False, True])
def test_keywords_of_several_tokens(llama, repeats_prompt):
    prompt = torch.tensor([llama("Say ### to stop:").input_ids])
    stop = KeywordsStoppingCriteria(["###"], llama, prompt)
    answer = llama("A dog###", add_special_tokens=False).input_ids
    head = prompt[0].tolist() if repeats_prompt else []
    assert stop(torch.tensor([head + answer]), None) is True
    assert stop(torch.tensor([head + answer[:-3]]), None) is False
    assert stop(torch.tensor([head + answer[:1]]), None) is False  # a keyword in the prompt does not count


def test_keywords_for_a_batch_end_row_by_row(llama):
    stop = KeywordsStoppingCriteria(["</s>", "stop here"], llama, torch.zeros((3, 4), dtype=torch.long))
    rows = [llama(text, add_special_tokens=False).input_ids for text in ("please stop here", "go on and on", "x")]
    rows[2] = rows[2] + [llama.eos_token_id]
    width = max(map(len, rows))
    output = torch.tensor([[5] * (width - len(row)) + row for row in rows])
    result = stop(output, None)
    assert result.dtype == torch.bool and result.tolist() == [True, False, True]


def test_keywords_that_are_empty_never_stop(llama):
    stop = KeywordsStoppingCriteria([""], llama, torch.zeros((1, 2), dtype=torch.long))  # mistral's separator
    assert stop(torch.tensor([[5, 6]]), None) is False


@pytest.mark.parametrize("prompt", [torch.zeros((1, 0), dtype=torch.long), torch.zeros(0, dtype=torch.long)])
def test_keywords_behind_an_empty_prompt(llama, prompt):
    """Of a prompt that went in as embeddings there are no ids."""
    stop = KeywordsStoppingCriteria(["###"], llama, prompt)
    answer = llama("A dog###", add_special_tokens=False).input_ids
    assert stop(torch.tensor([answer]), None) is True
    assert stop(torch.tensor([answer[:-3]]), None) is False
    assert stop(torch.zeros((1, 0), dtype=torch.long), None) is False
    assert stop(torch.tensor([answer, answer]), None).tolist() == [True, True]


def test_keywords_in_a_stopping_criteria_list(llama):
    from transformers import StoppingCriteriaList

    for rows in ([[7, 2]], [[7, 8]], [[7, 2], [7, 8]]):
        criteria = StoppingCriteriaList([KeywordsStoppingCriteria(["</s>"], llama, torch.zeros((1, 9)))])
        done = criteria(torch.tensor(rows), None)
        assert done.dtype == torch.bool and done.tolist() == [row[-1] == 2 for row in rows]
