"""The page of a comparison: whole, self-contained, escaped, honest about what is missing."""

import copy
import errno
import json
import math
import os
import random
import re
from html.parser import HTMLParser

import pytest

from manyheads.evaluate import report
from manyheads.evaluate.report import numbers
from manyheads.evaluate.report.rows import COLOURS, GREY

DENSE = 47_185_920
SPANS = [(a, a + 128) for a in range(0, 2048, 128)] + [(a, a + 64) for a in range(2048, 2304, 64)]


def spread(median, part=0.04):
    return {"median": median, "min": median * (1 - part), "max": median * (1 + part), "runs": [median] * 3}


def row(name, kind="mechanism", label="masked", ratio=1.02, found=7, prefill=3.0, decode=20.0, cache=DENSE, **more):
    settings = more.pop("settings", {})
    inner = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    luck = random.Random(name)
    return {
        "id": f"id-{name}{inner}",
        "name": name,
        "spec": f"{name}({inner})" if inner else name,
        "kind": kind,
        "settings": settings,
        "label": label,
        "system": name,
        "summary": f"What {name} is.",
        "engine": "sdpa",
        "density": None if kind == "policy" else 0.23,
        "mass": None if kind == "policy" else 0.91,
        "use": ["import manyheads", f'manyheads.apply(model, "{name}")', "model.generate(...)"],
        "quality": {
            "perplexity": 16.2 * ratio,
            "perplexity_ratio": ratio,
            "by_position": [
                {"start": a, "end": b, "perplexity": 16.2 + 16.2 * (ratio - 1) * luck.uniform(0.8, 1.2)}
                for a, b in SPANS
            ],
            "kl": 0.02 * (ratio - 1),
            "kl_by_position": [{"start": a, "end": b, "kl": 0.02 * luck.random()} for a, b in SPANS],
            "needle": [{"depth": (n + 0.5) / 8, "found": n < found, "log_probability": -0.2} for n in range(8)],
            "needle_accuracy": found / 8,
        },
        "speed": {"prefill_s": spread(prefill), "decode_tokens_per_s": spread(decode)},
        "memory": {"cache_bytes": cache, "label": label},
        "tiles": None if kind == "policy" else [[float(j <= i) for j in range(8)] for i in range(8)],
        "notes": [],
        "error": None,
        **more,
    }


