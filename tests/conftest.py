"""Fixtures that every test may take."""

from devices import device, double, gpu  # noqa: F401
