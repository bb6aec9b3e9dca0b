"""samdetr.visualization.report: a page that is whole, says what it shows, and can be sorted and filtered in a browser."""

import html
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from helpers import make_results
from samdetr.analysis import AP_NAMES, read_results
from samdetr.visualization import analysis_sections, report_page

BOX, NEAR, HALF, FAR = [10, 10, 20, 20], [13, 10, 20, 20], [20, 10, 20, 20], [60, 60, 20, 20]
DASH = "\N{EN DASH}"
NAMES = ['<b>"cat" & dog', "</script>", "'plain' \\ $x$"]
OBJECTS = [(1, 1, BOX), (1, 2, FAR), (2, 1, BOX), (2, 3, FAR), (3, 2, BOX), (3, 1, [0, 0, 9, 9], 1)]
DETECTIONS = [
    (1, 1, BOX, 0.9),  # correct
    (1, 1, NEAR, 0.8),  # duplicate
    (1, 3, FAR, 0.7),  # classification
    (2, 1, HALF, 0.6),  # localisation; class 3 is missed
    (3, 2, FAR, 0.5),  # background; class 2 is missed
    (3, 3, FAR, 0.1),
]


def sections_of(folder, objects=OBJECTS, detections=DETECTIONS, class_names=NAMES, images=4, **options):
    """The sections about images of 96 x 96 pixels."""
    truth, found = make_results(objects, detections, class_names, images)
    records = []
    for number in range(1, images + 1):
        path = folder / f"<{number}> & co.png"
        Image.new("RGB", (96, 96), (20 * number, 90, 120)).save(path)
        records.append({"file_name": str(path), "width": 96, "height": 96, "image_id": number})
    arguments = {
        "results": read_results(truth, found),
        "class_ap": np.array([[50.0, 60, 40, np.nan, 50, np.nan]] * len(class_names)),
        "mean_ap": dict(zip(AP_NAMES, [50.0, 60, 40, float("nan"), 50, float("nan")])),
        "records": records,
        "quality": {number: number / images for number in range(1, images + 1)},
        "score_threshold": 0.3,
        "num_examples": 8,
    }
    return analysis_sections(**{**arguments, **options})


class Page(HTMLParser):
    """Collects a page's text and attributes, and fails if an element is not closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *attribute) for attribute in attributes]
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in ("polyline", "line")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] not in ("style", "script"):
            self.text.append(data)


def rows(section, style=""):
    """The texts of the cells of a section's tables, row by row."""
    table = re.search(rf'<table class="[^"]*{style}">.*?</table>', section)[0]
    found = re.findall("<tr>(.*?)</tr>", table)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in found]
    return [[html.unescape(re.sub("<[^>]*>", "", cell)) for cell in row] for row in cells]


def test_a_page_is_well_formed_needs_nothing_else_and_shows_names_as_they_are(tmp_path):
    text = report_page(NAMES[1], "<p>top</p>", sections_of(tmp_path))
    page = Page(text)
    for name in NAMES:
        assert name in page.text and ("option", "value", str(NAMES.index(name))) in page.attributes
    assert "<4> & co.png" in page.text and text.count("</script>") == 1 and "<b>&quot;cat" not in text
    targets = [value for _, key, value in page.attributes if key in ("src", "href", "action", "data")]
    assert len(targets) > 8 and all(re.match(r"data:image/jpeg;base64,|#[a-z-]+$", target) for target in targets)
    assert "url(" not in text and "@import" not in text and not re.search(r"\bnan\b", text, re.IGNORECASE)
    identifiers = {value for _, key, value in page.attributes if key == "id"}
    assert identifiers == {"by-class", "score-thresholds", "confusion", "errors", "images"}
    assert identifiers == {value[1:] for _, key, value in page.attributes if key == "href"}


def test_the_tables(tmp_path):
    sections = sections_of(tmp_path)
    first, *classes, last = rows(sections["By class"])
    assert first == ["class", "objects", *AP_NAMES]
    assert sorted(classes) == sorted(
        [name, str(count), "50.0", "60.0", "40.0", DASH, "50.0", DASH] for name, count in zip(NAMES, (2, 2, 1))
    )
    assert last[1:3] == ["5", "50.0"]
    cat = rows(sections["Score thresholds"])[1]
    assert cat == [NAMES[0], "", "66.7", "0.805", "100.0", "50.0"]  # the one at 0.9, without its duplicate
    table = rows(sections["Confusion"], "confusion")
    assert table[1:] == [
        [NAMES[0], "1", "·", "·", "1"],
        [NAMES[1], "·", "·", "1", "1"],
        [NAMES[2], "·", "·", "·", "1"],
        ["background", "2", "1", "·", ""],
    ]
    numbers = {row[0]: row[2] for row in rows(sections["Errors"])[1:]}
    kinds = {
        "classification": "1",
        "localisation": "1",
        "both": "0",
        "duplicate": "1",
        "background": "1",
        "missed": "2",
    }
    assert numbers == kinds
    assert "Of 5 objects: 1 found, 2 missed, and 2 that would be found" in sections["Errors"]


