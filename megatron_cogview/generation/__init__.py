"""From captions to pictures: cached decoding and sampling."""
