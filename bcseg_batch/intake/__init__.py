"""Which files are ready to be processed. Knows no torch."""
