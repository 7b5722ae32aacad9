"""Safetensors files read by their headers and written by byte range; no model is instantiated."""
