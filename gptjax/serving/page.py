"""A page to chat in, served beside the protocol."""

import contextlib
import math
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI

from gptjax.generation.engine import Request
from gptjax.generation.sampling import Sampling
from gptjax.generation.text import TextStream
from gptjax.serving.guard import is_known
from gptjax.serving.models import ServedModel
from gptjax.serving.worker import Busy

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
import gradio as gr

PATH = "/ui"
_MOST_CHARACTERS = 1 << 16  # of a message
_MOST_SHOWN = 400  # tokens with their probabilities
# Fonts of the reader's machine, those for Chinese, Japanese and Korean named, and none from elsewhere.
_FONTS = [
    "system-ui",
    "Noto Sans",
    "Noto Sans CJK SC",
    "PingFang SC",
    "Microsoft YaHei",
    "WenQuanYi Zen Hei",
    "sans-serif",
]
_COLORS = {"sure": "#bbf7d0", "likely": "#fef08a", "possible": "#fed7aa", "unlikely": "#fecaca"}


def mount(app: FastAPI, models: Sequence[ServedModel], api_keys: Sequence[str], seconds: float) -> None:
    """Puts the page at `PATH`; where there are keys, it asks for one as the password of any name.

    Args:
      app: as `make_app` gives it.
      models: of which those that chat can be chosen.
      api_keys: as in `make_app`.
      seconds: in which an answer must be there.
    """
    chatting = {model.name: model for model in models if model.worker and not model.is_encoder_decoder}

    async def answer(
        message: str,
        history: list[dict[str, Any]],
        name: str,
        system: str,
        temperature: float,
        top_p: float,
        top_k: float,
        max_tokens: float,
        seed: float,
    ) -> AsyncIterator[tuple[str, list[tuple[str, str]]]]:
        model = chatting[name]
        messages = [{"role": "system", "content": system}] if system.strip() else []
        messages += [{"role": turn["role"], "content": _text(turn["content"])} for turn in history]
        text, tokens = "", []
        characters, logprob = TextStream(model.tokenizer.decode), 0.0  # a character may be several tokens
        try:
            prompt = model.encode_chat([*messages, {"role": "user", "content": message}])
            sampling = Sampling(temperature, int(top_k), top_p)
            drawn = int.from_bytes(os.urandom(4)) if seed < 0 else int(seed) % (1 << 32)
            request = Request(np.array(prompt), int(max_tokens), model.eos_ids, sampling, drawn, logprobs=True)
            pieces = model.write([request], spelled_alone=True, seconds=seconds)
            async with contextlib.aclosing(pieces):  # type: ignore[type-var]
                async for piece in pieces:
                    text += piece.text
                    for score in piece.scores:
                        logprob += score.logprob or 0.0
                        if shown := characters.add(score.token):
                            tokens.append((shown, _how_likely(logprob)))
                            logprob = 0.0
                    yield text, tokens[-_MOST_SHOWN:]
        except Busy as error:
            raise gr.Error("Too many texts wait; try again later.") from error
        except (TimeoutError, ValueError) as error:
            raise gr.Error(str(error) or "The answer took too long.") from error

    with gr.Blocks(title="gptjax", fill_height=True, analytics_enabled=False) as page:
        with gr.Sidebar(position="right", width=340):
            name = gr.Dropdown([*chatting], value=next(iter(chatting), None), label="Model")
            system = gr.Textbox("", label="System prompt", lines=3, max_length=_MOST_CHARACTERS)
            with gr.Accordion("Sampling", open=False):
                temperature = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", info="0: the likeliest token")
                top_p = gr.Slider(0.01, 1, 0.95, step=0.01, label="Top-p")
                top_k = gr.Slider(0, 200, 50, step=1, label="Top-k", info="0: all")
                max_tokens = gr.Slider(1, 2048, 256, step=1, label="Most tokens")
                seed = gr.Number(-1, label="Seed", info="-1: another each time", precision=0)
            likely = gr.HighlightedText(
                label="How likely each token was", color_map=_COLORS, show_legend=True, elem_id="likely"
            )
        gr.ChatInterface(
            answer,
            chatbot=gr.Chatbot(
                show_label=False, height="75vh", buttons=["copy"], feedback_options=None, allow_tags=False
            ),
            textbox=gr.Textbox(
                placeholder="Say something",
                show_label=False,
                max_length=_MOST_CHARACTERS,
                submit_btn=True,
                stop_btn=True,
            ),
            additional_inputs=[name, system, temperature, top_p, top_k, max_tokens, seed],
            additional_outputs=[likely],
            editable=True,
            title="gptjax",
            concurrency_limit=64,
            api_visibility="private",
        )
    page.queue(max_size=256)

    def knows(_: str, key: str) -> bool:
        return is_known(key.encode(), api_keys)

    gr.mount_gradio_app(
        app,
        page,
        PATH,
        auth=knows if api_keys else None,
        auth_message="Any name, and an API key as the password.",
        footer_links=[],
        max_file_size=0,
        ssr_mode=False,
        theme=gr.themes.Default(font=_FONTS, font_mono=["ui-monospace", "Consolas", "monospace"]),
    )


def _text(content: Any) -> str:
    """The text of a turn, which gradio keeps in parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _how_likely(logprob: float) -> str:
    probability = math.exp(logprob)
    return next(name for name, least in zip(_COLORS, (0.8, 0.3, 0.05, 0.0), strict=True) if probability >= least)
