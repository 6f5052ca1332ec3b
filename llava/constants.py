"""Names and ids shared by the whole LLaVA tree, with the values of LLaVA's and LLaVA-NeXT's `llava.constants`."""

CONTROLLER_HEART_BEAT_EXPIRATION = 30  # seconds
WORKER_HEART_BEAT_INTERVAL = 15  # seconds
LOGDIR = "."

# Label value that the loss ignores.
IGNORE_INDEX = -100
# Id that stands in `input_ids` where a visual item will be spliced in. It is never a row of the embedding table.
IMAGE_TOKEN_INDEX = -200

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
# Where a question of the command-line scripts wants its image; they write DEFAULT_IMAGE_TOKEN there.
IMAGE_PLACEHOLDER = "<image-placeholder>"
