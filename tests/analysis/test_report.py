"""The page as a reader sees it: in a real browser, where there is one."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from analysis import configs
from analysis.facts import answers, caveats
from analysis.figures import Sweep
from analysis.report import main, page_of
from sweeps import run  # noqa: F401  knows the schema that settings are checked against

PERPLEXITY, ACCURACY = "perplexity/boolq_1024", "arc_easy/acc"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def described(records, fitted):
    """The records with matrices, settings and an environment, as a sweep's."""
    with initialize_config_module("conf", version_base="1.3"):
        config = OmegaConf.to_container(compose("config", ["model=smollm2_135m"]), resolve=True)
    for i, record in enumerate(records):
        record["config"] = config | {"rank": {"k": i}, "sweep": "test"}
        record["environment"] = {"python": "3.11.7", "processor": "a <processor>", "memory_bytes": 16e9, "versions": {}}
    for record in records[:-2]:
        fitted(record, [0.1, 0.2, 0.05, 0.4])
    return records


@pytest.fixture
def page(described, write):
    """The written file, and its text."""
    folder = write(described)
    assert main([str(folder)]) == 0
    return folder / "report.html"


# ------------------------------------------------------------------------------------------------------- in a browser
@pytest.fixture
def browser():
    """Chromium; its test is skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install chromium to see the page drawn")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, page):
    """opened(width): the page at that width; whatever it complains about or asks a network for fails the test."""
    troubles = []

    def _opened(width: int):
        tab = browser.new_page(viewport={"width": width, "height": 800})
        tab.on("console", lambda message: troubles.append(message.text) if message.type != "log" else None)
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("request", lambda request: troubles.append(request.url) if request.url.startswith("http") else None)
        tab.goto(page.as_uri())
        tab.wait_for_selector("#frontier .scatterlayer .point")
        return tab

    yield _opened
    assert troubles == []


@pytest.mark.parametrize("width", [390, 1200])
def test_the_points_are_there_at_every_width(opened, width):
    tab = opened(width)
    assert tab.locator("#frontier .scatterlayer .point").count() == 11
    assert tab.locator("#points tbody tr").count() == 12
    assert tab.locator("#heat .hm image, #heat .heatmaplayer image").count() >= 1
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert all(tab.locator("img").evaluate_all("images => images.map(image => image.naturalWidth > 0)"))


def test_axes_can_be_chosen_and_hovering_tells_about_a_point(opened, described):
    tab = opened(1200)
    tab.select_option("#metric", ACCURACY)
    tab.select_option("#size", "megabytes")
    assert "(MB)" in tab.locator("#frontier .xtitle").text_content()
    assert "Accuracy" in tab.locator("#frontier .ytitle").text_content()
    tab.locator("#frontier").scroll_into_view_if_needed()
    *place, name = tab.evaluate(
        """() => { const plot = document.getElementById("frontier"), trace = plot.data.find(t => t.name === "rank 32");
        const {xaxis, yaxis, _size} = plot._fullLayout, box = plot.getBoundingClientRect();
        const [x, y] = [xaxis.d2p(trace.x[0]), yaxis.d2p(trace.y[0])];
        return [box.x + _size.l + x, box.y + _size.t + y, trace.customdata[0]] }"""
    )
    tab.mouse.move(place[0] - 3, place[1])
    tab.mouse.move(*place)
    tab.wait_for_selector("#frontier .hoverlayer .hovertext")
    told = tab.locator("#frontier .hoverlayer").text_content()
    record = next(record for record in described if record["name"] == name)
    assert f"{record['metrics'][ACCURACY]['value']:g} ± 0.021" in told
    assert "method caldera" in told


def test_the_table_sorts_by_numbers_both_ways_and_what_is_missing_stays_last(opened):
    tab = opened(1200)

    def ranks() -> list[str]:
        tab.locator("#points th button").nth(2).click()
        return tab.locator("#points tbody td:nth-child(3)").all_text_contents()

    rising, falling = ranks(), ranks()
    assert rising[-1] == falling[-1] == "–"
    assert [int(rank) for rank in rising[:-1]] == sorted(int(rank) for rank in rising[:-1])
    assert falling[:-1] == rising[:-1][::-1]


def test_a_command_is_copied_or_selected(opened):
    tab = opened(1200)
    tab.locator("details").first.locator("summary").click()
    tab.locator("button.copy").first.click()
    tab.wait_for_function("document.querySelector('button.copy').textContent !== 'Copy command'")


# -------------------------------------------------------------------------------------------------- without a browser
def test_the_page_is_one_file_that_asks_for_no_other(page):
    text = page.read_text()
    markup = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["'](?!data:)""", markup)
    assert "a &lt;processor&gt;" in markup
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.DOTALL)[1])
    assert len(data["frontier"]["points"]) == 11
    assert len(data["heat"]["points"]) == 11
    assert data["frontier"]["points"][0]["values"][PERPLEXITY][0] > 1


