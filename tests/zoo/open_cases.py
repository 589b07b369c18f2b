"""What the product does not judge right yet, each with what is missing. Whoever mends one takes it off."""

EXPECTED_OPEN: dict[str, str] = {
    "index-null-file": "checkpoint._look_at_index: a name with null as its file raises ValueError (min() of nothing)",
    "header-metadata-surrogate": "config.strict_json takes half a character, which the safetensors library refuses in the child",
    "lie-path-surrogate": "hub._repo_file takes a path with half a character; checkpoint.content_id raises UnicodeEncodeError",
    "tokenizer-normalizer-replace-nothing": "tokenizer_json._steps: KeyError for a Replace without pattern",
    "tokenizer-normalizer-replace-by-nothing": "tokenizer_json._steps: KeyError for a Replace without content",
    "tokenizer-decoder-replace-nothing": "tokenizer_json._steps: KeyError for a Replace without pattern",
}
FUZZ_OPEN: dict[str, str] = {
    "foreign KeyError: 'pattern'": "tokenizer_json._steps: a Replace without pattern",
    "foreign KeyError: 'content'": "tokenizer_json._steps: a Replace without content",
}
