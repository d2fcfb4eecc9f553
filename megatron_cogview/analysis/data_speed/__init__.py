"""The data path against its peers: decoding, tokenising, opening and reading, on one machine."""
