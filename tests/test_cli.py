"""The command line: what it prints, how it fails, what it leaves behind."""

import errno
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import manyheads
from manyheads import cli, layers, studies
from manyheads.cache import policies
from manyheads.evaluate import compare as job
from tests.test_report import made


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refused(*arguments):
    """The one sentence on stderr of a call that is refused."""
    result = call(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("manyheads: ") and result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_version():
    assert call("--version").stdout == f"manyheads {manyheads.__version__}\n"


# ---- ls, show ----


def test_ls_json_lists_everything():
    rows = json.loads(call("ls", "--json").stdout)
    assert {r["name"] for r in rows if r["kind"] == "mechanism"} == set(manyheads.names())
    assert {r["name"] for r in rows if r["kind"] == "layer"} == set(layers.names())
    assert {r["name"] for r in rows if r["kind"] == "policy"} == set(policies.names())
    assert {r["name"] for r in rows if r["kind"] == "study"} == set(studies.names())
    assert len({r["name"] for r in rows}) == len(rows), "a name means one thing"
    keys = {"name", "kind", "system", "family", "form", "engines", "labels", "arxiv", "summary", "sizes", "settings"}
    for r in rows:
        assert set(r) == keys and r["summary"], r["name"]
        assert set(r["labels"]) == {"causal", "sees_future", "needs_training"}
        assert ("eager" in r["engines"]) == (r["kind"] == "mechanism"), r["name"]


def test_ls_tells_engines_and_labels():
    rows = {r["name"]: r for r in json.loads(call("ls", "--json").stdout)}
    assert rows["causal"]["engines"] == ["sdpa", "flex", "eager"] and rows["causal"]["form"] == "Scores"
    assert rows["gemma2"]["engines"] == ["flex", "eager"], "sdpa takes no score function"
    assert rows["moba"]["engines"] == ["sdpa", "eager"], "flex has no selection"
    assert rows["full"]["labels"]["causal"] is False
    assert rows["lightning_attention_2"]["labels"]["needs_training"] is True
    assert rows["flexprefill"]["labels"]["sees_future"]


def test_ls_prints_a_line_for_each():
    lines = call("ls").stdout.splitlines()
    first = [line.split()[0] for line in lines]
    assert first == ["name", *manyheads.names(), *layers.names(), *policies.names(), *studies.names()]
    assert "needs training" in next(line for line in lines if line.startswith("lightning_attention_2"))


def test_ls_loads_nothing_that_it_does_not_need():
    code = (
        "import sys; from manyheads.cli import app; app(['ls'], standalone_mode=False);"
        "print([m for m in ('transformers', 'plotly', 'jinja2', 'triton', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", [*manyheads.names(), *layers.names(), *policies.names(), *studies.names()])
def test_show(name):
    about = json.loads(call("show", name, "--json").stdout)
    assert about["name"] == name and "    " in about["text"], "the equation stands in the docstring"
    text = call("show", name).stdout
    assert about["summary"][:60] in text.replace("\n", " ")
    assert about["text"] in text, "its lines stay as they are"
    for setting in about["settings"]:
        assert f"{setting} = " in text
    for engine, why in about["reasons"].items():
        assert f"{engine}: {why or 'runs it'}" in text


def test_show_tells_laws_and_operands():
    text = call("show", "gemma2").stdout
    assert "gemma2(layer=1, cap=inf) equals causal" in text
    assert json.loads(call("show", "gemma2", "--json").stdout)["laws"], "inf is no JSON, but can be told"
    assert "multi-head attention" in call("show", "moh").stdout.split("laws")[1]
    assert 'manyheads.layers.get("moh")(dim=..., heads=..., shared=..., top_k=...)' in call("show", "moh").stdout
    assert "beta [batch heads len]" in call("show", "kimi_delta_attention").stdout


def test_unknown_name():
    assert "Did you mean 'moba'?" in refused("show", "mobo")


# ---- doctor ----


def test_doctor_is_content_here():
    result = call("doctor", "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == 0
    assert told["machine"]["manyheads"] == manyheads.__version__ and told["machine"]["threads"]
    engines = {c["what"]: c["ok"] for c in told["checks"] if c["what"].startswith("engine ")}
    assert engines == {"engine triton": True, "engine sdpa": True, "engine flex": True, "engine eager": True}


def test_doctor_says_how_to_get_what_is_missing(monkeypatch):
    real = cli.doctor._package
    monkeypatch.setattr(cli.doctor, "_package", lambda name: None if name in ("plotly", "numpy") else real(name))
    result = call("doctor")
    assert result.exit_code == 1, "numpy is required"
    lines = {line.split()[1]: line for line in result.stdout.splitlines() if line[:1] in "✓✗"}
    assert lines["plotly"].startswith("✗") and 'pip install "manyheads[report]"' in lines["plotly"]
    assert lines["torch"].startswith("✓") and "pip install" not in lines["torch"]
    monkeypatch.setattr(cli.doctor, "_package", lambda name: None if name == "plotly" else real(name))
    assert call("doctor").exit_code == 0, "plotly is not"


def test_doctor_survives_an_engine_that_does_not_load(monkeypatch):
    monkeypatch.setitem(sys.modules, "manyheads.engines.flex", None)
    checks = {c["what"]: c for c in json.loads(call("doctor", "--json").stdout)["checks"]}
    assert checks["engine flex"]["ok"] is False and "flex" in checks["engine flex"]["found"]


# ---- compare ----


@pytest.fixture
def ran(monkeypatch):
    """compare.run replaced by one that has results at once; what it was called with."""
    calls = SimpleNamespace(given=None, then=lambda: None, results=made())

    def run(text, **options):
        calls.given = {"text": text, **options}
        for done in (1, 2):
            partial = {**calls.results, "rows": calls.results["rows"][:done], "complete": False}
            options["watch"](job.Progress(partial, "moba", "reading", done, 5))
        calls.then()
        return calls.results

    monkeypatch.setattr(job, "run", run)
    return calls


def test_compare_passes_on_what_it_is_given(ran, tmp_path):
    result = call(
        "compare", "a.txt", "b.txt", "--model", "m", "--mechanisms", "moba(top_k=4),snapkv", "--context", 512,
        "--out", tmp_path, "--repeats", 5, "--seed", 7, "--device", "cpu", "--dtype", "bfloat16", "--fresh",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    ran.given.pop("watch")
    assert ran.given == dict(
        text=["a.txt", "b.txt"], model="m", mechanisms="moba(top_k=4),snapkv", context=512, out=tmp_path, repeats=5,
        seed=7, device="cpu", dtype="bfloat16", fresh=True,
    )  # fmt: skip


@pytest.mark.parametrize("terminal", ["0", "1"])
def test_compare_prints_the_table_and_writes_the_page(ran, tmp_path, monkeypatch, terminal):
    monkeypatch.setenv("TTY_COMPATIBLE", terminal)
    result = call("compare", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    for text in ("snapkv(budget=512)", "11.8 MB", "lightning_attention_2", "Take snapkv(budget=512): a quarter"):
        assert text in result.stdout
    assert str(tmp_path / "compare.html") in result.stdout.replace("\n", "")
    assert "Take snapkv(budget=512): a quarter" in (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert ("[1/5] dense" in result.stderr) is (terminal == "0")


def test_compare_sets_the_threads(ran, tmp_path, monkeypatch):
    import torch

    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    call("compare", "--out", tmp_path, "--threads", 3)
    assert told == [3]
    assert call("compare", "--out", tmp_path, "--threads", 0).exit_code == 2


def test_compare_stopped(ran, tmp_path):
    def stop():
        raise KeyboardInterrupt

    ran.then = stop
    result = call("compare", "--out", tmp_path)
    assert result.exit_code == 130
    assert result.stderr.endswith("manyheads: stopped; run the same command to go on\n")
    assert "has not finished: 4" in (tmp_path / "compare.html").read_text(encoding="utf-8"), "2 rows and 2 untrained"


def test_compare_opens_the_page(ran, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(cli.typer, "launch", opened.append)
    call("compare", "--out", tmp_path, "--open")
    assert opened == [(tmp_path / "compare.html").resolve().as_uri()]


def test_compare_needs_plotly_before_it_starts(ran, tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else real(name))
    assert 'pip install "manyheads[report]"' in refused("compare", "--out", tmp_path)
    assert ran.given is None


# ---- how it fails ----


def test_bad_input_is_one_sentence(tmp_path):
    a_file = tmp_path / "file"
    a_file.write_bytes(b"\x00\xff" * 200)
    out = ("--out", tmp_path / "out")
    assert "'mobo'" in refused("compare", "--mechanisms", "mobo", *out)
    assert "Did you mean 'top_k'?" in refused("compare", "--mechanisms", "moba(topk=3)", *out)
    assert "repeats" in refused("compare", "--repeats", 0, *out)
    assert "context" in refused("compare", "--context", 3, *out)
    assert "nowhere.txt" in refused("compare", tmp_path / "nowhere.txt", *out)
    assert "file" in refused("compare", a_file, *out)
    assert "is a file" in refused("compare", "--out", a_file)
    assert os.listdir(tmp_path) == ["file"], "nothing is left behind"


def test_a_full_disk_is_a_sentence(ran, tmp_path):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "compare.json")

    ran.then = full
    result = call("compare", "--out", tmp_path)
    assert result.exit_code == 2 and result.stderr.endswith("manyheads: No space left on device: compare.json\n")


def test_a_bug_keeps_its_traceback(ran, tmp_path):
    def bug():
        raise ValueError("not one of ours")

    ran.then = bug
    result = call("compare", "--out", tmp_path)
    assert isinstance(result.exception, ValueError) and result.exit_code == 1


@pytest.mark.parametrize(("bug", "kind"), [(int, TypeError), ({}.__getitem__, KeyError)])
def test_a_bug_inside_the_package_keeps_its_traceback(tmp_path, monkeypatch, bug, kind):
    monkeypatch.setattr(job.texts, "read", bug)  # int(None) is a TypeError of Python's, on a line of ours
    result = call("compare", "--out", tmp_path)
    assert isinstance(result.exception, kind) and result.exit_code == 1


def test_debug_shows_where_an_error_of_ours_comes_from():
    result = call("--debug", "show", "mobo")
    assert isinstance(result.exception, ValueError) and "moba" in str(result.exception)


def test_a_pipe_that_closes_is_no_error():
    code = f"{sys.executable} -m manyheads.cli ls | head -1"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("name") and "Traceback" not in done.stderr
