"""The page in a headless Chromium: what a visitor does, with the keyboard too, and pictures of it. Usage: page.py http://ADDRESS FOLDER

Needs Debian's chromium and chromium-driver. The server wants MEGAFUSE_API_TOKEN.
"""

import os
import sys
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


class Visitor:
    def __init__(self, address, scheme, width, height):
        options = webdriver.ChromeOptions()
        for flag in FLAGS:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.browser = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                     {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})  # fmt: skip
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        self.browser.get(address)

    def __getitem__(self, name):
        return self.browser.find_element(By.ID, name)

    def until(self, is_so, seconds=120):
        return WebDriverWait(self.browser, seconds).until(lambda _: is_so())

    def login(self, token):
        self.until(lambda: self["token"].is_displayed())
        self["token"].send_keys(token, Keys.ENTER)
        self.until(lambda: "on cpu" in self["server"].text)

    def jobs(self):
        return self.browser.find_elements(By.CSS_SELECTOR, ".job")

    def pictures(self, job):
        loaded = "return [...arguments[0].querySelectorAll('img')].filter((image) => image.naturalWidth).length"
        return self.browser.execute_script(loaded, job)

    def fill(self, name, text):
        self[name].clear()
        self[name].send_keys(text)

    def shot(self, path):
        self.browser.save_screenshot(str(path))

    def end(self):
        """What the browser complains of, but the request without a token and the plan of a size that cannot be."""
        found = [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        self.browser.quit()
        return [message for message in found if not ("status of 401" in message or "/v1/plan" in message and "status of 400" in message)]


def desk(address, folder, token):
    page = Visitor(address, "light", 1280, 800)
    page.login(token)
    page.fill("prompt", "two large red balls on the left")
    page.fill("seed", "7")
    page.fill("count", "2")
    page.until(lambda: "TFLOP" in page["estimate"].text)
    page["prompt"].send_keys(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.jobs() and "step" in page.jobs()[0].text)
    page.shot(folder / "running.png")
    page.until(lambda: page.pictures(page.jobs()[0]) == 2)
    page.until(lambda: "per picture" in (page.fill("seed", "8") or page["estimate"].text))

    # What the server refuses stands beside the button.
    page.fill("size", "65x64")
    page.until(lambda: "multiples of 4" in page["problem"].text)
    page.fill("size", "128x128")
    page.until(lambda: page["problem"].text == "")

    # A picture large; its settings back into the form.
    page.jobs()[0].find_element(By.CSS_SELECTOR, "figure button").click()
    page.until(lambda: page["shown"].is_displayed())
    assert "Seed: 7" in page["shown-text"].text, page["shown-text"].text
    page.shot(folder / "large.png")
    page["shown-use"].click()
    assert page["seed"].get_attribute("value") == "7" and page["prompt"].get_attribute("value") == "two large red balls on the left"
    assert page["size"].get_attribute("value") == "64x64" and page["steps"].get_attribute("value") == "4"
    page.fill("size", "128x128")

    # Methods side by side, with one seed.
    page.browser.find_element(By.XPATH, "//summary[.='Compare methods']").click()
    for method in ("plain", "megafusion", "hires-fix"):
        page.browser.find_element(By.CSS_SELECTOR, f"#compare input[value='{method}']").click()
    page.fill("count", "1")
    page["make"].click()
    page.until(lambda: len(page.jobs()) == 2 and page.pictures(page.jobs()[0]) == 3)
    captions = [caption.text for caption in page.jobs()[0].find_elements(By.CSS_SELECTOR, "figcaption")]
    assert sorted(caption.split(",")[0] for caption in captions) == ["hires-fix", "megafusion", "plain"], captions
    assert all("seed 7" in caption for caption in captions), captions
    page.browser.execute_script("window.scrollTo(0, 0)")
    page.shot(folder / "page.png")

    # Cancel.
    for method in ("plain", "megafusion", "hires-fix"):
        page.browser.find_element(By.CSS_SELECTOR, f"#compare input[value='{method}']").click()
    Select(page["method"]).select_by_value("plain")
    page.fill("size", "256x256")
    page.fill("steps", "200")
    page["make"].click()
    page.until(lambda: len(page.jobs()) == 3 and "step" in page.jobs()[0].text)
    page.jobs()[0].find_element(By.XPATH, ".//button[.='Cancel']").click()
    page.until(lambda: "cancelled" in page.jobs()[0].text)
    return page.end()


def phone(address, folder, token, png):
    page = Visitor(address, "dark", 390, 844)
    page.login(token)
    page.until(lambda: len(page.jobs()) == 5)  # those made before
    page["file"].send_keys(str(png))
    page.until(lambda: page["prompt"].get_attribute("value") == "two large red balls on the left")
    wide = page.browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= 390, f"the page is {wide} pixels wide"
    unnamed = page.browser.execute_script(
        "return [...document.querySelectorAll('input, select, textarea')].filter((field) => field.type !== 'hidden' && "
        "!field.labels.length && !field.ariaLabel && field.ariaHidden !== 'true').map((field) => field.id)"
    )
    assert not unnamed, f"fields without a label: {unnamed}"
    page.browser.execute_script("window.scrollTo(0, 0)")
    page.shot(folder / "phone.png")
    return page.end()


def main():
    address, folder, token = sys.argv[1], Path(sys.argv[2]), os.environ["MEGAFUSE_API_TOKEN"]
    folder.mkdir(parents=True, exist_ok=True)
    problems = desk(address, folder, token)
    root = Path(__file__).resolve().parents[2]
    problems += phone(address, folder, token, root / "docs" / "images" / "first.png")
    assert not problems, problems
    print(f"the page works; pictures of it are in {folder}")


main()
