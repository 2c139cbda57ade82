"""Weights in and out: Hugging Face folders, read and written, and GGUF files, read."""
