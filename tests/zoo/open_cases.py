"""What the product does not judge right yet, each with what is missing. Whoever mends one takes it off."""

EXPECTED_OPEN: dict[str, str] = {}
FUZZ_OPEN: dict[str, str] = {}
