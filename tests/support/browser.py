"""Load pages in a real browser without a window."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """Return the path of a browser, None where none is installed."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


def load(browser: str, page: Path, profile: Path, *options: str) -> tuple[str, str]:
    """Load a page; return the document after its scripts have run, and the messages of its console."""
    return load_address(browser, page.as_uri(), profile, *options)


def load_address(browser: str, address: str, profile: Path, *options: str) -> tuple[str, str]:
    """Do the same with the page at an address."""
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
         "--enable-logging=stderr", f"--user-data-dir={profile}", "--virtual-time-budget=10000",
         "--dump-dom", *options, address],
        capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "HOME": str(profile)},
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return done.stdout, "\n".join(console)