def test_images_show_each_kind_once_and_are_chosen_by_f1(tmp_path):
    text = sections_of(tmp_path, num_examples=1)["Images"]
    worst, best, further = (part.split("</h3>")[1] for part in text.split("<h3>")[1:])
    names = [re.findall("</b>(&lt;[0-9]&gt;)", part) for part in (worst, best, further)]
    assert names == [["&lt;1&gt;"], ["&lt;4&gt;"], ["&lt;2&gt;", "&lt;3&gt;"]]
    boxes = re.findall(r'data-kind="(\w+)" data-classes="([\d ]+)"', text)
    assert sorted(boxes) == [
        ("background", "1"),
        ("classification", "2 1"),
        ("correct", "0"),
        ("duplicate", "0"),
        ("localisation", "0"),
        ("missed", "1"),
        ("missed", "2"),
    ]
    assert 'style="left:10.42%;top:10.42%;width:20.83%;height:20.83%"' in text  # BOX
    assert text.count('class="truth crowd') == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detections": []}, "The model detects nothing in these images"),
        ({"detections": [(1, 1, BOX, 0.1)]}, "No detection has a score of 0.3 or more"),
        ({"objects": []}, "These images have no annotated objects"),
        ({"objects": [], "detections": []}, "These images have no annotated objects"),
        ({"objects": [(1, 1, FAR)], "detections": []}, "Every object is missed, so that no AP would be left"),
        ({"objects": OBJECTS[:1], "detections": DETECTIONS[:1], "class_names": ["one"], "images": 1}, "one"),
        ({"class_names": [f"class {number}" for number in range(80)]}, "class 79"),
    ],
)
def test_what_is_lacking_is_said(tmp_path, options, message):
    text = report_page("title", "", sections_of(tmp_path, **options))
    assert message in text and not re.search(r"\bnan\b", text, re.IGNORECASE)
    Page(text)


@pytest.fixture
def browser():
    """A page of a headless Chromium, which fails the test for what is written to its console or asked of the network."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip(f"there is no browser: none of {', '.join(names)}")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page, wrong = chromium.new_page(), []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda request: wrong.extend([request.url] * (not request.url.startswith(("file:", "data:"))))
        )
        yield page
        chromium.close()
        assert not wrong


def test_in_a_browser_tables_are_sorted_and_images_filtered(tmp_path, browser):
    class_ap = np.array([[20.0, 1, 1, 1, 1, 1], [30.0, 1, 1, 1, 1, 1], [np.nan] * 6])
    sections = sections_of(tmp_path, class_names=["b", "c10", "c9"], class_ap=class_ap)
    (tmp_path / "report.html").write_text(report_page("title", "", sections), "utf-8")
    browser.goto((tmp_path / "report.html").as_uri())

    def names():
        return browser.locator("#by-class tbody th").all_inner_texts()

    def click(column):
        browser.locator("#by-class thead th", has_text=column).first.get_by_role("button").click()

    assert names() == ["c10", "b", "c9"]  # by AP
    for column, expected in (
        ("class", ["b", "c9", "c10"]),
        ("class", ["c10", "c9", "b"]),
        ("AP", ["c10", "b", "c9"]),
        ("AP", ["b", "c10", "c9"]),  # what has no AP stays at the end
        ("objects", ["b", "c10", "c9"]),
    ):
        click(column)
        assert names() == expected, column
    assert browser.locator("#by-class th[aria-sort]").all_inner_texts() == ["objects"]

    browser.locator("#score-thresholds tbody").get_by_role("button", name="c9").click()
    assert browser.locator(".chart b").inner_text() == "c9"

    def filtered(label="any", kind="any", score=0.3):
        for number, option in enumerate((label, kind)):
            browser.locator(".filters select").nth(number).select_option(label=option)
        browser.get_by_label("score from").fill(str(score))
        images = re.findall(r"<\d>", " ".join(browser.locator("figcaption:visible").all_inner_texts()))
        boxes = browser.locator(".box:visible").evaluate_all("boxes => boxes.map(box => box.dataset.kind)")
        assert browser.locator("[role=status]").inner_text() == f"{len(images)} of 4 images"
        return sorted(images), sorted(boxes)

    everything = ["background", "classification", "correct", "duplicate", "localisation", "missed", "missed"]
    assert filtered() == (["<1>", "<2>", "<3>", "<4>"], everything)
    assert filtered(kind="localisation") == (["<2>"], ["localisation"])
    assert filtered(kind="missed") == (["<2>", "<3>"], ["missed", "missed"])
    assert filtered(label="b") == (["<1>", "<2>"], ["correct", "duplicate", "localisation"])
    assert filtered(label="c10", kind="classification") == (["<1>"], ["classification"])  # that class, or taken for it
    assert filtered(label="b", score=0.85) == (["<1>"], ["correct"])
    assert filtered(label="c9", kind="background") == ([], [])
    browser.locator("#images h3").first.wait_for(state="hidden")
    assert filtered() == (["<1>", "<2>", "<3>", "<4>"], everything)
    assert browser.locator(".truth:visible").count() == len(OBJECTS)
    browser.get_by_label("ground truth").uncheck()
    assert browser.locator(".truth:visible").count() == 0
    browser.locator(".picture").first.click()
    assert browser.locator(".image.large").count() == 1