def test_answers_are_the_smallest_points_within_a_tolerance(records):
    found = answers(Sweep.of(records).table)
    sizes = [(answer["tolerance"], answer["size"]) for answer in found]
    assert sizes == [("25%", "4.01 bits"), ("50%", "3.01 bits"), ("100%", "2.75 bits")]
    assert answers(Sweep.of(records[:-2]).table) == []
    accuracy = answers(Sweep.of(records, ACCURACY).table)
    assert [(answer["tolerance"], answer["size"]) for answer in accuracy][:2] == [
        ("5%", "4.01 bits"),
        ("10%", "3.01 bits"),
    ]


def test_caveats_name_what_makes_numbers_doubtful(described):
    described[3]["metrics"][PERPLEXITY]["measured_on"] = {"text": "boolq", "rows": 16, "length": 1024}
    described[2]["matrices"][0] |= {"few_tokens": True, "jitters": [{"sigma": 0.03}]}
    found = " ".join(caveats(described, Sweep.of(described).table))
    assert "rows differ" in found
    assert "SmolLM2-135M-Instruct.Q4_1.gguf: quantized to 4 bits once" in found
    assert "one seed" in found
    assert "1 of 44 matrices were fitted to fewer tokens" in found
    assert "1 of 44 matrices needed more damping" in found
    assert "H has 3 NaN" in found


def test_a_copied_command_composes_the_recorded_settings(composed_as):
    odd = ["rank.k=48", "sweep='a, b'", "calibration.text='it\\'s 50% [x]/1'", "method=srr", "quantizer@q=nf_4bit"]
    odd += ["evaluation.tasks=[piqa,rte]", "model.revision='1'", "model.include=['*.q_proj','*']", "search.trials=3"]
    config = composed_as(odd)
    words = [f"{name}={word}" for name, word in configs.overrides(config).items()]
    again = composed_as(words)
    left_out = dict.fromkeys(configs.LEFT_OUT)
    assert again | left_out == config | left_out
    assert configs.command(config).startswith("caldera-run ")


@pytest.fixture
def composed_as():
    def _composed(overrides: list[str]) -> dict:
        with initialize_config_module("conf", version_base="1.3"):
            return OmegaConf.to_container(compose("config", overrides), resolve=True)

    return _composed


def test_settings_that_tell_points_apart(described):
    one, other = described[1]["config"], described[2]["config"]
    assert configs.differing([one, other]) == [{"rank.k": "1"}, {"rank.k": "2"}]


def test_runs_without_matrices_and_environment_still_give_a_page(records):
    page = page_of(Sweep.of(records))
    assert page["data"]["heat"]["points"] == []
    assert page["environment"] == []


def test_torch_and_hydra_are_not_imported():
    code = (
        "import sys, json, analysis.report, analysis.layers, analysis.tradeoffs; print(json.dumps(list(sys.modules)))"
    )
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert not {"torch", "hydra", "matplotlib.pyplot", "wandb"} & set(loaded)


def test_a_folder_without_records_is_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("caldera-report: ")
