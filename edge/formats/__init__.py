"""Strict, bounded readers of foreign model files: nothing native sees a byte before them."""
