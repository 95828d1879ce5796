"""Measuring milliseconds on the device."""
