"""A booted Debian with a systemd of its own, for the tests of the unit."""
