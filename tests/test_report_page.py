"""The report's page in a browser: headless Chromium, driven by selenium (the extra `browser`, and Debian's packages
chromium and chromium-driver). Without them these tests are skipped, and say so."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trace_cases as cases

from minidist.report import write_page
from minidist.trace import Trace, breakdown, read, traffic
from minidist.trace.analysis import PARTS

webdriver = pytest.importorskip("selenium.webdriver", reason="pages are tested with selenium: the extra `browser`")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="pages are tested in Chromium: Debian's packages chromium and chromium-driver"
)

WIDE, NARROW = 1280, 360  # pixels


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    rows = cases.ring_run(steps=40, evaluate=10, jitter=5000)
    rows[0] += [["V", "staleness", late, 5] for late in (0, 1, 1, 3)]
    schedule = {"name": "1f1b", "stages": 4, "microbatches": 1, "chunks": 1}
    for stage, of_rank in enumerate(rows):
        for _, _, start, _ in [row for row in of_rank if row[0] == "S"]:
            there, back = start + 100_000 * stage, start + 900_000 - 100_000 * stage
            of_rank.append(["P", "Forward", 0, 0, start, there + 50_000, there + 140_000])
            of_rank.append(["P", "Backward", 0, 0, there + 140_000, back, back + 90_000])
    return read(cases.write(tmp_path_factory.mktemp("trace"), rows, schedule=schedule, program="mnist --epochs 1"))


@pytest.fixture(scope="module")
def page(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(trace, path)
    return path


Opener = Callable[..., Any]


@pytest.fixture
def shown(driver: Any, page: Path) -> Iterator[Opener]:
    """shown(path=..., width=..., theme=...): the driver, the page opened and drawn. At the end, no errors were told."""

    def opened(path: Path = page, width: int = WIDE, theme: str = "light") -> Any:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        driver.get(path.as_uri())
        until(lambda: script(driver, "return document.documentElement.dataset.ready"))
        return driver

    driver.get_log("browser")
    yield opened
    assert driver.get_log("browser") == []


def script(driver: Any, source: str, *arguments: Any) -> Any:
    return driver.execute_script(source, *arguments)


def until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)
    return found


def view(driver: Any) -> tuple[int, int]:
    """The stretch of time that the timeline shows, nanoseconds, once it is drawn."""
    settled = "return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
    script(driver, settled)
    data = script(driver, "return {...document.getElementById('lanes').dataset}")
    return int(data["from"]), int(data["to"])


def test_its_numbers_are_the_traces(shown: Opener, trace: Trace) -> None:
    driver = shown()
    rows = script(
        driver,
        """const cell = td => [Number(td.dataset.value), td.innerText];
           const cells = row => [...row.querySelectorAll("td")].map(cell);
           const rows = [...document.querySelectorAll("#numbers tr[data-rank]")];
           return Object.fromEntries(rows.map(row => [row.dataset.rank, cells(row)]))""",
    )
    sent = traffic(trace)
    assert set(rows) == {"0", "1", "2", "3", "all"}
    for rank, part in enumerate(breakdown(trace)):
        lengths = [getattr(part, name).mean() for name in PARTS]
        expected = [40, (part.end - part.start).mean(), *lengths, sent.bytes[rank].sum(), sent.messages[rank].sum()]
        assert [value for value, _ in rows[str(rank)]][:8] == pytest.approx(expected)
    mean_step = sum((part.end - part.start).mean() for part in breakdown(trace)) / 4
    assert rows["all"][1][0] == pytest.approx(mean_step)
    assert rows["all"][1][1] == f"{mean_step / 1e6:.2f} ms"
    assert rows["0"][6][1] == f"{sent.bytes[0].sum() / 1e6:.0f} MB"
    matrix = script(
        driver,
        """return [...document.querySelectorAll("#traffic tbody tr")].map(row =>
           [...row.querySelectorAll("td[data-value]")].map(cell => Number(cell.dataset.value)))""",
    )
    assert matrix == sent.bytes.tolist()


def test_each_section_is_there_that_the_trace_has_something_for(shown: Opener, tmp_path: Path) -> None:
    visible = "return [...document.querySelectorAll('section:not([hidden])')].map(section => section.id)"
    every = [
        "numbers",
        "curves",
        "timeline",
        "breakdown",
        "pipeline",
        "staleness",
        "labels",
        "layers",
        "traffic",
        "memory",
    ]
    driver = shown()
    assert script(driver, visible) == every
    words = script(
        driver, "return Object.fromEntries([...document.querySelectorAll('section')].map(s => [s.id, s.innerText]))"
    )
    assert "4 updates, in the mean 1.25 late, at most 3" in words["staleness"]
    assert "1f1b, training step" in words["pipeline"] and "75 %" in words["pipeline"]
    assert "D.3(4)" in words["labels"] and "average gradients" in words["labels"]
    assert "loss" in words["curves"] and "accuracy" in words["curves"]
    empty = tmp_path / "empty.html"
    write_page(read(cases.write(tmp_path / "trace", [[], []])), empty)
    assert script(shown(empty), visible) == ["numbers", "timeline", "breakdown"]


def test_the_timeline_zooms_with_wheel_drag_buttons_and_keys(shown: Opener, trace: Trace) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    driver = shown()
    whole = trace.span[1] - trace.span[0]
    canvas = driver.find_element("id", "lanes")
    script(driver, "arguments[0].scrollIntoView({block: 'center'})", canvas)

    def wheel(by: int) -> None:
        origin = webdriver.common.actions.wheel_input.ScrollOrigin.from_element(canvas)
        ActionChains(driver).scroll_from_origin(origin, 0, by).perform()

    def width() -> int:
        start, end = view(driver)
        return end - start

    at_first = width()
    wheel(-40)  # the page scrolls, and not the timeline, before it is clicked
    assert width() == at_first
    canvas.click()
    wheel(-200)
    nearer = width()
    assert nearer < 0.7 * at_first
    wheel(200)
    assert width() == pytest.approx(at_first, rel=0.01)

    before = view(driver)
    ActionChains(driver).drag_and_drop_by_offset(canvas, -200, 0).perform()
    after = view(driver)
    assert after[0] > before[0] and after[1] - after[0] == pytest.approx(before[1] - before[0], abs=3)

    def press(act: str) -> None:
        driver.find_element("css selector", f"[data-do={act}]").click()

    middle = width()
    for near, far in (
        (lambda: press("in"), lambda: press("out")),
        (lambda: canvas.send_keys("+"), lambda: canvas.send_keys("-")),
    ):
        near()
        assert width() == pytest.approx(middle / 2, rel=0.01)
        far()
        assert width() == pytest.approx(middle, rel=0.01)
    for everything in (lambda: press("fit"), lambda: canvas.send_keys("0")):
        everything()
        assert view(driver) == (0, whole)
        press("in")
        assert width() < whole
    canvas.send_keys("+" * 4)
    before = view(driver)
    canvas.send_keys(Keys.ARROW_RIGHT)
    assert view(driver)[0] == pytest.approx(before[0] + 0.2 * (before[1] - before[0]), abs=5)

    field = driver.find_element("id", "step")
    field.clear()
    field.send_keys("7" + Keys.ENTER)
    seventh = view(driver)
    driver.find_element("css selector", "[data-do=after]").click()
    assert view(driver)[0] > seventh[0] and field.get_property("value") == "8"


def test_a_tooltip_tells_what_is_under_the_pointer_and_under_the_keys(shown: Opener, trace: Trace) -> None:
    from selenium.webdriver import ActionChains

    driver = shown()
    canvas = driver.find_element("id", "lanes")
    script(driver, "arguments[0].scrollIntoView({block: 'center'})", canvas)
    # Step 20 is shown, of 40. The first forward of rank 0 in it begins with the step, and lasts about 200 us.
    start, end = view(driver)
    zero = trace.span[0]
    steps, computing = trace.ranks[0].steps, trace.ranks[0].computing
    begin = steps.start[20] - zero
    i = int(abs(computing.start - steps.start[20]).argmin())
    size = canvas.size
    left = 64
    x = left + (size["width"] - left) * (begin + 50_000 - start) / (end - start)
    y = 40 + 17 + 10
    tip = driver.find_element("id", "tip")
    assert not tip.is_displayed()
    # Under the pointer ...
    ActionChains(driver).move_to_element_with_offset(canvas, x - size["width"] / 2, y - size["height"] / 2).perform()
    until(tip.is_displayed)
    length = (computing.end[i] - computing.start[i]) / 1e3
    assert tip.text.splitlines()[:2] == ["forward 0", "D.3(3) train"]
    assert f"rank 0, from {begin / 1e6:.1f} ms, for {length:.0f} µs" in tip.text
    box = script(driver, "return arguments[0].getBoundingClientRect().toJSON()", tip)
    assert box["left"] >= 0 and box["right"] <= WIDE

    # ... under the keys, and what they tell is told to those as well who do not see it ...
    canvas.send_keys("0")
    until(lambda: not tip.is_displayed())
    driver.find_element("css selector", "[data-do=after]").click()
    for key, expected in (("\ue015", "D.3("), ("\ue015", "forward"), ("n", ""), ("p", "forward")):
        canvas.send_keys(key)
        said = driver.find_element("id", "said").get_property("textContent")
        assert tip.is_displayed() and expected in tip.text and said.startswith(tip.text.splitlines()[0])

    # ... and at once when the keys come to the timeline.
    field = driver.find_element("id", "step")
    field.click()
    assert not tip.is_displayed()
    field.send_keys("\ue004\ue004")  # over the button after it
    assert tip.is_displayed() and tip.text.startswith("D.3(")


def test_arrows_are_drawn_when_there_is_room(shown: Opener, trace: Trace) -> None:
    driver = shown()

    def arrows() -> int:
        view(driver)
        return int(driver.find_element("id", "lanes").get_dom_attribute("data-arrows"))

    assert 20 <= arrows() <= 60  # a step has 24 messages, and a little of its neighbours' is in sight
    driver.find_element("css selector", "[data-do=fit]").click()
    assert len(trace.messages) == 40 * 24 and arrows() == 0


CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const probe = document.body.appendChild(document.createElement("i"));
function luminance(name) {  // as WCAG defines it
  probe.style.color = `var(--${name})`;
  canvas.fillStyle = getComputedStyle(probe).color;
  canvas.fillRect(0, 0, 1, 1);
  const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
return arguments[0].map(pair => {
  const [more, less] = pair.map(luminance).sort((a, b) => b - a);
  return (more + 0.05) / (less + 0.05);
});
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_can_be_read_by_day_and_by_night(shown: Opener, theme: str) -> None:
    driver = shown(theme=theme)
    texts = [("ink", "paper"), ("ink", "card"), ("soft", "card"), ("soft", "faint"), ("ink", "label"), ("ink", "idle")]
    texts += [("on-colour", colour) for colour in ("forward", "backward", "update", "recompute", "exposed", "message")]
    texts += [("on-pale", "hidden"), ("on-pale", "collective")]
    contrasts = dict(zip(texts, script(driver, CONTRASTS, texts)))
    assert min(contrasts.values()) >= 4.5, contrasts  # WCAG's AA

    def dark() -> bool:
        return (
            sum(script(driver, "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"))
            < 300
        )

    assert dark() == (theme == "dark")
    button = driver.find_element("id", "theme")
    seen = []
    for _ in range(3):
        button.click()
        seen.append((button.text, dark()))
    assert seen == [("Colours: light", False), ("Colours: dark", True), ("Colours: auto", theme == "dark")]


def test_a_telephone_shows_it_without_scrolling_sideways(shown: Opener) -> None:
    driver = shown(width=NARROW)
    assert script(driver, "return [innerWidth, document.documentElement.scrollWidth]") == [NARROW, NARROW]
    outside = script(
        driver,
        """const seen = [...document.querySelectorAll("main *")].filter(one => one.clientWidth);
           return seen.filter(one => !one.closest(".scroll, svg"))
             .filter(one => one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML)""",
    )
    assert outside == []


def test_everything_one_can_do_has_a_name(shown: Opener) -> None:
    driver = shown()
    driver.execute_cdp_cmd("Accessibility.enable", {})
    nodes = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    wanted = {"button", "spinbutton", "combobox", "application", "image", "img", "region", "toolbar", "table"}
    roles = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if "role" in node]
    nameless = [role for role, name in roles if role in wanted - {"table"} and not name]
    assert nameless == []
    assert {"button", "spinbutton", "combobox", "application", "toolbar"} <= {role for role, _ in roles}


def test_a_long_run_opens_in_two_seconds(shown: Opener, tmp_path: Path) -> None:
    """Ten epochs of MNIST on four ranks: 250,000 rows."""
    path = tmp_path / "long.html"
    began = time.perf_counter()
    trace = read(cases.write(tmp_path / "trace", cases.ring_run(steps=2300, evaluate=230, jitter=50_000)))
    rows = sum(len(table) for rank in trace.ranks for table in rank.tables())
    assert rows > 250_000
    write_page(trace, path)
    assert time.perf_counter() - began < 60
    milliseconds = int(script(shown(path), "return document.documentElement.dataset.ready"))
    assert milliseconds < 2000
