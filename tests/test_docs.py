"""The documentation is true: derived pages are fresh, snippets run, links lead somewhere."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import manyheads
from manyheads import layers, studies
from manyheads.cache import policies

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
ALL_BLOCKS = [b for page in PAGES for b in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)]


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_index_of_mechanisms_is_up_to_date():
    assert (ROOT / "docs" / "mechanisms.md").read_text(encoding="utf-8") == generator().page(), "make docs"


def test_the_index_has_every_mechanism_layer_policy_and_study():
    listed = re.findall(r"^\| \[`(\w+)`\]", generator().page(), re.M)
    assert sorted(listed) == sorted([*manyheads.names(), *layers.names(), *policies.names(), *studies.names()])


def test_an_index_out_of_date_is_noticed(tmp_path, monkeypatch):
    module = generator()
    monkeypatch.setattr(module, "PAGE", tmp_path / "mechanisms.md")
    assert module.main(["--check"]) == 1
    assert module.main([]) == 0 and module.main(["--check"]) == 0
    module.PAGE.write_text(module.page().replace("moba", "mobo"), encoding="utf-8")
    assert module.main(["--check"]) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("source", [b for b in ALL_BLOCKS if "@mechanism" not in b], ids=lambda b: b.splitlines()[0])
def test_snippets_run(source, model):
    exec(compile(source, "a page", "exec"), {"model": model, "ids": torch.ones(1, 12, dtype=torch.long)})


def test_the_readme_has_its_snippets():
    assert len(BLOCKS) == 3 and sum("@mechanism" in b for b in BLOCKS) == 1
    assert README.index("make compare") < README.index("make test") < README.index("##"), "two commands at the top"


@pytest.fixture(scope="module")
def invented(tmp_path_factory):
    """The file that the README shows, imported as if it lay where it says."""
    name = re.search(r"This is `manyheads/(mechanisms/\w+/\w+)\.py`", README)[1].replace("/", ".")
    source = next(b for b in BLOCKS if "@mechanism" in b)
    file = tmp_path_factory.mktemp("invented") / "fan.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"manyheads.{name}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module.fan
    del sys.modules[spec.name]


def test_the_invented_mechanism_equals_its_reference(invented):
    assert (invented.name, invented.family) == ("fan", "sparse") and invented.summary.startswith("Fan attention")
    q, k, v = (torch.randn(2, 3, 17, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    for q_len in (17, 5):
        wanted = invented.reference(q[:, :, -q_len:], k, v, window=3)
        for engine in ("eager", "sdpa"):
            o = manyheads.attention(q[:, :, -q_len:], k, v, invented(window=3), engine=engine)
            torch.testing.assert_close(o, wanted, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(o.square().sum(), (q, k, v))
    for one, other in zip(grads, torch.autograd.grad(wanted.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_invented_mechanism_holds_its_law(invented):
    q, k, v = (torch.randn(1, 3, 17, 8, dtype=torch.float64) for _ in range(3))
    (law,) = invented.laws
    o = manyheads.attention(q, k, v, invented(**law.settings))
    torch.testing.assert_close(o, manyheads.attention(q, k, v, law.equals), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("line", re.findall(r"`(manyheads (?:ls|show|doctor)[^`]*)`", README), ids=str)
def test_commands_of_the_readme_exist(line):
    words = [sys.executable, "-m", "manyheads.cli", *line.split()[1:]]
    assert subprocess.run(words, capture_output=True).returncode == 0


def test_the_readmes_compare_is_understood():
    from manyheads.evaluate.specs import parse_list

    for given in re.findall(r'--mechanisms "([^"]+)"', README):
        if "fan" not in given:
            assert parse_list(given)
