"""The page in a real browser; needs the extra `verify` and Chromium, as `make verify` installs them."""

import shutil

import pytest

from gptjax.serving.openai_api import make_app
from tests.serving.conftest import KEY, make_model, serve

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_chat_in_the_browser(tmp_path):
    from gptjax.serving import page as chat_page

    models = [make_model("tiny"), make_model("other", num_slots=1)]
    app = make_app(models, api_keys=[KEY])
    chat_page.mount(app, models, [KEY], seconds=20)
    with serve(app, models) as server, playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        outside: list[str] = []
        page.on(
            "request", lambda r: r.url.startswith(("http", "ws")) and server.url not in r.url and outside.append(r.url)
        )
        page.goto(f"{server.url}/ui")
        for key in ("wrong", KEY):  # the page asks for a key
            page.get_by_role("textbox").nth(0).fill("me")
            page.get_by_role("textbox").nth(1).fill(key)
            page.get_by_role("button", name="Login").click()
        box = page.get_by_placeholder("Say something")
        box.wait_for(timeout=20_000)
        for system in ("", "Be brief."):
            page.get_by_label("System prompt").fill(system)
        page.get_by_text("Sampling").click()
        page.get_by_label("number input for Most tokens").fill("12")
        page.get_by_label("Seed").fill("3")
        box.fill("你好 <|im_end|>")
        box.press("Enter")
        page.get_by_label("Retry").wait_for(timeout=20_000)
        assert "你好 <|im_end|>" in page.locator(".user.message").inner_text()
        assert page.locator(".bot.message").count() == 1
        page.get_by_label("Retry").click()
        page.get_by_label("Edit").first.click()
        page.get_by_label("Submit").wait_for()
        page.get_by_label("Submit").click()
        page.get_by_label("Retry").wait_for(timeout=20_000)
        assert page.locator("#likely .token").count() > 3
        assert not outside
        browser.close()
        with server.client() as client:
            upload = client.post("/ui/gradio_api/upload", files={"files": b"x"})
            assert upload.status_code == 404
