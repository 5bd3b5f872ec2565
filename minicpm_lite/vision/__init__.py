"""Vision: from pixels to a few vectors that a language model reads among its tokens."""
