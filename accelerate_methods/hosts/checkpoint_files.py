"""The files of a checkpoint, in a folder or on the hub: found, read, and what is wrong with them in one line."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from accelerate_methods.stages.errors import MethodError, one_line

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")
#: what else is read as JSON; transformers ignores some of them where they are damaged
_JSON = (
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
_POINTER = b"version https://git-lfs"
_IGNORABLE = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
_NUMBERED = re.compile(r"\b(?:layers|blocks|layer)\.\d+\.")
_VISION = re.compile(r"vision|visual|image_newline")


class CheckpointError(MethodError, RuntimeError):
    """A checkpoint that cannot be loaded as asked."""


# -- finding ----------------------------------------------------------------------------------------------------------


def find_file(path: str | Path, name: str) -> Path | None:
    """A file of a local checkpoint folder or hub repository (through the cache); None if there is no such file.

    Raises:
        CheckpointError: no such folder; the hub cannot be reached, has no such repository or wants a login.
    """
    if Path(path).is_dir():
        found = Path(path) / name
        return found if found.is_file() else None
    if str(path).startswith((".", "/", "~")):
        raise CheckpointError(f"cannot reach checkpoint {str(path)!r}: no such folder.")
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub import errors as hub

    where = f"cannot reach checkpoint {str(path)!r}: no such folder, and"
    try:
        return Path(hf_hub_download(str(path), name))
    except hub.LocalEntryNotFoundError as error:  # before its parent, which says that the hub has no such file
        if _in_cache(str(path)):
            return None  # the rest of the checkpoint was downloaded without it
        cause = error.__cause__ or error
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set while the hub's cache does not have it; download it first"
        else:
            reason = f"the hub ({constants.ENDPOINT}) does not answer: {one_line(cause)}"
        raise CheckpointError(f"{where} {reason}.") from error
    except hub.EntryNotFoundError:
        return None
    except hub.GatedRepoError as error:
        raise CheckpointError(f"{where} the hub wants a login that may read it: hf auth login.") from error
    except hub.RepositoryNotFoundError as error:
        reason = "the hub has no such repository (a private one needs a login: hf auth login)"
        raise CheckpointError(f"{where} {reason}.") from error
    except (OSError, ValueError) as error:  # connections, and what is no name of a repository
        raise CheckpointError(f"{where} the hub says: {one_line(error)}") from error


def _in_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


# -- reading ----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        CheckpointError: with the file and the reason.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"cannot read {path}: it holds a {type(content).__name__}, not a mapping.")
    return content


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json as a dict.

    Raises:
        CheckpointError: there is none, it cannot be reached or not be read.
    """
    found = find_file(path, "config.json")
    if found is None:
        raise CheckpointError(f"{str(path)!r} is not a checkpoint: it has no config.json.")
    return read_json(found)


def weight_names(path: str | Path) -> set[str]:
    """Names of all tensors in the checkpoint, read from the index or the file header only where possible.

    Raises:
        CheckpointError: there are none, or their files cannot be read.
    """
    for index in INDEXES:
        if (found := find_file(path, index)) is not None:
            return set(weight_map(found))
    for single in SINGLE:
        if (found := find_file(path, single)) is not None:
            return _names_in(found)
    raise CheckpointError(
        f"{str(path)!r} has no weights: looked for model.safetensors and pytorch_model.bin, single or sharded (with "
        "index)."
    )


def weight_map(index: Path) -> dict[str, str]:
    """Which file of a checkpoint holds each weight, out of its index.

    Raises:
        CheckpointError: it cannot be read, or is no index.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"cannot read {index}: it has no 'weight_map' from names of weights to files.")
    return found


def _names_in(file: Path) -> set[str]:
    """Reads no weights; a file that is not complete is noticed."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as source:
                return set(source.keys())
        mapped = zipfile.is_zipfile(file)  # older files cannot be mapped into memory
        return set(torch.load(file, map_location="meta", weights_only=True, mmap=mapped))
    except Exception as error:  # pickles that are cut or no pickles raise anything
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: BaseException) -> CheckpointError:
    with contextlib.suppress(OSError):
        if file.stat().st_size == 0:
            return CheckpointError(f"cannot read {file}: it is empty.")
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                return CheckpointError(f"cannot read {file}: it is a pointer of Git LFS, not the file; git lfs pull.")
    if isinstance(error, OSError) or not isinstance(error, (SafetensorError, RuntimeError, EOFError)):
        return CheckpointError(f"cannot read {file}: {one_line(error)}")
    return CheckpointError(f"cannot read {file}: it is damaged or not complete ({one_line(error).partition('. ')[0]}).")


