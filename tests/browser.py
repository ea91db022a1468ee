"""A real headless browser for the tests.

Looked for in this order: a Chromium or Chrome on the PATH (Debian: `apt-get install chromium`), then the one that
`python -m playwright install chromium` puts into the user's cache, which is fetched if it is not there yet. A machine
where neither can be had fails the test with both commands; it is not left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MILLISECONDS = 120_000
"""How long the browser may take for one step: machines that run tests are busy."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A running headless Chromium."""
    with sync_playwright() as playwright:
        program = next((path for name in NAMES if (path := shutil.which(name))), None)
        if program is None and not Path(playwright.chromium.executable_path).exists():
            fetched = subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=False)
            assert fetched.returncode == 0, (
                "the report's tests need a browser: apt-get install chromium, or python -m playwright install chromium"
            )
        root = hasattr(os, "geteuid") and os.geteuid() == 0  # Chromium's sandbox does not work for root
        arguments = ["--no-sandbox"] if root else []
        browser = playwright.chromium.launch(executable_path=program, args=arguments, timeout=MILLISECONDS)
        try:
            yield browser
        finally:
            browser.close()
