"""Preparation of any source as tars of short, checked, mono 16-bit clips: decoded once, read many times."""