def made(**more):
    return {
        "manyheads": "0.1.0",
        "created": "2026-11-22T10:14:00+0000",
        "command": "manyheads compare --seed 3",
        "answer": "Take snapkv(budget=512): a quarter of the cache.",
        "complete": True,
        "winner": "snapkv(budget=512)",
        "machine": {"cpu": "Some CPU", "threads": 2, "device": "cpu", "torch": "2.13.0", "transformers": "5.23.0",
                    "python": "3.11.7"},
        "model": {"name": "smollm2", "parameters": 134515008, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64,
                  "dtype": "float32"},
        "text": {"name": "topics", "sha256": "ab" * 32, "tokens": 118034},
        "context": 2048,
        "seed": 3,
        "repeats": 3,
        "rows": [
            row("dense", kind="dense", label="dense", ratio=1.0, found=8, prefill=3.1, decode=19.8, density=1.0),
            row("moba", settings={"block_size": 64, "top_k": 8}, ratio=1.021, prefill=2.4),
            row("sliding_window", settings={"window": 512}, ratio=1.047, found=2, prefill=2.2),
            row("sliding_window", settings={"window": 128}, ratio=3.9, found=1, prefill=2.0, decode=20.2),
            row("snapkv", kind="policy", label="freed", settings={"budget": 512}, cache=DENSE // 4, decode=25.0),
            row("h2o", kind="policy", label="masked", settings={"budget": 512}, prefill=1.0, decode=40.0),
        ],
        "untrained": [
            {"name": "lightning_attention_2", "spec": "lightning_attention_2", "system": "l", "summary": "A state.",
             "engine": "eager", "layer_ms": spread(41.2), "speed": {"prefill_s": spread(3.0)}, "memory":
             {"cache_bytes": 1_474_560, "label": "freed"}, "notes": ["a note of its own"]},
            {"name": "agent_attention", "spec": "agent_attention", "layer_ms": spread(12.3), "speed": None,
             "memory": None, "peak_note": "one layer only"},
        ],
        **more,
    }  # fmt: skip


class Page(HTMLParser):
    """Tags and attributes, text, and the JSON in the page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.data, self._inside, self._open = [], "", {}, None, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag in ("script", "style"):
            self._inside = attrs.get("id") or tag

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._inside = None

    def handle_data(self, data):
        if self._inside is None:
            self.text += data
        else:
            self.data[self._inside] = self.data.get(self._inside, "") + data

    @property
    def charts(self):
        return json.loads(self.data["charts"])

    def ids(self):
        return {attrs["id"] for _, attrs in self.tags if "id" in attrs}


@pytest.fixture(scope="module")
def page():
    return Page(report.render(made()))


def cells(results, name):
    found = next(r for r in report.table(results) if r["spec"].startswith(name))
    return {cell["key"]: cell for cell in found["cells"]}


# ---- the page ----


def test_opens_with_the_answer_and_has_every_section(page):
    body = page.text[page.text.index("manyheads compare ·") :]
    assert body.index("Take snapkv(budget=512): a quarter of the cache.") < body.index("Summary")
    wanted = "summary trade position divergence needle memory tiles use untrained method run"
    assert set(wanted.split()) <= page.ids()
    assert set(page.charts) == {"trade", "position", "divergence", "needle", "memory"}
    assert 'manyheads.apply(model, "snapkv")' in page.text
    assert "manyheads compare --seed 3" in page.text and "torch 2.13.0" in page.text and "ab" * 32 in page.text
    assert "measured for speed and memory only" in page.text and "one layer only" in page.text
    assert "the median of 3 runs" in page.text


def test_loads_nothing_from_anywhere(page):
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "http" not in policy
    for tag, attrs in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        assert "src" not in attrs and "srcset" not in attrs, (tag, attrs)
        if tag == "link":
            assert attrs["href"].startswith("data:")
    assert not re.search(r"@import|url\(", page.data["style"])
    rest = page.data["style"] + page.data["charts"] + page.data["tiles-data"] + page.text
    assert "http://" not in rest and "https://" not in rest


def test_names_are_escaped():
    evil = "</script><img src=x onerror=alert(1)>"
    results = made(answer=evil, command=evil)
    results["rows"][1].update(name=evil, spec=evil, summary=evil, use=[evil], notes=[evil])
    results["rows"][2]["error"] = evil
    results["untrained"][0].update(spec=evil)
    text = report.render(results)
    assert evil not in text
    page = Page(text)
    assert not any(tag == "img" for tag, _ in page.tags)
    assert evil in page.text.replace("\u200b", "")
    names = {trace.get("name") for trace in page.charts["trade"]["views"][0]["figure"]["data"]}
    assert evil in names, "the legend sets it as text"
    drawn = json.dumps([chart["views"] for name, chart in page.charts.items() if name in ("needle", "memory")])
    assert "<img" not in drawn, "plotly reads tags in what it draws"


def test_one_colour_for_each_row_everywhere(page):
    rows = {r["title"]: r["colour"] for r in report.table(made())}
    assert len(set(rows.values())) == len(rows) and rows["dense"] == GREY
    for name in ("trade", "position"):
        for view in page.charts[name]["views"]:
            for trace in view["figure"]["data"]:
                assert trace["marker"]["color"] == rows[trace["name"]]
    bars = page.charts["memory"]["views"][0]["figure"]["data"]
    colours = {bar["y"][0].split("<br>")[0]: bar["marker"]["color"] for bar in bars}
    assert colours["moba"] == rows["moba"] and colours["dense"] == GREY
    assert f"background: {rows['moba']}" in report.render(made())


def luminance(colour):
    channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def themes(page):
    light, dark = re.findall(r":root \{(.*?)\}", page.data["style"], re.S)
    light = dict(re.findall(r"(--[a-z-]+): (#[0-9a-f]{6})", light))
    return light, {**light, **dict(re.findall(r"(--[a-z-]+): (#[0-9a-f]{6})", dark))}


def test_colours_can_be_seen_on_the_light_and_the_dark_page(page):
    for theme in themes(page):
        for colour in (*COLOURS, GREY):
            assert contrast(colour, theme["--page"]) > 3.4, (colour, theme["--page"])
        for text in ("--ink", "--soft", "--faint"):
            assert contrast(theme[text], theme["--page"]) > 4, text


def test_the_charts_use_only_colours_that_the_page_has(page):
    used = set(re.findall(r"var\((--[a-z-]+)\)", page.data["charts"] + page.data["tiles-data"]))
    assert used and used <= set(themes(page)[0])


# ---- what is missing ----


@pytest.mark.parametrize("results", [{}, {"rows": []}, {"rows": [{"name": "moba"}], "untrained": [{"name": "x"}]}])
def test_missing_keys_do_not_matter(results):
    page = Page(report.render(results))
    assert "Nothing has been measured yet" in page.text or "What each attention costs" in page.text
    assert page.charts == {}


def test_missing_figures_are_dashes_with_a_reason():
    results = made()
    results["rows"][1]["quality"]["kl"] = None
    results["rows"][1]["quality"]["perplexity"] = math.nan
    results["rows"][1]["quality"]["perplexity_ratio"] = math.inf
    results["rows"][1]["speed"] = None
    found = cells(results, "moba")
    for key in ("kl", "perplexity", "prefill", "decode"):
        assert (found[key]["text"], found[key]["why"], found[key]["below"]) == ("–", "not measured", "")
    assert found["cache"]["text"] == "47.2 MB" and found["cache"]["why"] == ""
    for key in ("density", "mass"):
        assert cells(made(), "snapkv")[key]["why"] == "a policy looks at all that it kept"
    assert 'title="not measured"' in report.render(results)
    assert "NaN" not in Page(report.render(results)).data["charts"]


def test_an_unfinished_run_says_so_at_the_top():
    page = Page(report.render(made(complete=False, asked=["x"] * 12)))
    top = page.text[: page.text.index("Summary")]
    assert "has not finished: 8 of 12 rows" in top and "manyheads compare --seed 3" in top
    assert "has not finished" not in Page(report.render(made())).text


def test_a_failed_row_shows_its_sentence_and_no_figures():
    results = made()
    results["rows"][1]["error"] = "moba does not fit this model."
    page = Page(report.render(results))
    assert "moba does not fit this model." in page.text
    assert "moba" not in {trace["name"] for trace in page.charts["trade"]["views"][0]["figure"]["data"]}


def test_many_rows_keep_apart():
    results = made(rows=[row(f"m{n}") for n in range(30)])
    marks = {(r["colour"], r["symbol"], r["dash"]) for r in report.table(results)}
    assert len(marks) == 30
    assert len(Page(report.render(results)).charts["trade"]["views"][0]["figure"]["data"]) == 30


# ---- honest ----


def test_masked_claims_no_memory(page):
    assert cells(made(), "moba")["cache"]["below"] == "nothing saved"
    bars = page.charts["memory"]["views"][0]["figure"]["data"]
    text = {bar["y"][0].split("<br>")[0]: (bar["text"][0], "pattern" in bar["marker"]) for bar in bars}
    assert text["moba"] == ("47.2 MB · masked", True)
    assert text["snapkv"] == ("11.8 MB · 25 %", False)
    points = page.charts["trade"]["views"][0]["figure"]["data"]
    hollow = {point["name"]: point["marker"]["symbol"].endswith("-open") for point in points}
    assert hollow["moba"] and hollow["h2o"] and not hollow["snapkv"] and not hollow["dense"]


def test_a_masked_policy_claims_no_speed_either(page):
    view = page.charts["trade"]["views"][1]
    assert "h2o" not in {trace["name"] for trace in view["figure"]["data"]}
    assert "h2o" in view["note"]
    assert "moba" in {trace["name"] for trace in view["figure"]["data"]}, "what skips keys is timed as it is"
    assert not cells(made(), "h2o")["prefill"]["best"] and not cells(made(), "h2o")["decode"]["best"]


def test_best_is_the_best_and_what_the_spread_does_not_tell_from_it():
    results = made()
    best = {key: [r["spec"] for r in report.table(results) for c in r["cells"] if c["key"] == key and c["best"]]
            for key in ("perplexity", "needle", "prefill", "decode", "cache")}  # fmt: skip
    assert best["decode"] == ["snapkv(budget=512)"], "h2o is faster, but masked"
    assert best["cache"] == ["snapkv(budget=512)"]
    assert best["prefill"] == ["sliding_window(window=128)"]
    assert best["perplexity"] == ["snapkv(budget=512)", "h2o(budget=512)"], "both 1.02; dense is the measure"
    results["rows"][2]["speed"]["prefill_s"] = {"median": 2.2, "min": 2.05, "max": 2.3}
    assert cells(results, "sliding_window(window=512)")["prefill"]["best"], "its range meets that of the best"
    for r in results["rows"]:
        r["speed"]["decode_tokens_per_s"] = spread(20.0)
    assert not any(c["best"] for r in report.table(results) for c in r["cells"] if c["key"] == "decode")


def test_dense_can_be_the_fastest():
    results = made()
    results["rows"][0]["speed"]["decode_tokens_per_s"] = spread(90.0)
    assert cells(results, "dense")["decode"]["best"] and not cells(results, "snapkv")["decode"]["best"]


def test_ratios_are_computed_where_they_are_not_given():
    results = made()
    del results["rows"][1]["quality"]["perplexity_ratio"]
    assert cells(results, "moba")["perplexity"]["below"] == "× 1.021"


def test_an_outlier_is_named_and_does_not_press_the_others_together(page):
    view = page.charts["trade"]["views"][0]["figure"]
    far = next(t for t in view["data"] if t["name"] == "sliding_window window=128")
    bottom, top = view["layout"]["yaxis"]["range"]
    assert "3.90" in far["meta"] and far["y"][0] < 1.3, "drawn at the edge with its value"
    assert top < 1 < bottom < 1.3
    near, whole, _ = page.charts["position"]["views"]
    assert near["figure"]["layout"]["yaxis"]["range"][1] < 3 and "sliding_window window=128" in near["note"]
    assert "range" not in whole["figure"]["layout"]["yaxis"] and whole["note"] == ""


def test_without_outliers_nothing_is_cut_off():
    results = made()
    del results["rows"][3]
    charts = Page(report.render(results)).charts
    assert all(trace["meta"] == "" for trace in charts["trade"]["views"][0]["figure"]["data"])
    assert [view["label"] for view in charts["position"]["views"]] == ["against dense", "as it is"]


def test_the_winner_is_the_one_that_the_answer_names():
    assert report.view(made())["winner"]["spec"] == "snapkv(budget=512)"
    assert report.view(made(winner=None))["winner"] is None
    assert "How to use them" in Page(report.render(made(winner=None))).text
    told = made()
    del told["winner"]
    assert report.view(told)["winner"]["spec"] == "snapkv(budget=512)", "the least loss of those that save"


def test_needles_at_the_same_depth_are_counted_together():
    results = made()
    results["rows"][1]["quality"]["needle"] = [{"depth": 0.5, "found": True}, {"depth": 0.5, "found": False}]
    data = Page(report.render(results)).charts["needle"]["views"][0]["figure"]["data"][0]
    at = data["y"].index("moba"), data["x"].index("50")
    assert data["z"][at[0]][at[1]] == 0.5 and data["text"][at[0]][at[1]] == "1/2"
    assert data["z"][0][at[1]] is None, "dense was not asked there"


@pytest.mark.parametrize(
    "tiles, drawn",
    [
        ([[2, 0], [1, 2]], [[1, None], [0.5, 1]]),  # states; the future is blank
        ([[0.5, 0.0], [0.0, 1.0]], [[0.5, None], [0.0, 1.0]]),  # shares; the past that was not looked at is not
        ([[0.5, 0.7], [0.2, 1.0]], [[0.5, 0.7], [0.2, 1.0]]),  # what does look ahead shows it
        ([[0.0, 1.0, 0.0]], [[0.0, 1.0, 0.0]]),  # the last query sees all keys
    ],
)
def test_tiles(tiles, drawn):
    results = made()
    results["rows"][1]["tiles"] = tiles
    found = next(t for t in report.view(results)["tiles"] if t["title"] == "moba")
    assert found["view"]["figure"]["data"][0]["z"] == drawn
    assert found["caption"] == "saw 23 %, mass 91 %"


@pytest.mark.parametrize(
    "value, digits, text",
    [(0, 3, "0"), (16.24, 3, "16.2"), (1234.5, 3, "1,234"), (0.00823, 2, "0.0082"), (3e-9, 2, "3.0e-09")],
)
def test_figures(value, digits, text):
    assert numbers.figures(value, digits) == text


def test_ranges_have_the_unit_once():
    assert cells(made(), "dense")["prefill"]["below"] == "2.98 – 3.22 s"
    assert cells(made(), "dense")["decode"]["below"] == "19.0 – 20.6/s"


# ---- the file ----


def test_written_whole(tmp_path):
    path = report.write(made(), tmp_path / "compare.html")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert os.listdir(tmp_path) == ["compare.html"]


@pytest.mark.parametrize("call", ["replace", "open"])
def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch, call):
    path = tmp_path / "compare.html"
    path.write_text("old")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "replace":
        monkeypatch.setattr(os, "replace", full)
        monkeypatch.setattr("pathlib.Path.replace", full)
    else:
        monkeypatch.setattr("pathlib.Path.write_text", full)
        monkeypatch.setattr("pathlib.Path.open", full)
    with pytest.raises(OSError, match="No space left"):
        report.write(made(), path)
    monkeypatch.undo()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["compare.html"]


def test_an_error_while_rendering_leaves_the_old_page(tmp_path):
    path = tmp_path / "compare.html"
    path.write_text("old")
    with pytest.raises(Exception):  # noqa: B017  any: what counts is the file
        report.write({"rows": [3]}, path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["compare.html"]


def test_says_what_to_install(monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None if name == "plotly" else object())
    with pytest.raises(report.ReportError, match=r'needs plotly, .*pip install "manyheads\[report\]"'):
        report.render(made())


def test_results_are_left_as_they_were():
    results = made()
    before = copy.deepcopy(results)
    report.render(results)
    assert results == before
