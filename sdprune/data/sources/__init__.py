"""Where captions and real pictures come from. A new file in this folder is found by itself."""

from sdprune.data.sources.base import CaptionSource, caption_table, drawn_name

__all__ = ["CaptionSource", "caption_table", "drawn_name"]
