"""Measurement of milliseconds on the device."""
