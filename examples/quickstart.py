"""The shortest way through: the embedded model, one clip, FastVID on and off, what it kept, a picture.

python examples/quickstart.py        # no GPU, no weights, no network
"""

from accelerate_methods import accelerate, record
from accelerate_methods.visualize import draw_kept_tokens
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.video_utils import load_video

tokenizer, model, image_processor, _ = load_pretrained_model("assets/tiny-llava-onevision", torch_dtype="float32")
clip = load_video("assets/shapes_video/clips/0000.mp4", num_frames=16)
video = image_processor.preprocess(clip.frames, return_tensors="pt")["pixel_values"]

chat = conv_templates["qwen_1_5"].copy()
chat.append_message(chat.roles[0], "<image>\nwhat shape is brown?")
chat.append_message(chat.roles[1], None)
input_ids = tokenizer_image_token(chat.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
asked = {"inputs": input_ids, "images": [video], "modalities": ["video"], "max_new_tokens": 8, "do_sample": False}

print("dense:  ", tokenizer.batch_decode(model.generate(**asked), skip_special_tokens=True)[0].strip())
with accelerate(model, "fastvid", retention_ratio=0.25), record() as requests:
    print("fastvid:", tokenizer.batch_decode(model.generate(**asked), skip_special_tokens=True)[0].strip())

seen = requests[0].samples[0]
print(f"{seen.visual_tokens_after} of {seen.visual_tokens_before} visual tokens went to the language model")
print("picture:", draw_kept_tokens(clip.frames, seen.items[0], "outputs/quickstart.png", "FastVID at 25 %"))
