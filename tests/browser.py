"""Drives headless Chromium: what a page shows, says on its console, and requests.

The fixture `driver` in conftest.py starts it.
"""

import contextlib
import functools
import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
    # There is a mouse, as on a desktop.
    "blink-settings=primaryHoverType=2,availableHoverTypes=2,"
    "primaryPointerType=4,availablePointerTypes=4",
)
CHECKS = Path(__file__).with_name("page_checks.js").read_text()
LOCAL = ("file:", "data:", "blob:", "http://127.0.0.1:")


@contextlib.contextmanager
def start(profile: Path) -> Iterator[Any]:
    """Starts a browser that logs its console and its requests, or skips or fails the test.

    Args:
      profile: an empty folder for the browser's files.
    """
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if missing:
        end = pytest.fail if os.environ.get("RESJAX_TEST_CHROMIUM") == "required" else pytest.skip
        end(f"needs {' and '.join(missing)}: Debian's packages chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    # Each page opens as at the first visit, with no choice of a reader stored.
    forget = "try { localStorage.clear() } catch (error) {}"
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": forget})
    try:
        yield driver
    finally:
        driver.quit()


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serves a folder on this machine; returns its address, which ends in `/`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def show(driver: Any, url: str, width: int = 1400, theme: str = "light") -> None:
    """Opens a page in a window of this width, with empty logs."""
    set_theme(driver, theme)
    resize(driver, width)
    driver.get("about:blank")
    for log in ("browser", "performance"):
        driver.get_log(log)
    driver.get(url)
    settle(driver)


def set_theme(driver: Any, theme: str) -> None:
    """Makes the system prefer "light" or "dark"."""
    scheme = {"name": "prefers-color-scheme", "value": theme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def resize(driver: Any, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def settle(driver: Any) -> None:
    """Waits until scripts that ask for sizes have drawn what depends on them."""
    driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")


def faults(driver: Any) -> list[str]:
    """Returns what page_checks.js finds."""
    return list(driver.execute_script(CHECKS))


def console(driver: Any) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser")]


def requests(driver: Any) -> list[str]:
    """Returns the addresses that the page has requested."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [each["request"]["url"] for each in sent]
