"""Numbers: what a choice would cost, before it is paid for."""
