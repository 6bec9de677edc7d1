"""The app: chat, X-ray, charts and traces on screen; shows what `dflash_core` decodes and never imports torch."""