# -- checking ---------------------------------------------------------------------------------------------------------


def check_files(path: str | Path | None) -> None:
    """Look into the files of a local checkpoint before anything is loaded: JSON, and the heads of the weights.

    Args:
        path: None, as in transformers, where the weights are given otherwise.

    Raises:
        CheckpointError: the first file that cannot be read, or is missing, with the reason.
    """
    if path is not None and Path(path).is_dir():
        _check_folder(Path(path), complete=True)


def _check_folder(folder: Path, complete: bool) -> None:
    """``complete``: shards that the index names must be there; those of the hub's cache may still be downloaded."""
    for name in ("config.json", *_JSON):
        if (folder / name).is_file():
            read_json(folder / name)
    weights = [folder / name for name in SINGLE]
    for index in (folder / name for name in INDEXES):
        if not index.is_file():
            continue
        weights = [folder / name for name in sorted(set(weight_map(index).values()))]
        missing = [file for file in weights if not file.is_file()]
        if missing and complete:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"cannot read {missing[0]}{more}: no such file, and {index.name} names it.")
        break
    for file in weights:
        if file.is_file():
            _names_in(file)


@contextlib.contextmanager
def reading(path: str | Path | None) -> Iterator[None]:
    """Errors of loading ``path`` inside become one line with the file at fault, as far as one is found.

    Raises:
        CheckpointError: see above. Errors that say nothing of files (memory, missing packages) stay what they are.
    """
    try:
        with _without_report():
            yield
    except MethodError:
        raise
    except Exception as error:
        folder = Path("" if path is None else path)
        if not folder.is_dir():
            with contextlib.suppress(MethodError):
                folder = (find_file(path, "config.json") or folder).parent
        if (folder / "config.json").is_file():
            try:
                _check_folder(folder, complete=False)
            except CheckpointError as damage:
                raise damage from error
        if isinstance(error, (OSError, SafetensorError, UnicodeDecodeError, json.JSONDecodeError)):
            raise CheckpointError(f"cannot load {str(path)!r}: {one_line(error)}") from error
        raise


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """transformers' table of weights that do not fit is not shown: :func:`check_loaded` says it in one line."""
    logger = logging.getLogger("transformers.modeling_utils")

    def wanted(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def check_loaded(
    info: Mapping[str, Any], path: Any, allow_missing: Collection[str] = (), allow_extra: Collection[str] = ()
) -> None:
    """Refuse a checkpoint that left weights of the model uninitialised, or has weights that the model has no place for.

    A half-loaded model answers nonsense, and one of fewer layers than its weights answers worse.

    Args:
        info: ``output_loading_info`` of ``from_pretrained``, called with ``ignore_mismatched_sizes=True``.
        allow_missing, allow_extra: beginnings of names that may be missing from the files, or from the model. What a
            vision tower has beside its layers (heads, norms) may be missing from every model.

    Raises:
        CheckpointError: how many weights, and the first of them.
    """
    missing = _but(info["missing_keys"], allow_missing)
    mismatched = sorted(str(m[0]) if isinstance(m, tuple) else str(m) for m in info.get("mismatched_keys", ()))
    errors = [one_line(error) for error in info.get("error_msgs") or []]
    if missing or mismatched or errors:
        example = (missing or mismatched or errors)[0]
        raise CheckpointError(
            f"checkpoint {str(path)!r} does not fit the model: {len(missing)} weights missing, "
            f"{len(mismatched)} of the wrong shape{', ' + str(errors) if errors else ''} (first: {example})."
        )
    extra = _but(info.get("unexpected_keys", ()), allow_extra)
    extra = [name for name in extra if _NUMBERED.search(name) or not _VISION.search(name)]
    if extra:
        counted = "; its config.json says fewer layers than the weights have" if _NUMBERED.search(extra[0]) else ""
        raise CheckpointError(
            f"checkpoint {str(path)!r} does not fit the model: the model has no place for {len(extra)} of its weights "
            f"(first: {extra[0]}){counted}."
        )


def _but(names: Collection[str], allowed: Collection[str]) -> list[str]:
    return sorted(name for name in names if not _IGNORABLE.search(name) and not name.startswith(tuple(allowed)))
