"""Ask a question on llama-server's web page in a browser without a window, and look at the answer.

Starts llama-server with the model, always answering with the likeliest token, opens its address in Chromium, types the
question, waits until the answer stands there and compares it with what the server answers to the same question over
HTTP; ends with status 1 if they differ. --screenshot keeps a picture of the page.

Needs the page (athena-gguf runtime build --web-page), Chromium with its driver (on Debian: chromium chromium-driver)
and Selenium (pip install selenium).

    python tools/check_server_page.py A3.gguf --screenshot page.png
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from check_runs import free_port, post, running

# nothing but the page is fetched, and the user's own browser is not touched
BROWSER = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1000,760"]
BROWSER += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
ANSWER, WORKING = "[aria-label='Assistant message with actions']", "[aria-label='Stop generation']"


def over_http(port: int, question: str, tokens: int) -> str:
    request = {"messages": [{"role": "user", "content": question}], "max_tokens": tokens}
    return str(post(port, "/v1/chat/completions", request)["choices"][0]["message"]["content"])


@contextmanager
def browser(seconds: float) -> Iterator[tuple[Any, Any]]:
    """Chromium, and what waits for something in it."""
    from selenium import webdriver
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    options, service = webdriver.ChromeOptions(), webdriver.ChromeService(shutil.which("chromedriver"))
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for argument in [*BROWSER, f"--user-data-dir={profile}"]:
            options.add_argument(argument)
        driver = webdriver.Chrome(options=options, service=service)
        try:
            yield driver, WebDriverWait(driver, seconds, 0.2, ignored_exceptions=[StaleElementReferenceException])
        finally:
            driver.quit()


def on_page(address: str, question: str, expected: str, seconds: float, screenshot: Path | None) -> str:
    """What the answer's part of the page says when it is finished and holds `expected`, or when the time is over."""
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support import expected_conditions as conditions

    with browser(seconds) as (driver, wait):
        driver.get(address)
        field = wait.until(conditions.element_to_be_clickable((By.TAG_NAME, "textarea")))
        field.send_keys(question)
        wait.until(lambda _: field.get_attribute("value") == question)
        field.send_keys(Keys.ENTER)

        def answer() -> str:
            return "\n".join(element.text for element in driver.find_elements(By.CSS_SELECTOR, ANSWER))

        with suppress(TimeoutException):
            wait.until(lambda _: same(expected, answer()) and not driver.find_elements(By.CSS_SELECTOR, WORKING))
        if screenshot is not None:
            time.sleep(1)  # its fade-ins
            driver.save_screenshot(str(screenshot))
        return answer()


def same(expected: str, shown: str) -> bool:
    """Whether the page shows the answer; it sets lists, headings and emphasis, so only letters and digits count."""
    a, b = ("".join(c for c in text if c.isalnum()) for text in (expected, shown))
    return bool(a) and a in b


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--question", default="What is the capital of France?")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the answer at most (default 64)")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--seconds", type=float, default=120, help="to wait for everything on the page (default 120)")
    parser.add_argument("--screenshot", type=Path, metavar="PNG")
    args = parser.parse_args()
    from athena_gguf.runtime import binary

    port = free_port()
    command = [binary("llama-server"), "-m", args.model, "--host", "127.0.0.1", "--port", port, "-c", 2048]
    command += ["-t", args.threads, "-n", args.tokens, "--temp", 0]
    with running(command, port, "/health"):
        expected = over_http(port, args.question, args.tokens)
        shown = on_page(f"http://127.0.0.1:{port}", args.question, expected, args.seconds, args.screenshot)
    good = same(expected, shown)
    print(f"asked: {args.question}\nserver: {expected}\npage: {' | '.join(shown.splitlines())}")
    print("the page shows the server's answer" if good else "WRONG: the page does not show the server's answer")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
