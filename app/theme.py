"""The look of the page: one Gradio theme, no font or file from the network; refuses to know components."""

import gradio as gr
from gradio.themes.utils import colors

BLUE = colors.Color(
    name="dflash", c50="#eef7fc", c100="#cfe8f7", c200="#a9d5ee", c300="#7bbde3", c400="#56b4e9", c500="#1b84c4",
    c600="#0072b2", c700="#005f95", c800="#0b4a70", c900="#123a52", c950="#0b2434",
)  # fmt: skip
SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Noto Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Noto Sans Mono", "monospace"]


def theme() -> gr.themes.Base:
    return gr.themes.Base(
        primary_hue=BLUE, secondary_hue=BLUE, neutral_hue=colors.slate, font=SANS, font_mono=MONO,
        text_size="md", spacing_size="sm", radius_size="md",
    ).set(
        body_background_fill="#f7f8fa", body_background_fill_dark="#0f1419",
        background_fill_primary="#ffffff", background_fill_primary_dark="#161c23",
        background_fill_secondary="#f3f5f8", background_fill_secondary_dark="#1c242d",
        block_background_fill="#ffffff", block_background_fill_dark="#161c23",
        border_color_primary="#dde2e8", border_color_primary_dark="#2b3540",
        block_border_width="1px", block_shadow="none", block_shadow_dark="none",
        block_label_background_fill="transparent", block_label_background_fill_dark="transparent",
        body_text_color="#111827", body_text_color_dark="#f3f4f6",
        body_text_color_subdued="#4b5563", body_text_color_subdued_dark="#a9b4c0",
        button_primary_background_fill="#0072b2", button_primary_background_fill_hover="#005f95",
        button_primary_background_fill_dark="#0072b2", button_primary_background_fill_hover_dark="#1b84c4",
        button_primary_text_color="#ffffff", button_primary_text_color_dark="#ffffff",
        button_secondary_background_fill="#ffffff", button_secondary_background_fill_dark="#1c242d",
        button_secondary_background_fill_hover="#eef2f6", button_secondary_background_fill_hover_dark="#25303b",
        button_secondary_border_color="#cfd6de", button_secondary_border_color_dark="#384552",
        input_background_fill="#ffffff", input_background_fill_dark="#11171d",
        input_border_width="1px", input_border_width_dark="1px",
        input_border_color="#cfd6de", input_border_color_dark="#384552",
        slider_color="#0072b2", slider_color_dark="#56b4e9",
        color_accent_soft="#e6f2fa", color_accent_soft_dark="#17303f",
        border_color_accent_subdued="#b9d9ec", border_color_accent_subdued_dark="#24506a",
    )  # fmt: skip
