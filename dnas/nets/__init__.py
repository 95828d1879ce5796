"""Supernets and their gates; tracing and cutting of channels."""
